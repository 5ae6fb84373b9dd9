"""Routers over frozen adapters: their formulas in float64, their training, and the engine's gates beside them."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from loraretriever.compose.routers import read_router
from loraretriever.engine.local import LocalEngine
from loraretriever.errors import InvalidInputError
from loraretriever.evaluate.tasks import Example
from loraretriever.models import BaseModel, render_prompt
from loraretriever.pool import Pool
from loraretriever.train.routed import RoutedModel, add_average, add_mixture, gate_logits, shares, stack_experts
from loraretriever.train.routers import CHECKPOINT, RouterSettings, _dropped, train_router
from loraretriever.train.smear import SmearModel
from loraretriever.train.steps import StepsResult
from loraretriever.types import AdapterWeights, Composition, Gate, LoraPair, Request, Sampling
from tiny import TINY_BASE, tiny_llama, write_peft_folder
from tiny_text import tiny_tokenizer

NAMES = ("one", "two", "three")
EXAMPLES = [Example(f"{'word ' * (i % 5)}{i}", "yes" if i % 2 else "no", "t", "d", "em") for i in range(24)]
SETTINGS = RouterSettings(rank=3, batch_size=4, epochs=3, learning_rate=3e-2)


class KilledError(Exception):
    """Stands for the end of a process in the middle of a training."""


@pytest.fixture
def base() -> BaseModel:
    return BaseModel(TINY_BASE, tiny_llama(), tiny_tokenizer())


@pytest.fixture
def pool(tmp_path: Path) -> Pool:
    write_peft_folder(tmp_path / "pool" / "one", seed=0, rank=4)
    write_peft_folder(tmp_path / "pool" / "two", seed=1, rank=2, targets=("q_proj", "v_proj", "down_proj"))
    write_peft_folder(tmp_path / "pool" / "three", seed=2, rank=4, alpha=32)
    return Pool.open(tmp_path / "pool")


@pytest.fixture
def adapters(pool: Pool) -> dict[str, AdapterWeights]:
    return {name: pool.weights(name) for name in NAMES}


def plain(adapter: AdapterWeights, module: str, x: torch.Tensor) -> torch.Tensor:
    pair = adapter.modules[module]
    return pair.scaling * pair.b.double() @ (pair.a.double() @ x.double())


MODULE = "model.layers.0.self_attn.q_proj"


def test_mixture_and_average_are_the_plain_sums(adapters: Mapping[str, AdapterWeights]) -> None:
    experts = stack_experts(list(adapters.values()), MODULE)
    x, weights = torch.randn(2, 3, 32), torch.rand(2, 3, 3)
    found = add_mixture(x, weights, experts)
    averaged = add_average(x, weights[:, 0], experts)
    pairs = [adapters[name].modules[MODULE] for name in NAMES]
    for n in range(2):
        for t in range(3):
            expected = sum(
                float(weights[n, t, e]) * plain(adapters[name], MODULE, x[n, t]) for e, name in enumerate(NAMES)
            )
            torch.testing.assert_close(found[n, t].double(), expected, atol=1e-5, rtol=1e-4)
        a, b = torch.zeros(4, 32, dtype=torch.float64), torch.zeros(32, 4, dtype=torch.float64)
        for e, pair in enumerate(pairs):
            w, rank = float(weights[n, 0, e]), pair.a.shape[0]
            a[:rank] += w * pair.a.double()
            b[:, :rank] += w * pair.scaling * pair.b.double()
        torch.testing.assert_close(averaged[n, 1].double(), b @ (a @ x[n, 1].double()), atol=1e-5, rtol=1e-4)


def test_ramoles_logits_are_those_of_its_paper(adapters: Mapping[str, AdapterWeights]) -> None:
    x, a_r, b_r = torch.randn(1, 2, 32), torch.randn(5, 32), torch.randn(32, 5)
    found = gate_logits(x, a_r, b_r, stack_experts(list(adapters.values()), MODULE))
    for t in range(2):
        query = a_r.double() @ x[0, t].double()
        keys = [b_r.double().T @ plain(adapters[name], MODULE, x[0, t]) for name in NAMES]
        expected = torch.stack([query @ key for key in keys]) / math.sqrt(5)
        torch.testing.assert_close(found[0, t].double(), expected, atol=1e-4, rtol=1e-4)


def test_shares_are_a_softmax_over_the_best_of_those_allowed() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0, 0.0]])
    allowed = torch.tensor([[True, False, True, True]])
    soft = shares(logits, allowed, None)[0]
    powers = torch.tensor([math.e, 0.0, math.e**2, 1.0])
    torch.testing.assert_close(soft, powers / powers.sum())
    two = shares(logits, allowed, 2)[0]
    torch.testing.assert_close(two, torch.tensor([math.e, 0.0, math.e**2, 0.0]) / (math.e + math.e**2))
    assert shares(logits, torch.zeros(1, 4, dtype=torch.bool), None).abs().sum() == 0


def test_the_best_alone_has_weight_one_and_still_a_gradient() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0]], requires_grad=True)
    weights = shares(logits, torch.ones(1, 3, dtype=torch.bool), 1)
    assert weights.tolist() == [[0.0, 1.0, 0.0]]
    (weights * torch.tensor([[1.0, 2.0, 3.0]])).sum().backward()
    probabilities = logits.detach().softmax(dim=-1)[0]
    expected = 2 * probabilities[1] * (torch.tensor([0.0, 1.0, 0.0]) - probabilities)
    torch.testing.assert_close(logits.grad[0], expected)  # type: ignore[index]


def train(
    kind: str, base: BaseModel, adapters: Mapping[str, AdapterWeights], folder: Path, stop_at: int | None = None,
    settings: RouterSettings = SETTINGS,
) -> StepsResult:  # fmt: skip
    candidates = [NAMES[i % 2 :] for i in range(len(EXAMPLES))] if kind == "ramole" else None

    def on_step(step: int, steps: int, loss: float) -> None:
        if step == stop_at:
            raise KilledError

    return train_router(kind, base, adapters, EXAMPLES, candidates, folder, settings, on_step, save_every=3)


@pytest.mark.parametrize(("kind", "top_k"), [("moe", None), ("moe", 1), ("smear", None), ("ramole", None)])
def test_a_training_that_was_stopped_goes_on_and_leaves_the_model_as_it_was(
    base: BaseModel, adapters: dict[str, AdapterWeights], tmp_path: Path, kind: str, top_k: int | None
) -> None:
    before = {key: value.clone() for key, value in base.model.state_dict().items()}
    settings = replace(SETTINGS, top_k=top_k)
    whole = train(kind, base, adapters, tmp_path / "whole", settings=settings)
    assert whole.steps == 18
    with pytest.raises(KilledError):
        train(kind, base, adapters, tmp_path / "stopped", 8, settings)
    assert not (tmp_path / "stopped" / "router.json").exists()
    resumed = train(kind, base, adapters, tmp_path / "stopped", settings=settings)
    assert (resumed.first_loss, resumed.last_loss) == (whole.first_loss, whole.last_loss)
    one, other = (read_router(tmp_path / name) for name in ("whole", "stopped"))
    assert one.digest == other.digest and (one.kind, one.top_k) == (kind, top_k)
    assert one.experts == (() if kind == "ramole" else NAMES)
    assert not (tmp_path / "stopped" / CHECKPOINT).exists()
    assert all(torch.equal(before[key], value) for key, value in base.model.state_dict().items())
    assert all(parameter.requires_grad for parameter in base.model.parameters())
    assert not any("forward" in vars(module) for module in base.model.modules())


def test_a_checkpoint_of_another_kind_is_not_gone_on_from(
    base: BaseModel, adapters: dict[str, AdapterWeights], tmp_path: Path
) -> None:
    whole = train("smear", base, adapters, tmp_path / "whole")
    with pytest.raises(KilledError):
        train("moe", base, adapters, tmp_path / "mixed", 8)
    assert train("smear", base, adapters, tmp_path / "mixed").first_loss == whole.first_loss
    assert read_router(tmp_path / "mixed").digest == read_router(tmp_path / "whole").digest


@pytest.mark.parametrize("kind", ["moe", "smear"])
def test_the_router_learns_which_of_two_opposite_experts_helps(base: BaseModel, tmp_path: Path, kind: str) -> None:
    """One expert pushes the last layer towards the answer's token, the other away from it."""
    head = base.model.lm_head.weight.detach().normal_(std=0.5)
    direction = head[base.tokenizer("a", add_special_tokens=False).input_ids[0]][:, None]
    pair = LoraPair(torch.randn(1, 64, generator=torch.Generator().manual_seed(1)), 4 * direction, 1.0)
    good = AdapterWeights("good", "a" * 64, {"model.layers.1.mlp.down_proj": pair})
    bad = AdapterWeights("bad", "b" * 64, {"model.layers.1.mlp.down_proj": replace(pair, b=-pair.b)})
    examples = [Example(f"{i} words", "a" * 6, "t", "d", "em") for i in range(16)]
    settings = RouterSettings(batch_size=8, epochs=20, learning_rate=0.1)
    result = train_router(kind, base, {"good": good, "bad": bad}, examples, None, tmp_path / "r", settings)
    assert result.last_loss < 0.9 * result.first_loss


