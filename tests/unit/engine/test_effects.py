"""What adapters would do to prompts: the engine's probe against the plain formula."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from loraretriever.engine.local import LocalEngine
from loraretriever.errors import AdapterNotFoundError, InvalidInputError, OverloadedError
from loraretriever.models import BaseModel
from loraretriever.pool import Pool
from loraretriever.types import Composition, Request, Sampling
from tiny import LAYERS, tiny_llama, write_peft_folder
from tiny_text import tiny_tokenizer

PROMPTS = ["hello", "what is this?", "a much longer prompt than the others, to be padded"]


@pytest.fixture
def pool(tmp_path: Path) -> Iterator[Pool]:
    write_peft_folder(tmp_path / "one", seed=0, rank=4, alpha=8)
    write_peft_folder(tmp_path / "two", seed=1, rank=2)
    write_peft_folder(tmp_path / "wide", seed=2, targets=("q_proj", "down_proj"))
    write_peft_folder(tmp_path / "other", seed=3, targets=("down_proj",))
    with Pool.open(tmp_path) as opened:
        yield opened


@pytest.fixture
def model() -> Any:
    return tiny_llama()


@pytest.fixture
def engine(model: Any, pool: Pool) -> Iterator[LocalEngine]:
    engine = LocalEngine(BaseModel("tiny/llama", model, tiny_tokenizer()), pool, slots=4)
    yield engine
    engine.close()


def plain(model: Any, pool: Pool, prompt: str, adapter: str, module: str) -> float:
    """In float64, one prompt at a time."""
    tokenizer = tiny_tokenizer()
    ids = tokenizer(f"<{prompt}>=", add_special_tokens=False, return_tensors="pt").input_ids
    seen: list[torch.Tensor] = []
    handle = model.get_submodule(module).register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        model(ids)
    handle.remove()
    pair = pool.weights(adapter).modules[module]
    x = seen[0][0, -1].double()
    return float((pair.scaling * pair.b.double() @ (pair.a.double() @ x)).norm())


def test_effects_are_the_norms_of_the_updates_at_the_last_token_of_the_last_query(
    engine: LocalEngine, model: Any, pool: Pool
) -> None:
    names = [["one", "two"], ["wide"], ["two", "wide", "one"]]
    found = engine.effects([Request(prompt) for prompt in PROMPTS], names)
    module = f"model.layers.{LAYERS - 1}.self_attn.q_proj"
    engine.close()  # the model has its own modules again
    for prompt, row, effects in zip(PROMPTS, names, found, strict=True):
        expected = [plain(model, pool, prompt, name, module) for name in row]
        assert min(expected) > 0
        assert effects == pytest.approx(expected, rel=1e-4)


def test_without_a_shared_query_the_last_shared_module_counts(engine: LocalEngine, model: Any, pool: Pool) -> None:
    (found,) = engine.effects([Request(PROMPTS[0])], [["wide", "other"]])
    engine.close()
    module = f"model.layers.{LAYERS - 1}.mlp.down_proj"
    assert found == pytest.approx(
        [plain(model, pool, PROMPTS[0], name, module) for name in ("wide", "other")], rel=1e-4
    )


def test_adapters_without_a_module_in_common_cannot_be_compared(engine: LocalEngine) -> None:
    with pytest.raises(InvalidInputError, match="have no module in common"):
        engine.effects([Request("hello")], [["one", "other"]])
    with pytest.raises(AdapterNotFoundError):
        engine.effects([Request("hello")], [["nobody"]])
    assert engine.effects([Request("hello")], [[]]) == [()]


def test_a_probe_beside_running_requests_changes_nothing(engine: LocalEngine) -> None:
    composition = Composition("mixture", ("one", "two"), (0.7, 0.3))
    request = Request("tell me", composition, Sampling(max_tokens=40, ignore_end=True))
    (alone,) = engine.submit(request).result()
    before = engine.effects([Request(PROMPTS[1])], [["one"]])
    running = [engine.submit(request) for _ in range(3)]
    during = [engine.effects([Request(PROMPTS[1])], [["one"]]) for _ in range(5)]
    assert [answers.result()[0].text for answers in running] == [alone.text] * 3
    assert all(effects == before for effects in during)


def test_a_probe_that_fails_hurts_nobody_else(engine: LocalEngine) -> None:
    with pytest.raises(InvalidInputError, match="the model takes"):
        engine.effects([Request("x" * 5000)], [["one"]])
    with pytest.raises(ZeroDivisionError):
        engine._between_steps(lambda: 1 / 0)
    assert engine.submit(Request("hello", sampling=Sampling(max_tokens=2))).result()
    engine.close()
    with pytest.raises(OverloadedError):
        engine.effects([Request("hello")], [["one"]])
