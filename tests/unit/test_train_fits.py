"""What is fitted without gradients: likelihoods of many compositions at once, LoRAHub, and LORAUTER's tasks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from loraretriever.batch.reference import merged_update
from loraretriever.errors import InvalidInputError
from loraretriever.evaluate.tasks import Example
from loraretriever.models import BaseModel
from loraretriever.pool import Pool
from loraretriever.train.adapters import tokenize_example
from loraretriever.train.likelihood import Likelihood
from loraretriever.train.lorahub import LoraHubSettings, fit_lorahub
from loraretriever.train.tasks import TaskIndex, halve, rank_adapters, unit_mean
from loraretriever.types import BASE_COMPOSITION, AdapterWeights, Composition, LoraPair, Mixer
from tiny import TINY_BASE, tiny_llama, write_peft_folder
from tiny_text import tiny_tokenizer

EXAMPLES = [Example(f"{'word ' * i}{i}", "yes" if i % 2 else "nothing", "t", "d", "em") for i in range(5)]


@pytest.fixture
def base() -> BaseModel:
    return BaseModel(TINY_BASE, tiny_llama(), tiny_tokenizer())


@pytest.fixture
def adapters(tmp_path: Path) -> Iterator[dict[str, AdapterWeights]]:
    for seed, name in enumerate(("one", "two", "three")):
        write_peft_folder(tmp_path / name, seed=seed, rank=4 - seed)
    with Pool.open(tmp_path) as pool:
        yield {name: pool.weights(name) for name in ("one", "two", "three")}


def plain_loss(
    base: BaseModel,
    adapters: Mapping[str, AdapterWeights],
    weights: Mapping[str, float],
    mixer: Mixer,
    example: Example,
) -> float:
    """With the update put into the weights, one example at a time."""
    tokens = tokenize_example(base.tokenizer, example)
    modules = {module for name in weights for module in adapters[name].modules}
    changed = {}
    for module in modules:
        pairs = [adapters[name].modules[module] for name in weights]
        weight = base.model.get_submodule(module).weight
        changed[module] = weight.data
        weight.data = (weight.data.double() + merged_update(pairs, list(weights.values()), mixer)).float()
    with torch.no_grad():
        logits = base.model(torch.tensor([tokens.ids])).logits[0, tokens.prompt - 1 : -1]
    for module, weight in changed.items():
        base.model.get_submodule(module).weight.data = weight
    return float(torch.nn.functional.cross_entropy(logits, torch.tensor(tokens.ids[tokens.prompt :])))


def test_losses_of_a_mixed_batch_are_those_of_each_row_alone(
    base: BaseModel, adapters: dict[str, AdapterWeights]
) -> None:
    rows = [
        ({"one": 1.0}, Mixer.OUTPUTS, EXAMPLES[3]),
        ({"one": 0.5, "two": 0.7}, Mixer.OUTPUTS, EXAMPLES[0]),
        ({"two": 0.5, "three": -0.4}, Mixer.PARAMETERS, EXAMPLES[4]),
        ({}, Mixer.OUTPUTS, EXAMPLES[1]),
    ]
    likelihood = Likelihood(base, adapters)
    found = likelihood.losses(
        [(likelihood.route(w, mixer=mixer), tokenize_example(base.tokenizer, example)) for w, mixer, example in rows]
    )
    likelihood.close()
    expected = [plain_loss(base, adapters, *row) for row in rows]
    assert found == pytest.approx(expected, abs=1e-4)
    assert len(set(np.round(expected, 3))) == len(rows)


def test_lorahubs_objective_is_that_of_its_paper(base: BaseModel, adapters: dict[str, AdapterWeights]) -> None:
    settings = LoraHubSettings(budget=30, l1=0.05, seed=1)
    result = fit_lorahub(base, adapters, EXAMPLES, settings)

    def objective(weights: Mapping[str, float]) -> float:
        losses = [plain_loss(base, adapters, weights, Mixer.PARAMETERS, example) for example in EXAMPLES]
        return float(np.mean(losses) + 0.05 * np.mean(np.abs(list(weights.values()))))

    assert result.loss == pytest.approx(objective(result.weights), abs=2e-3)
    assert all(abs(weight) <= 1.5 for weight in result.weights.values())
    again = fit_lorahub(base, adapters, EXAMPLES, settings)
    assert again.weights == result.weights
    with pytest.raises(InvalidInputError, match="0 adapters and 5 examples"):
        fit_lorahub(base, {}, EXAMPLES, settings)


def test_lorahub_finds_the_adapter_that_helps(base: BaseModel) -> None:
    """Of two opposite ones, one does, whichever: they act as (w² - v²) B A together."""
    head = base.model.lm_head.weight.detach().normal_(std=0.5)
    token = base.tokenizer("a", add_special_tokens=False).input_ids[0]
    a = torch.randn(1, 64, generator=torch.Generator().manual_seed(1))
    module = "model.layers.1.mlp.down_proj"
    one = AdapterWeights("one", "a" * 64, {module: LoraPair(a, 4 * head[token][:, None], 1.0)})
    other = AdapterWeights("other", "b" * 64, {module: LoraPair(a, -4 * head[token][:, None], 1.0)})
    examples = [Example(f"{i} words", "aaaa", "t", "d", "em") for i in range(4)]
    pair = {"one": one, "other": other}
    result = fit_lorahub(base, pair, examples, LoraHubSettings(budget=40, seed=1))
    nothing = np.mean([plain_loss(base, pair, {}, Mixer.OUTPUTS, example) for example in examples])
    assert result.loss < 0.95 * nothing


def test_halving_looks_at_more_examples_of_fewer_adapters() -> None:
    quality = {"a": 3.0, "b": 1.0, "c": 2.0, "d": 0.5, "e": 9.0}
    asked: list[tuple[str, str]] = []

    def loss(pairs: Sequence[tuple[str, Example]]) -> list[float]:
        asked.extend((name, example.inputs) for name, example in pairs)
        return [quality[name] for name, _ in pairs]

    examples = [Example(str(i), "x", "t", "d", "em") for i in range(16)]
    assert halve(list(quality), examples, loss, first=2) == ["d", "b", "c", "a", "e"]
    counts = {name: sum(each == name for each, _ in asked) for name in quality}
    assert counts == {"e": 2, "a": 2, "c": 4, "b": 8, "d": 8}
    assert len(set(asked)) == len(asked)  # no pair twice
    assert halve(["a", "b"], examples[:1], loss) == ["b", "a"]
    assert halve(["a"], examples, loss) == ["a"]


def test_later_examples_can_turn_a_race() -> None:
    def loss(pairs: Sequence[tuple[str, Example]]) -> list[float]:
        late = {"a": 5.0, "b": 0.0}
        return [({"a": 0.0, "b": 1.0}[name] if int(example.inputs) < 2 else late[name]) for name, example in pairs]

    examples = [Example(str(i), "x", "t", "d", "em") for i in range(4)]
    assert halve(["a", "b", "c"], examples, lambda pairs: [9.0 if n == "c" else v for (n, _), v in zip(pairs, loss(
        [(n if n != "c" else "a", e) for n, e in pairs]), strict=True)])[0] == "b"  # fmt: skip


def test_adapters_are_ranked_by_the_likelihood_of_the_answers(
    base: BaseModel, adapters: dict[str, AdapterWeights]
) -> None:
    found = rank_adapters(base, adapters, {"t": EXAMPLES[:2]})
    losses = {
        name: np.mean([plain_loss(base, adapters, {name: 1.0}, Mixer.OUTPUTS, each) for each in EXAMPLES[:2]])
        for name in adapters
    }
    assert found == {"t": sorted(losses, key=lambda name: losses[name])}
    assert not any("forward" in vars(module) for module in base.model.modules())


INDEX = TaskIndex(("t1", "t2", "t3"), ((1.0, 0.0), (0.6, 0.8), (0.0, 1.0)), (("a", "b"), ("a", "c"), ("b", "a")), 1.5)


def test_the_nearest_tasks_adapters_are_weighted_by_similarity_and_add_up() -> None:
    (found,) = INDEX.compose(np.array([[0.8, 0.6]], dtype=np.float32), [()], 3, temperature=0.5)
    powers = np.exp(np.array([0.8, 0.96, 0.6]) / 0.5)
    shares = powers / powers.sum()
    assert dict(zip(found.adapters, found.weights, strict=True)) == pytest.approx(
        {"a": shares[0] + shares[1], "b": shares[2]}
    )
    assert found.strategy == "mixture" and found.mixer is Mixer.OUTPUTS
    (two,) = INDEX.compose(np.array([[0.8, 0.6]]), [()], 2, temperature=0.5)
    assert two == Composition("mixture", ("a",), (1.0,))


def test_the_next_best_stands_in_for_an_excluded_adapter() -> None:
    first, none = INDEX.compose(np.array([[1.0, 0.0]] * 2), [{"a"}, {"a", "b", "c"}], 1)
    assert first.adapters == ("b",)
    assert none == BASE_COMPOSITION


def test_an_unseen_task_is_taken_from_the_index() -> None:
    whole, without, nothing = INDEX.compose(
        np.array([[1.0, 0.0]] * 3), [(), {"a"}, ()], 1, unseen=[(), {"t1", "other"}, {"t1", "t2", "t3"}]
    )
    assert whole.adapters == ("a",)
    assert without.adapters == ("c",)  # of t2, where the index with t1 has b
    assert nothing == BASE_COMPOSITION


def test_an_index_is_read_as_it_was_written(tmp_path: Path) -> None:
    INDEX.save(tmp_path / "index.json")
    assert TaskIndex.load(tmp_path / "index.json") == INDEX
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(InvalidInputError, match="is no index of tasks"):
        TaskIndex.load(tmp_path / "other.json")


def test_a_unit_mean_has_length_one() -> None:
    mean = np.array(unit_mean(np.array([[1.0, 0.0], [0.0, 1.0]], dtype=np.float32)))
    np.testing.assert_allclose(mean, [np.sqrt(0.5)] * 2)
