from __future__ import annotations

from collections import Counter

import pytest
import torch

from loraretriever.engine.sampler import Sampler
from loraretriever.errors import InvalidInputError
from loraretriever.types import Sampling

CPU = torch.device("cpu")


def allowed(logits: torch.Tensor, sampling: Sampling) -> dict[int, float]:
    """The tokens that may be drawn, with their probabilities, by the plain definition."""
    probabilities = torch.softmax(logits.double() / sampling.temperature, 0)
    order = sorted(range(len(logits)), key=lambda token: -probabilities[token].item())
    if sampling.top_k:
        order = order[: sampling.top_k]
    total = sum(probabilities[token].item() for token in order)
    kept, mass = [], 0.0
    for token in order:
        if mass >= sampling.top_p:
            break
        kept.append(token)
        mass += probabilities[token].item() / total
    total = sum(probabilities[token].item() for token in kept)
    return {token: probabilities[token].item() / total for token in kept}


@pytest.mark.parametrize(
    "settings",
    [{}, {"top_k": 3}, {"top_p": 0.6}, {"top_k": 4, "top_p": 0.7}, {"top_k": 1}, {"top_p": 1e-6}, {"top_k": 99}],
)
def test_draws_follow_the_definition(settings: dict[str, float]) -> None:
    logits = torch.tensor([1.0, 3.0, 2.0, 0.5, 2.5, -1.0])
    sampling = Sampling(temperature=0.8, seed=3, **settings)  # type: ignore[arg-type]
    sampler = Sampler([sampling], CPU)
    draws = 4000
    counts = Counter(int(sampler.sample(logits[None])) for _ in range(draws))
    expected = allowed(logits, sampling)
    assert set(counts) <= set(expected)
    for token, probability in expected.items():
        assert counts[token] / draws == pytest.approx(probability, abs=0.03)


def test_rows_have_their_own_settings() -> None:
    logits = torch.randn(4, 50, generator=torch.Generator().manual_seed(0))
    settings = [Sampling(), Sampling(temperature=5.0, top_k=1), Sampling(temperature=5.0, seed=1), Sampling()]
    tokens = Sampler(settings, CPU).sample(logits)
    assert tokens[[0, 1, 3]].tolist() == logits.argmax(1)[[0, 1, 3]].tolist()


def test_the_smallest_temperature_is_greedy() -> None:
    logits = 1e4 * torch.randn(4, 50, generator=torch.Generator().manual_seed(0))
    tokens = Sampler([Sampling(temperature=1e-6, seed=0)] * 4, CPU).sample(logits)
    assert tokens.tolist() == logits.argmax(1).tolist()


def test_select_keeps_each_rows_random_state() -> None:
    logits = torch.zeros(3, 1000)
    settings = [Sampling(temperature=1.0, seed=seed) for seed in range(3)]
    alone = Sampler([settings[2]], CPU)
    together = Sampler(settings, CPU)
    first = together.sample(logits)[2]
    together.select([2, 0])
    second = together.sample(logits[:2])[0]
    assert [alone.sample(logits[:1]).item(), alone.sample(logits[:1]).item()] == [first.item(), second.item()]


@pytest.mark.parametrize(
    "settings",
    [
        {"max_tokens": 0},
        {"temperature": 1e-38},
        {"seed": 2**70},
        {"seed": -1},
        {"top_k": 2**70},
        {"temperature": -1.0},
        {"temperature": float("inf")},
        {"top_p": 0.0},
        {"top_k": -1},
        {"stop": ("",)},
    ],
)
def test_bad_settings(settings: dict[str, object]) -> None:
    with pytest.raises(InvalidInputError, match="expected"):
        Sampling(**settings)  # type: ignore[arg-type]
