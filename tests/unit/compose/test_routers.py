import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from loraretriever.compose.routers import ROUTER_FILE, linear_router, read_router, write_router
from loraretriever.errors import AdmissionError, InvalidInputError
from loraretriever.types import LoraPair

EXPERTS = ("sql", "german", "math")


def pairs(rank: int = 3, scaling: float = 1.0, seed: int = 0) -> dict[str, LoraPair]:
    generator = torch.Generator().manual_seed(seed)
    return {
        f"layers.{i}.q": LoraPair(
            torch.randn(rank, 5, generator=generator), torch.randn(4, rank, generator=generator), scaling
        )
        for i in range(2)
    }


def linear(seed: int = 0) -> dict[str, LoraPair]:
    return {name: linear_router(pair.a, 4) for name, pair in pairs(seed=seed).items()}


@pytest.mark.parametrize("kind", ["ramole", "moe"])
def test_a_router_comes_back_as_it_was_written(kind: str, tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "mine"
    modules = pairs(scaling=0.5) if kind == "ramole" else linear()
    write_router(folder, kind, modules, EXPERTS if kind == "moe" else (), "some/model")
    spec = read_router(folder)
    assert (spec.kind, spec.name, spec.rank, spec.base_model, spec.folder) == (kind, "mine", 3, "some/model", folder)
    assert spec.experts == (EXPERTS if kind == "moe" else ())
    weights = spec.weights()
    assert weights.digest == spec.digest
    assert weights.modules.keys() == modules.keys()
    for name, pair in modules.items():
        found = weights.modules[name]
        assert torch.equal(found.a, pair.a) and torch.equal(found.b, pair.b) and found.scaling == pair.scaling


def test_a_linear_router_adds_nothing() -> None:
    pair = linear_router(torch.ones(3, 5), 4)
    assert pair.b.shape == (4, 3) and not pair.b.any()


def test_the_digest_is_that_of_all_that_counts(tmp_path: Path) -> None:
    def digest(name: str, seed: int = 0, experts: tuple[str, ...] = EXPERTS) -> str:
        write_router(tmp_path / name, "moe", linear(seed), experts)
        return read_router(tmp_path / name).digest

    first = digest("a")
    assert digest("b") == first, "not of the name"
    assert digest("c", seed=1) != first
    assert digest("d", experts=EXPERTS[::-1]) != first
    write_router(tmp_path / "e", "ramole", linear())
    assert read_router(tmp_path / "e").digest != first


@pytest.mark.parametrize(
    ("kind", "experts", "modules", "problem"),
    [
        ("gpt", (), pairs(), "of the kind 'gpt'; expected one of ramole, moe"),
        ("ramole", EXPERTS, pairs(), "names 3 experts, 3 of them different; expected 0"),
        ("moe", EXPERTS[:2], pairs(), "names 2 experts, 2 of them different; expected 3"),
        ("moe", ("sql", "sql", "math"), pairs(), "3 experts, 2 of them different; expected 3"),
        ("ramole", (), {}, r"ranks \[\]"),
        ("ramole", (), {**pairs(), "other": pairs(2)["layers.0.q"]}, r"ranks \[2, 3\]"),
    ],
)
def test_what_is_no_router_is_not_written(
    kind: str, experts: tuple[str, ...], modules: dict[str, LoraPair], problem: str, tmp_path: Path
) -> None:
    with pytest.raises(InvalidInputError, match=problem):
        write_router(tmp_path / "router", kind, modules, experts)
    assert not (tmp_path / "router").exists()


def change(**values: Any) -> Callable[[Path], Any]:
    def apply(folder: Path) -> None:
        file = folder / ROUTER_FILE
        file.write_text(json.dumps(json.loads(file.read_text()) | values))

    return apply


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (lambda folder: (folder / ROUTER_FILE).unlink(), "has no router.json"),
        (lambda folder: (folder / ROUTER_FILE).write_text("{"), "cannot be read as JSON"),
        (lambda folder: (folder / ROUTER_FILE).write_text("[]"), "holds a list"),
        (change(kind=["moe"]), "of the kind"),
        (change(rank=0), "the rank 0"),
        (change(rank="3"), "the rank '3'"),
        (change(rank=2, experts=["sql", "german"]), "has the rank 3, but router.json says 2"),
        (change(experts="sql"), "experts is 'sql'"),
        (change(experts=[1, 2, 3]), "experts is"),
        (change(base_model=7), "base_model is 7"),
    ],
)
def test_a_damaged_router_is_refused(damage: Callable[[Path], Any], problem: str, tmp_path: Path) -> None:
    write_router(tmp_path / "router", "moe", linear(), EXPERTS)
    damage(tmp_path / "router")
    with pytest.raises(InvalidInputError, match=problem):
        read_router(tmp_path / "router")


def test_a_router_without_weights_is_refused(tmp_path: Path) -> None:
    write_router(tmp_path / "router", "moe", linear(), EXPERTS)
    (tmp_path / "router" / "adapter_model.safetensors").unlink()
    with pytest.raises(AdmissionError, match="missing"):
        read_router(tmp_path / "router")