def test_dropping_leaves_one_at_least_and_drops_half() -> None:
    draw = random.Random(0)
    kept = [_dropped((0, 1, 2), 0.5, draw) for _ in range(2000)]
    assert min(map(len, kept)) == 1
    assert sum(map(len, kept)) / 6000 == pytest.approx(0.5 + 0.125 / 3, abs=0.02)
    assert _dropped((4,), 0.99, draw) == (4,)


@pytest.mark.parametrize(("kind", "top_k"), [("moe", None), ("moe", 1), ("moe", 2), ("ramole", None)])
def test_the_engines_gate_gives_the_log_probabilities_of_the_trained_form(
    base: BaseModel, pool: Pool, adapters: dict[str, AdapterWeights], tmp_path: Path, kind: str, top_k: int | None
) -> None:
    train(kind, base, adapters, tmp_path / "router", settings=replace(SETTINGS, top_k=top_k))
    routed = RoutedModel(base.model, adapters, kind, SETTINGS.rank, top_k)
    routed.load(read_router(tmp_path / "router").weights())
    ids = base.tokenizer(render_prompt(base.tokenizer, "tell me"), return_tensors="pt", add_special_tokens=False)
    routed.allowed = torch.tensor([[True, False, True]])
    with torch.no_grad(), routed.installed():
        expected = base.model(ids.input_ids).logits[0, -1].log_softmax(dim=-1)
    engine = LocalEngine(base, pool, routers=[tmp_path / "router"])
    composition = Composition(kind, ("one", "three"), (0.5, 0.5), gate=Gate(kind, top_k))
    request = Request("tell me", composition, Sampling(max_tokens=1, logprobs=20))
    (answer,) = engine.submit(request).result()
    engine.close()
    found = {each.token: each.logprob for each in answer.logprobs[0].top}
    assert found == pytest.approx({token: float(expected[token]) for token in found}, abs=2e-4)
    with torch.no_grad():
        alone = base.model(ids.input_ids).logits[0, -1].log_softmax(dim=-1)
    assert (alone - expected).abs().max() > 1e-2  # the adapters do something


