"""The engine's promise: each greedy answer is, token for token, what it is alone, whatever else runs."""

from __future__ import annotations

import random
import string
from collections.abc import Iterator, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from batch_helpers import ATTENTION, MLP, Library
from loraretriever.compose import get_strategy
from loraretriever.engine.local import LocalEngine
from loraretriever.engine.stream import Stream
from loraretriever.models import BaseModel
from loraretriever.types import BASE_COMPOSITION, AdapterWeights, Composition, Generation, Hit, Request, Sampling
from tiny import TINY_BASE, tiny_llama
from tiny_text import tiny_tokenizer

ADAPTERS, REQUESTS = 24, 200
STRATEGIES = ("selection", "mixture", "fusion", "ties", "dare_linear", "dare_ties", "svd", "arrow", "spectral")
TIE = 1e-4  # between two tokens whose log-probabilities differ by less, rounding may decide


class MemorySource:
    """Adapters without a pool."""

    def __init__(self, model: Any) -> None:
        self._library = Library(model)
        targets = (ATTENTION, ("q_proj", "v_proj"), (*ATTENTION, *MLP), ("o_proj", "down_proj"))
        self._refs = {}
        for i in range(ADAPTERS):
            self._refs[f"a{i}"] = self._library.add(1 + i % 8, targets[i % 4], 4.0, f"a{i}")

    def get(self, name: str) -> Any:
        return SimpleNamespace(digest=self._refs[name].digest)

    def weights(self, name: str, digest: str | None = None) -> AdapterWeights:
        return self._library.adapters[self._refs[name]]


@pytest.fixture(scope="module")
def base() -> BaseModel:
    return BaseModel(TINY_BASE, tiny_llama(max_length=1024), tiny_tokenizer())


@pytest.fixture(scope="module")
def source(base: BaseModel) -> MemorySource:
    return MemorySource(base.model)


def random_composition(chooser: random.Random) -> Composition:
    if chooser.random() < 0.1:
        return BASE_COMPOSITION
    # A few adapters are popular, as in real traffic.
    names = list(dict.fromkeys(f"a{min(int(chooser.expovariate(0.15)), ADAPTERS - 1)}" for _ in range(4)))[:3]
    weights = [chooser.uniform(0.2, 1.0) for _ in names]
    hits = [Hit(name, weight) for name, weight in zip(names, weights, strict=True)]
    return get_strategy(chooser.choice(STRATEGIES))(hits, weights)


@pytest.fixture(scope="module")
def requests() -> list[Request]:
    chooser = random.Random(0)
    made = []
    for _ in range(REQUESTS):
        length = max(1, min(512, int(2 ** chooser.uniform(0, 9.1))))
        prompt = "".join(chooser.choices(string.ascii_lowercase + " ", k=length))
        # Some begin alike, so that prefixes are used again.
        prompt = ("you are a helpful assistant who " + prompt)[:length] if chooser.random() < 0.4 else prompt
        sampling = Sampling(max_tokens=chooser.randint(1, 40))
        made.append(Request(prompt, random_composition(chooser), sampling, chat=chooser.random() < 0.5))
    assert min(len(request.prompt) for request in made) == 1
    assert max(len(request.prompt) for request in made) > 480
    return made


@pytest.fixture(scope="module")
def alone(base: BaseModel, source: MemorySource, requests: list[Request]) -> list[Generation]:
    """One at a time, each prompt in one piece and from its beginning; with the margins of each choice."""
    engine = LocalEngine(base, source, batch_size=1, step_tokens=1024, prefix_mib=0, cache_mib=64)
    asked = [replace(request, sampling=replace(request.sampling, logprobs=2)) for request in requests]
    results = [next(iter(engine.run([request])))[1] for request in asked]
    engine.close()
    return results


def check_same(found: Generation, alone: Generation) -> None:
    """The same text; or else the same up to a token whose choice was a tie."""
    if found.text == alone.text and found.finish_reason == alone.finish_reason:
        assert found.completion_tokens == alone.completion_tokens
        return
    same = next((i for i, (a, b) in enumerate(zip(found.text, alone.text, strict=False)) if a != b), len(found.text))
    text = ""
    for choice in alone.logprobs:
        text += choice.text
        if len(text) > same:
            best, second = (each.logprob for each in choice.top)
            assert best - second < TIE, (found.text, alone.text)
            return
    raise AssertionError((found.text, alone.text))


def play(engine: LocalEngine, requests: Sequence[Request], chooser: random.Random) -> Iterator[tuple[int, Stream]]:
    """Submit in bursts of random size, between which running answers advance by a few pieces."""
    order = list(range(len(requests)))
    chooser.shuffle(order)
    streams: dict[int, Stream] = {}
    pieces: list[Iterator[Any]] = []
    while order:
        for _ in range(min(len(order), chooser.randint(1, 30))):
            position = order.pop()
            streams[position] = engine.submit(requests[position])
            pieces.append(iter(streams[position]))
        for _ in range(chooser.randint(1, 12)):
            next(chooser.choice(pieces), None)
    yield from streams.items()


@pytest.mark.parametrize(
    ("sizes"),
    [
        {},
        {"slots": 4, "batch_size": 16},
        {"batch_size": 8, "step_tokens": 8, "prefix_mib": 0},
        {"cache_mib": 1, "host_mib": 0},  # too little for the batch: sequences give way and go on later
    ],
    ids=["roomy", "4 slots", "small steps", "little memory"],
)
def test_each_answer_is_what_it_is_alone(
    base: BaseModel, source: MemorySource, requests: list[Request], alone: list[Generation], sizes: dict[str, int]
) -> None:
    engine = LocalEngine(base, source, **{"slots": ADAPTERS, "cache_mib": 64, "prefix_mib": 1, **sizes})
    for position, stream in play(engine, requests, random.Random(1)):
        check_same(stream.result()[0], alone[position])
    engine.close()


def test_cancellations_change_no_other_answer(
    base: BaseModel, source: MemorySource, requests: list[Request], alone: list[Generation]
) -> None:
    chooser = random.Random(2)
    engine = LocalEngine(base, source, slots=4, cache_mib=64, prefix_mib=1)
    ends = {"aborted": 0, "stop": 0, "length": 0}
    order = list(range(len(requests)))
    chooser.shuffle(order)
    running: list[tuple[int, Stream]] = []
    while order or running:
        for _ in range(min(len(order), chooser.randint(1, 20))):
            position = order.pop()
            running.append((position, engine.submit(requests[position])))
        for _ in range(chooser.randint(1, 6)):  # end some, wherever they are; wait for others
            position, stream = running.pop(chooser.randrange(len(running)))
            if chooser.random() < 0.5:
                stream.abort()
            generation = stream.result()[0]
            ends[generation.finish_reason] += 1
            if generation.finish_reason != "aborted":
                check_same(generation, alone[position])
            if not running:
                break
    assert ends["aborted"] > 10
    assert ends["stop"] + ends["length"] > 10
    engine.close()
