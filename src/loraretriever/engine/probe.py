"""What adapters would do to a prompt, without doing it: one pass of the base model, and their updates at one place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from loraretriever.batch.stacks import Factors, PreparedAdapter
from loraretriever.errors import InvalidInputError

ROWS = 32  # prompts in one pass
_PREFERRED = ".q_proj"


def choose_module(adapters: Sequence[PreparedAdapter], order: Sequence[str]) -> str:
    """Where effects are compared: the last module that all adapters have, a query projection if there is one.

    LoGo looks at the query projection of the last layer (its published code).

    Args:
        adapters: at least one.
        order: all modules of the model.

    Raises:
        InvalidInputError: the adapters have no module in common.
    """
    shared = set(_modules(adapters[0]))
    for adapter in adapters[1:]:
        shared &= set(_modules(adapter))
    known = [name for name in order if name in shared]
    if not known:
        names = ", ".join(sorted({adapter.name for adapter in adapters}))
        raise InvalidInputError(
            f"the adapters {names:.200} have no module in common, so that their effects cannot be compared; use "
            "another weighting than 'effect' for them."
        )
    return next((name for name in reversed(known) if name.endswith(_PREFERRED)), known[-1])


def _modules(adapter: PreparedAdapter) -> list[str]:
    return [name for block in adapter.blocks for name in block.factors]


def factors_of(adapter: PreparedAdapter, module: str) -> Factors:
    """The adapter's factors of a module that it has."""
    return next(block.factors[module] for block in adapter.blocks if module in block.factors)


@torch.inference_mode()
def last_inputs(model: Any, module: str, prompts: Sequence[Sequence[int]]) -> torch.Tensor:
    """What a module of the model reads at each prompt's last token. Shape: (len(prompts), in features).

    Args:
        model: no adapters are active in it.
        module: its path.
        prompts: token ids, at least one each.
    """
    found: list[torch.Tensor] = []
    seen: list[torch.Tensor] = []
    handle = model.get_submodule(module).register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    try:
        for start in range(0, len(prompts), ROWS):
            rows = prompts[start : start + ROWS]
            longest = max(map(len, rows))
            # Padded on the right, which tokens before it do not see.
            ids = torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows], device=model.device)
            seen.clear()
            model.get_decoder()(input_ids=ids, use_cache=False)
            last = torch.tensor([len(row) - 1 for row in rows], device=ids.device)
            found.append(seen[0][torch.arange(len(rows), device=ids.device), last])
    finally:
        handle.remove()
    return torch.cat(found)


@torch.inference_mode()
def effects(x: torch.Tensor, factors: Factors) -> torch.Tensor:
    """How much an adapter moves a module's output. Shapes: x (rows, in); returns (rows,), float32.

    Semantics: e[n] = ‖s B A x[n]‖₂ (LoGo, arXiv 2511.07129: the norm of an adapter's projection); the factors are
    those of a slot, with the scaling folded into B
    """
    a, b = (factor.to(x.device, torch.float32) for factor in (factors.a, factors.b))
    norms: torch.Tensor = torch.linalg.vector_norm(x.float() @ a.T @ b, dim=1)
    return norms
