"""Trained token routers on disk: a PEFT folder, as of an adapter, with a `router.json` that says what it routes.

ramole: RAMoLE's RouterLoRA (arXiv 2406.16989). Its factors A_r (r, in) and B_r (out, r) are stored as an
adapter's. With v_p = s_p B_p A_p x, the output of adapter p as it acts alone, its scaling s_p included, a token's
logit for p is ⟨A_r x, s_r B_rᵀ v_p⟩ / √r; s_r, the router's own scaling, is 1 where `write_router` was given 1.
moe: a linear router W (E, in) over E experts, stored as A; B is (out, E) zeros. A token's logit for expert e is
(W x)[e].
smear: SMEAR's router (arXiv 2306.03745), in a moe's form. It looks at whole prompts, not at tokens: no gate uses it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from loraretriever.compose.merged import write_peft
from loraretriever.errors import InvalidInputError
from loraretriever.pool.files import write_file
from loraretriever.pool.peft_config import read_config
from loraretriever.pool.weights import digest_of, find_files, load_weights, read_header, real_file
from loraretriever.types import AdapterWeights, LoraPair

ROUTER_FILE = "router.json"
ROUTER_KINDS = ("ramole", "moe", "smear")
_MAX_BYTES = 1 << 20
_REMEDY = "Write router folders with write_router."


@dataclass(frozen=True, slots=True)
class RouterSpec:
    """A trained router in a folder. `digest` is the SHA-256 of all that is in it.

    `experts`: the adapters in the order of W's rows; a ramole has none. `top_k`: how many of them acted on a token when
    a moe was trained; None: all.
    """

    kind: str
    name: str
    digest: str
    folder: Path
    rank: int
    experts: tuple[str, ...]
    base_model: str | None
    top_k: int | None = None

    def weights(self) -> AdapterWeights:
        """Its factors, as CPU tensors, in the form of an adapter.

        Raises:
            PoolError: the files can no longer be read.
        """
        return load_weights(self.folder, self.name, self.digest)


def write_router(
    folder: Path,
    kind: str,
    modules: Mapping[str, LoraPair],
    experts: Sequence[str] = (),
    base_model: str | None = None,
    top_k: int | None = None,
) -> None:
    """Write a router into a folder, which is made if need be.

    Args:
        folder: its last name is the router's.
        kind: one of `ROUTER_KINDS`.
        modules: by module path; all of one rank r. ramole: a (r, in), b (out, r); others: by `linear_router`.
        experts: the adapters' names, as many as the rank, in the order of W's rows; of a ramole none.
        base_model: the name of the model that it was trained for.
        top_k: of a moe that was trained so.

    Raises:
        InvalidInputError: a value is not as said here.
        OSError, SafetensorError: the files cannot be written.
    """
    ranks = {pair.a.shape[0] for pair in modules.values()}
    if len(ranks) != 1:
        raise InvalidInputError(
            f"the router {folder.name!r} has modules of the ranks {sorted(ranks)}; expected one module or more, all "
            "of one rank."
        )
    (rank,) = ranks
    _check(folder.name, kind, rank, tuple(experts))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / ROUTER_FILE).unlink(missing_ok=True)  # half a router must not look like a whole one
    write_peft(folder, modules)
    values = {"kind": kind, "rank": rank, "experts": list(experts), "base_model": base_model, "top_k": top_k}
    write_file(folder / ROUTER_FILE, json.dumps(values, indent=1) + "\n")


def linear_router(weight: torch.Tensor, out: int) -> LoraPair:
    """A moe's router W (experts, in) of a module with `out` output features, in the form of an adapter's factors."""
    return LoraPair(weight, weight.new_zeros(out, weight.shape[0]), 1.0)


def read_router(folder: Path) -> RouterSpec:
    """Look at a router's folder; the weights are not read into memory.

    Raises:
        InvalidInputError: `router.json` is missing or says what cannot be, or a module has another rank than it says.
        AdmissionError: the PEFT files are missing, damaged or unsafe.
    """
    values = _read_values(folder)
    kind: Any = values.get("kind")
    rank: Any = values.get("rank")
    experts, base_model = values.get("experts"), values.get("base_model")
    if not (isinstance(experts, list) and all(isinstance(name, str) for name in experts)):
        raise InvalidInputError(f"{folder / ROUTER_FILE}: experts is {experts!r:.200}; expected a list of names.")
    if not (base_model is None or isinstance(base_model, str)):
        raise InvalidInputError(f"{folder / ROUTER_FILE}: base_model is {base_model!r:.200}; expected a name or null.")
    top_k: Any = values.get("top_k")
    if not (top_k is None or (isinstance(top_k, int) and top_k >= 1)):
        raise InvalidInputError(f"{folder / ROUTER_FILE}: top_k is {top_k!r:.200}; expected a number from 1, or null.")
    _check(str(folder), kind, rank, tuple(experts))
    config, weights = find_files(folder)
    _check_ranks(weights, rank)
    content = json.dumps([kind, rank, experts, top_k, digest_of(read_config(config), weights)])
    digest = hashlib.sha256(b"router" + content.encode()).hexdigest()
    return RouterSpec(kind, folder.name, digest, folder, rank, tuple(experts), base_model, top_k)


def _read_values(folder: Path) -> dict[str, Any]:
    file = folder / ROUTER_FILE
    if not file.is_file():
        raise InvalidInputError(f"{folder} has no {ROUTER_FILE}; expected a router's folder. {_REMEDY}")
    try:
        with real_file(file).open("rb") as handle:
            values = json.loads(handle.read(_MAX_BYTES))
    except (OSError, ValueError, RecursionError) as error:
        raise InvalidInputError(f"{file} cannot be read as JSON: {error}. {_REMEDY}") from error
    if not isinstance(values, dict):
        raise InvalidInputError(f"{file} holds a {type(values).__name__}; expected an object. {_REMEDY}")
    return values


def _check(name: str, kind: Any, rank: Any, experts: tuple[str, ...]) -> None:
    if kind not in ROUTER_KINDS:
        raise InvalidInputError(
            f"the router {name!r} is of the kind {kind!r:.200}; expected one of {', '.join(ROUTER_KINDS)}."
        )
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise InvalidInputError(f"the router {name!r} has the rank {rank!r:.200}; expected a whole number above 0.")
    expected = 0 if kind == "ramole" else rank
    if len(experts) != expected or len(set(experts)) != len(experts):
        raise InvalidInputError(
            f"the router {name!r} of kind {kind} and rank {rank} names {len(experts)} experts, {len(set(experts))} of "
            f"them different; expected {expected} different ones. {_REMEDY}"
        )


def _check_ranks(weights: Path, rank: int) -> None:
    for key, tensor in read_header(weights).items():
        found = tensor.shape[0] if ".lora_A." in key else tensor.shape[-1]
        if found != rank:
            raise InvalidInputError(
                f"{weights}: {key} has the rank {found}, but {ROUTER_FILE} says {rank}; expected the same. {_REMEDY}"
            )
