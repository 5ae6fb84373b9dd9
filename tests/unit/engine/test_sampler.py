from __future__ import annotations

import math
import random
from collections import Counter
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from loraretriever.engine.sampler import (
    Sampled,
    Sampler,
    check_sampling,
    draw_weights,
    make_generator,
    make_limits,
)
from loraretriever.errors import InvalidInputError
from loraretriever.types import Sampling

CPU = torch.device("cpu")
CUDA = pytest.param(
    "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
)
NAN, INF = math.nan, math.inf


@dataclass(eq=False)
class Row:
    sampling: Sampling
    prompt_ids: list[int] = field(default_factory=list)
    output_ids: list[int] = field(default_factory=list)
    index: int = 0
    generator: torch.Generator | None = None

    def __post_init__(self):
        self.generator = make_generator(self.sampling, self.index)


def random_logits(rows: int, vocabulary: int, seed: int = 0, scale: float = 3.0) -> torch.Tensor:
    return scale * torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed))


def warped(logits: torch.Tensor, sampling: Sampling, nudge: float = 0.0) -> torch.Tensor:
    """The probabilities of draws from one row by the processors of transformers, in float64."""
    scores = TemperatureLogitsWarper(sampling.temperature)(None, logits.double()[None])
    if sampling.top_k:
        scores = TopKLogitsWarper(sampling.top_k)(None, scores)
    if sampling.top_p < 1:
        scores = TopPLogitsWarper(min(max(sampling.top_p + nudge, 0.0), 1.0))(None, scores)
    if sampling.min_p:
        scores = MinPLogitsWarper(min(sampling.min_p * (1 + nudge), 1.0))(None, scores)
    return scores.softmax(-1)[0]