def test_smear_answers_as_one_prompt_at_a_time_does(
    base: BaseModel, adapters: dict[str, AdapterWeights], tmp_path: Path
) -> None:
    train("smear", base, adapters, tmp_path / "router")
    model = SmearModel(base, adapters, tmp_path / "router")
    texts = [render_prompt(base.tokenizer, text) for text in ("a", "tell me a story", "what is it?")]
    requests = [(texts[0], NAMES, 5), (texts[1], NAMES[:2], 9), (texts[2], NAMES[2:], 3)]
    found = {place: (text, count) for place, text, count in model.generate(requests)}
    assert found == {i: next(model.generate([request]))[1:] for i, request in enumerate(requests)}
    assert [count for _, count in (found[i] for i in range(3))] <= [5, 9, 3]
    assert not any("forward" in vars(module) for module in base.model.modules())


def test_smears_weights_come_from_the_mean_of_the_prompt_alone(
    base: BaseModel, adapters: dict[str, AdapterWeights]
) -> None:
    routed = RoutedModel(base.model, adapters, "smear", 1, None)
    router = torch.randn(3, 32)
    x = torch.randn(2, 4, 32)
    routed.prompt = torch.tensor([[False, True, True, True], [True, True, False, False]])
    allowed = torch.tensor([[True, True, True], [True, False, True]])
    found = routed._of_prompt("m", x, allowed, router)
    for n in range(2):
        mean = x[n][routed.prompt[n]].double().mean(dim=0)
        logits = (router.double() @ mean).masked_fill(~allowed[n], -math.inf)
        torch.testing.assert_close(found[n].double(), logits.softmax(dim=0), atol=1e-5, rtol=1e-5)
    assert torch.equal(routed._of_prompt("m", torch.randn(2, 1, 32), allowed, router), found)  # kept while decoding


def test_bad_requests_are_refused(base: BaseModel, adapters: dict[str, AdapterWeights], tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="a router of the kind 'other' over 3 adapters"):
        train_router("other", base, adapters, EXAMPLES, None, tmp_path, SETTINGS)
    with pytest.raises(InvalidInputError, match="no examples to learn from"):
        train_router("moe", base, adapters, [], None, tmp_path, SETTINGS)
    with pytest.raises(InvalidInputError, match="candidate 'nobody' is none of the adapters"):
        train_router("ramole", base, adapters, EXAMPLES[:1], [("nobody",)], tmp_path, SETTINGS)
    train("moe", base, adapters, tmp_path / "moe")
    with pytest.raises(InvalidInputError, match="a router of the kind moe"):
        SmearModel(base, adapters, tmp_path / "moe")