def drawn_from(logits: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """The sampler's own probabilities of draws from one row."""
    weights = draw_weights(logits[None], make_limits([sampling], len(logits), CPU))[0]
    return weights.double() / weights.sum()


def check_same(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert not ours[theirs == 0].any()
    assert ours[theirs > theirs.max() * 2.0**-39].all()
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-11)


SETTINGS = [
    {},
    {"top_k": 1},
    {"top_k": 5},
    {"top_k": 200},
    {"top_k": 2**31 - 1},
    {"top_p": 1e-9},
    {"top_p": 0.3},
    {"top_p": 0.9},
    {"top_p": 0.999},
    {"min_p": 0.1},
    {"min_p": 1.0},
    {"top_k": 40, "top_p": 0.8},
    {"top_k": 400, "top_p": 0.95},
    {"top_k": 7, "min_p": 0.2},
    {"top_p": 0.7, "min_p": 0.05},
    {"top_k": 30, "top_p": 0.9, "min_p": 0.02},
]


@pytest.mark.parametrize("vocabulary", [1, 2, 60, 700, 9001])
@pytest.mark.parametrize("chosen", SETTINGS, ids=str)
def test_distribution_is_that_of_transformers(chosen, vocabulary):
    for seed, (temperature, scale) in enumerate([(0.8, 3.0), (1.5, 0.3), (0.1, 1.0), (20.0, 5.0)]):
        logits = random_logits(1, vocabulary, seed, scale)[0]
        sampling = Sampling(temperature=temperature, **chosen)
        ours, theirs = drawn_from(logits, sampling), warped(logits, sampling)
        check_same(ours, theirs)


@settings(deadline=None, max_examples=150)
@given(
    vocabulary=st.integers(1, 6000),
    seed=st.integers(0, 2**20),
    scale=st.floats(0.01, 10),
    temperature=st.floats(0.05, 10),
    top_k=st.one_of(st.just(0), st.integers(1, 7000)),
    top_p=st.one_of(st.just(1.0), st.floats(0.001, 1.0)),
    min_p=st.one_of(st.just(0.0), st.floats(0.0, 1.0)),
)
def test_distribution_is_that_of_transformers_for_any_settings(
    vocabulary, seed, scale, temperature, top_k, top_p, min_p
):
    # All different: of equal logits, they keep some by chance, or all.
    order = torch.randperm(vocabulary, generator=torch.Generator().manual_seed(seed))
    logits = scale * torch.special.ndtri((order.double() + 0.5) / vocabulary).float()
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    theirs = warped(logits, sampling)
    # Rounding may decide whether a token exactly at a border stays.
    assume(all(torch.equal(warped(logits, sampling, nudge) > 0, theirs > 0) for nudge in (-1e-5, 1e-5)))
    ours = drawn_from(logits, sampling)
    check_same(ours, theirs)


def best_first(logits: list[float], sampling: Sampling) -> list[int]:
    """The tokens that may be drawn, by the plain definition, equal logits in the order of ids."""
    order = sorted(range(len(logits)), key=lambda token: (-logits[token], token))
    order = order[: sampling.top_k or None]
    masses = [math.exp((logits[token] - logits[order[0]]) / sampling.temperature) for token in order]
    total, before, kept = math.fsum(masses), 0.0, []
    for token, mass in zip(order, masses, strict=True):
        if before >= sampling.top_p * total and kept:
            break
        before += mass
        kept.append(token)
    return sorted(kept)


@pytest.mark.parametrize("chosen", [{"top_k": k} for k in (1, 3, 127, 128, 129, 500)] + [{"top_p": 0.5}])
@pytest.mark.parametrize("values", [1, 2, 3, 40])
@pytest.mark.parametrize("vocabulary", [6, 600, 6000])
def test_of_equal_logits_the_lowest_ids_stay(chosen, values, vocabulary):
    chance = random.Random(vocabulary + values)
    logits = [float(chance.randrange(values)) for _ in range(vocabulary)]
    sampling = Sampling(temperature=1.3, **chosen)
    support = drawn_from(torch.tensor(logits), sampling).nonzero().flatten()
    assert support.tolist() == best_first(logits, sampling)


@settings(deadline=None, max_examples=100)
@given(
    logits=st.lists(st.sampled_from([-2.0, -0.0, 0.0, 0.5, 1.0, 4.0]), min_size=1, max_size=300),
    top_k=st.integers(0, 310),
    top_p=st.floats(0.01, 1.0),
)
def test_of_equal_logits_the_lowest_ids_stay_for_any_settings(logits, top_k, top_p):
    nudged = [
        best_first(logits, Sampling(temperature=0.7, top_k=top_k, top_p=min(top_p * by, 1.0)))
        for by in (1 - 1e-6, 1, 1 + 1e-6)
    ]
    assume(nudged[0] == nudged[1] == nudged[2])
    support = drawn_from(torch.tensor(logits), Sampling(temperature=0.7, top_k=top_k, top_p=top_p)).nonzero()
    assert support.flatten().tolist() == nudged[1]


@pytest.mark.parametrize("chosen", SETTINGS, ids=str)
def test_a_draw_is_the_inverse_of_the_cumulative_distribution(chosen):
    sampling = Sampling(temperature=1.1, seed=11, **chosen)
    logits, sampler, row = random_logits(1, 5000, 1)[0], Sampler(CPU), Row(sampling)
    cumulative = warped(logits, sampling).cumsum(0)
    generator = torch.Generator().manual_seed(11)
    for _ in range(100):
        point = torch.rand(1, generator=generator, dtype=torch.float64)
        expected = torch.searchsorted(cumulative, point * cumulative[-1], right=True)
        assert sampler.sample(logits[None], [row])[0].token == expected.item()


@pytest.mark.parametrize(("point", "expected"), [(0.0, 2), (1 - 2**-53, 4), (0.49, 2), (0.51, 4)])
@pytest.mark.parametrize("chosen", [{}, {"top_k": 2}, {"min_p": 0.9}], ids=str)
def test_the_ends_of_the_distribution_are_drawn_from_its_support(chosen, point, expected, monkeypatch):
    monkeypatch.setattr(torch, "rand", lambda *_, dtype, **__: torch.tensor([point], dtype=dtype))
    logits = torch.tensor([[-INF, -60.0, 1.0, -60.0, 1.0, -60.0]])
    assert Sampler(CPU).sample(logits, [Row(Sampling(temperature=1.0, **chosen))])[0].token == expected


@pytest.mark.parametrize("chosen", [{}, {"top_k": 6}, {"top_p": 0.8}, {"min_p": 0.1}], ids=str)
def test_draws_follow_the_distribution(chosen):
    logits, sampler = random_logits(1, 30, 5, scale=1.0), Sampler(CPU)
    sampling = Sampling(temperature=0.9, seed=5, n=128, **chosen)
    rows = [Row(sampling, index=index) for index in range(500)]
    tokens = [each.token for _ in range(12) for each in sampler.sample(logits.expand(500, -1), rows)]
    check_frequencies(tokens, warped(logits[0], sampling))


def test_first_draws_of_following_seeds_follow_the_distribution():
    logits, sampling = random_logits(1, 30, 6, scale=1.0), Sampling(temperature=0.9, seed=100, n=128)
    rows = [Row(sampling, index=index) for index in range(6000)]
    tokens = [each.token for each in Sampler(CPU).sample(logits.expand(6000, -1), rows)]
    check_frequencies(tokens, warped(logits[0], sampling))


def check_frequencies(tokens: list[int], probabilities: torch.Tensor) -> None:
    counts = Counter(tokens)
    possible = probabilities.nonzero().flatten().tolist()
    assert set(counts) <= set(possible)
    expected = probabilities[possible] * len(tokens)
    assert chisquare([counts[token] for token in possible], expected.numpy()).pvalue > 1e-3


def edited(logits: torch.Tensor, row: Row) -> torch.Tensor:
    """Bias and penalties by a plain loop; the repetition penalty by transformers' processor."""
    scores = logits.double().clone()
    for token, value in row.sampling.logit_bias:
        scores[token] += value
    history = row.prompt_ids + row.output_ids
    if history:
        penalty = RepetitionPenaltyLogitsProcessor(row.sampling.repetition_penalty)
        scores = penalty(torch.tensor([history]), scores[None])[0]
    for token in set(row.output_ids):
        scores[token] -= row.sampling.presence_penalty
    for token in row.output_ids:
        scores[token] -= row.sampling.frequency_penalty
    return scores


EDITS = [
    {},
    {"repetition_penalty": 1.7},
    {"repetition_penalty": 0.6},
    {"presence_penalty": 0.9},
    {"frequency_penalty": -0.4},
    {"logit_bias": ((3, 2.5), (0, -100.0), (3, 0.25))},
    {
        "repetition_penalty": 1.3,
        "presence_penalty": 0.5,
        "frequency_penalty": 0.25,
        "logit_bias": ((1, 4.0), (2, -3.0)),
    },
]


@pytest.mark.parametrize("neighbours", [0, 1])
@pytest.mark.parametrize("chosen", EDITS, ids=str)
def test_bias_and_penalties_by_a_plain_loop(chosen, neighbours):
    row = Row(Sampling(logprobs=20, **chosen), prompt_ids=[1, 5, 5, 7])
    rows = [Row(Sampling()) for _ in range(neighbours)] + [row]
    sampler = Sampler(CPU)
    for step in range(8):
        logits = random_logits(len(rows), 20, step, scale=1.0)
        before = logits.clone()
        found = sampler.sample(logits, rows)[-1]
        expected = edited(logits[-1], row).log_softmax(0)
        assert torch.equal(logits, before)
        assert found.token == expected.argmax().item()
        assert found.logprob == pytest.approx(expected.max().item(), abs=1e-5)
        assert [token for token, _ in found.top] == expected.argsort(descending=True).tolist()
        assert [value for _, value in found.top] == pytest.approx(expected.sort(descending=True).values.tolist(), 1e-5)
        row.output_ids.append(found.token if step % 3 else 5)
        if step % 2:
            row.output_ids.append(9)  # a step may add more than one


def test_draws_are_made_from_edited_logits():
    sampling = Sampling(temperature=0.7, top_p=0.9, seed=1, n=128, **EDITS[-1])
    rows = [Row(sampling, prompt_ids=[4], output_ids=[6, 6], index=index) for index in range(4000)]
    logits = random_logits(1, 20, 3, scale=1.0)
    tokens = [each.token for each in Sampler(CPU).sample(logits.expand(4000, -1), rows)]
    check_frequencies(tokens, warped(edited(logits[0], rows[0]), sampling))


@pytest.mark.parametrize("temperature", [0.0, 0.3])
@pytest.mark.parametrize("vocabulary", [3, 50, 5000])
def test_log_probabilities_are_those_at_temperature_1_before_any_cut(vocabulary, temperature):
    rows = [Row(Sampling(temperature=temperature, top_k=2, seed=0, logprobs=each)) for each in (0, 20, None, 4)]
    logits = random_logits(4, vocabulary)
    for row, found, expected in zip(
        rows, Sampler(CPU).sample(logits, rows), logits.double().log_softmax(-1), strict=True
    ):
        if row.sampling.logprobs is None:
            assert found == Sampled(found.token)
            continue
        best = expected.topk(min(row.sampling.logprobs, vocabulary))
        assert found.logprob == pytest.approx(expected[found.token].item(), abs=1e-6)
        assert [token for token, _ in found.top] == best.indices.tolist()
        assert [value for _, value in found.top] == pytest.approx(best.values.tolist(), abs=1e-6)


def test_the_best_tokens_of_equal_logits_come_in_the_order_of_ids():
    logits = torch.zeros(1, 5000)
    logits[0, [4000, 70, 3999]] = 1.0
    logits[0, 0] = -0.0
    found = Sampler(CPU).sample(logits, [Row(Sampling(logprobs=5))])[0]
    assert [token for token, _ in found.top] == [70, 3999, 4000, 0, 1]


def mixed_row(chance: random.Random, vocabulary: int) -> Row:
    """A row under settings drawn by chance, most of them off as often as not."""

    def maybe(value, off):
        return value if chance.random() < 0.4 else off

    sampling = Sampling(
        temperature=maybe(0.0, chance.uniform(0.3, 2)),
        top_p=maybe(chance.uniform(0.1, 0.99), 1.0),
        top_k=maybe(chance.choice([1, 20, 127, 128, 300, 10_000]), 0),
        min_p=maybe(0.03, 0.0),
        repetition_penalty=maybe(1.2, 1.0),
        presence_penalty=maybe(0.4, 0.0),
        frequency_penalty=maybe(0.2, 0.0),
        logit_bias=maybe(((3, 5.0), (chance.randrange(vocabulary), -2.0)), ()),
        logprobs=maybe(chance.randrange(6), None),
        seed=chance.randrange(2**40),
    )
    return Row(sampling, [chance.randrange(vocabulary) for _ in range(5)], index=chance.randrange(3))


def advance(sampler: Sampler, rows: list[Row], logits: dict[Row, torch.Tensor]) -> list[Sampled]:
    found = sampler.sample(torch.stack([logits[row][len(row.output_ids)] for row in rows]), rows)
    for row, each in zip(rows, found, strict=True):
        row.output_ids.append(each.token)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_a_rows_answer_does_not_depend_on_the_batch(device, dtype):
    chance, steps, vocabulary = random.Random(4), 6, 4999
    rows = [mixed_row(chance, vocabulary) for _ in range(40)]
    scales = [chance.choice([0.3, 3.0]) for _ in rows]
    logits = {
        row: random_logits(steps, vocabulary, seed, scale).to(device, dtype)
        for seed, (row, scale) in enumerate(zip(rows, scales, strict=True))
    }
    together: dict[Row, list[Sampled]] = {row: [] for row in rows}
    sampler, waiting, batch = Sampler(torch.device(device)), list(rows), []
    while waiting or batch:
        joining = chance.randrange(12)
        batch, waiting = batch + waiting[:joining], waiting[joining:]
        if chance.random() < 0.5:
            chance.shuffle(batch)
        if batch:
            for row, found in zip(batch, advance(sampler, batch, logits), strict=True):
                together[row].append(found)
        batch = [row for row in batch if len(row.output_ids) < steps]
    for row in rows:
        alone, sampler = Row(row.sampling, row.prompt_ids, index=row.index), Sampler(torch.device(device))
        logits[alone] = logits[row]
        assert [advance(sampler, [alone], logits)[0] for _ in range(steps)] == together[row]


class Largest(TorchDispatchMode):
    """Names the operations that give a tensor as wide as the vocabulary, and the argmaxes."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.vocabulary, self.seen = vocabulary, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        wide = isinstance(result, torch.Tensor) and self.vocabulary in result.shape
        if wide or "argmax" in str(func):
            self.seen.append(str(func))
        return result


def test_greedy_rows_cost_one_argmax():
    rows, logits, sampler = [Row(Sampling(n=2)) for _ in range(3)], random_logits(3, 1000), Sampler(CPU)
    with Largest(1000) as largest:
        found = sampler.sample(logits, rows)
    assert found == [Sampled(token) for token in logits.argmax(-1).tolist()]
    assert largest.seen == ["aten.argmax.default"]


def test_settings_become_tensors_once(monkeypatch):
    chosen = [{}, {"temperature": 1.0, "top_p": 0.5}, {"logit_bias": ((2, 1.0),)}, {"logprobs": 3}]
    rows, sampler = [Row(Sampling(**each)) for each in chosen], Sampler(CPU)
    sampler.sample(random_logits(4, 1000), rows)
    monkeypatch.setattr(torch, "tensor", None)
    assert len(sampler.sample(random_logits(4, 1000), list(rows))) == 4
    with pytest.raises(TypeError, match="not callable"):
        sampler.sample(random_logits(3, 1000), rows[1:])


def test_a_row_that_equals_the_last_one_is_another_row():
    class Alike(Row):
        def __eq__(self, other):
            return True

        __hash__ = None

    logits, sampler = random_logits(1, 10), Sampler(CPU)
    sampler.sample(logits, [Alike(Sampling())])
    assert sampler.sample(logits, [Alike(Sampling(logit_bias=((7, INF),)))])[0].token == 7


def test_an_empty_batch():
    assert Sampler(CPU).sample(torch.empty(0, 10), []) == []


KINDS = [
    {},
    {"presence_penalty": 1.0},
    {"logprobs": 2},
    {"temperature": 1.0},
    {"temperature": 1.0, "top_k": 2},
    {"temperature": 0.5, "top_p": 0.9, "min_p": 0.1, "logprobs": 1},
]


@pytest.mark.parametrize("vocabulary", [4, 5000])
@pytest.mark.parametrize("chosen", KINDS, ids=str)
@pytest.mark.parametrize(
    ("row", "allowed"),
    [([NAN] * 4, {0}), ([-INF] * 4, {0}), ([NAN, -INF] * 2, {0}), ([NAN, -INF, 2.0, 2.0], {2, 3}), ([INF] * 4, None)],
)
def test_logits_that_are_not_finite_harm_no_other_row(row, allowed, chosen, vocabulary):
    broken = torch.full((vocabulary,), row[1])
    broken[:4] = torch.tensor(row)
    healthy = random_logits(2, vocabulary)
    settings = Sampling(seed=3, **chosen)
    expected = Sampler(CPU).sample(healthy, [Row(settings), Row(settings)])
    rows = [Row(settings), Row(settings), Row(settings)]
    found = Sampler(CPU).sample(torch.stack((healthy[0], broken, healthy[1])), rows)
    assert [found[0], found[2]] == expected
    assert found[1].token in (allowed or range(vocabulary))
    assert found[1].logprob is None or not math.isnan(found[1].logprob)


def test_endless_bias_forces_and_forbids():
    logits, rows = random_logits(2, 10), []
    for temperature in (0.0, 1.0):
        forced = Sampling(temperature=temperature, logit_bias=((4, INF),), logprobs=1)
        rows.append(Row(forced))
    assert Sampler(CPU).sample(logits, rows) == [Sampled(4, 0.0, ((4, 0.0),))] * 2
    best = logits.argmax(-1).tolist()
    forbidden = [Row(Sampling(logit_bias=((token, -INF),))) for token in best]
    without = logits.scatter(1, logits.argmax(-1, keepdim=True), -INF).argmax(-1)
    assert [each.token for each in Sampler(CPU).sample(logits, forbidden)] == without.tolist()


@pytest.mark.parametrize(
    ("chosen", "allowed"),
    [
        ({"temperature": 1e300}, {1, 2, 3}),
        ({"temperature": 1.0, "presence_penalty": 1e300}, {3}),
        ({"temperature": 1.0, "frequency_penalty": -1e300}, {1, 2}),
        ({"temperature": 1.0, "repetition_penalty": 1e300}, {3}),
    ],
    ids=str,
)
def test_huge_settings_do_what_they_say(chosen, allowed):
    logits = torch.tensor([[-INF, -2.0, -1.0, 1.0]]).expand(50, -1)
    rows = [Row(Sampling(seed=seed, **chosen), output_ids=[0, 1, 2]) for seed in range(50)]
    assert {each.token for each in Sampler(CPU).sample(logits, rows)} == allowed


@pytest.mark.parametrize("chosen", [{"temperature": 1e-6}, {"top_k": 1}, {"top_p": 1e-12}], ids=str)
def test_narrow_settings_are_greedy(chosen):
    logits = (1e4 * random_logits(8, 5000)).bfloat16()
    if "temperature" not in chosen:
        logits = logits.clamp(max=2e4)  # many equal ones at the top
        chosen = {**chosen, "temperature": 1e5}
    rows = [Row(Sampling(seed=seed, **chosen)) for seed in range(8)]
    assert [each.token for each in Sampler(CPU).sample(logits, rows)] == logits.argmax(-1).tolist()


def test_generators():
    def state(seed, index):
        return make_generator(Sampling(temperature=1.0, seed=seed, n=4), index).initial_seed()

    assert make_generator(Sampling(seed=1), 0) is None
    assert [state(5, index) for index in range(3)] == [5, 6, 7]
    assert state(2**63 - 1, 1) == 0
    assert state(None, 0) != state(None, 0)


def test_the_answers_of_one_request_differ_and_come_again():
    logits, sampling = torch.zeros(4, 1000), Sampling(temperature=1.0, seed=8, n=4)

    def answers(indices):
        rows = [Row(sampling, index=index) for index in indices]
        return [each.token for each in Sampler(CPU).sample(logits[: len(rows)], rows)]

    first = answers(range(4))
    assert len(set(first)) == 4
    assert answers([3, 1]) == [first[3], first[1]]


def test_a_bias_beyond_the_vocabulary_is_refused():
    sampling = Sampling(logit_bias=((0, 1.0), (99, 1.0)))
    check_sampling(sampling, 100)
    with pytest.raises(InvalidInputError, match="token 99; expected ids below 99"):
        check_sampling(sampling, 99)


@pytest.mark.parametrize(
    "chosen",
    [
        {"max_tokens": 0},
        {"temperature": 1e-38},
        {"temperature": -1.0},
        {"temperature": INF},
        {"seed": 2**70},
        {"seed": -1},
        {"top_k": 2**70},
        {"top_k": -1},
        {"top_p": 0.0},
        {"min_p": 1.1},
        {"repetition_penalty": 0.0},
        {"presence_penalty": NAN},
        {"frequency_penalty": INF},
        {"logit_bias": ((-1, 0.0),)},
        {"logit_bias": ((1, NAN),)},
        {"logprobs": 21},
        {"n": 0},
        {"stop": ("",)},
    ],
)
def test_bad_settings(chosen):
    with pytest.raises(InvalidInputError, match="expected"):
        Sampling(**chosen)
