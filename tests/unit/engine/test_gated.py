"""Gated compositions through the whole engine, against a model with the plain formula in each of its modules."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from batch_helpers import ATTENTION
from gate_reference import Row, gated_model, make_router
from loraretriever.compose import compose_explicit
from loraretriever.compose.routers import write_router
from loraretriever.engine.local import LocalEngine
from loraretriever.errors import AdapterNotFoundError, InvalidInputError
from loraretriever.models import BaseModel
from loraretriever.pool import Pool
from loraretriever.types import (
    BASE_COMPOSITION,
    Composition,
    Gate,
    Generation,
    LoraPair,
    Merge,
    Mixer,
    Request,
    Sampling,
)
from tiny import tiny_llama
from tiny_text import tiny_tokenizer

EXPERTS = tuple(f"a{i}" for i in (4, 0, 2, 5, 1))  # a3 is none
GATED = ("arrow", "spectral", "ramole", "moe", "arrow;top_k=1", "moe;top_k=1", "spectral;top_k=2,temperature=0.2")


@pytest.fixture(scope="module")
def routers(base: BaseModel, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("routers")
    for kind, rank, experts in (("ramole", 3, ()), ("moe", len(EXPERTS), EXPERTS)):
        write_router(folder / kind, kind, make_router(base.model, kind, ATTENTION, rank), experts)
    return {kind: folder / kind for kind in ("ramole", "moe")}


@pytest.fixture(scope="module")
def engine(base: BaseModel, pool: Pool, routers: dict[str, Path]) -> Iterator[LocalEngine]:
    engine = LocalEngine(base, pool, routers=list(routers.values()), cache_mib=64)
    yield engine
    engine.close()


def gated(strategy: str, *names: str) -> Composition:
    weights = {name: (i + 1) / 10 for i, name in enumerate(names)}
    return compose_explicit(strategy, weights)


def make_requests(max_tokens: int = 6) -> list[Request]:
    compositions = [
        BASE_COMPOSITION,
        Composition("mixture", ("a0", "a2", "a5"), (0.5, 0.3, 0.2)),
        Composition("fusion", ("a3", "a4"), (0.5, 0.5), Mixer.PARAMETERS),
        *(gated(strategy, "a1", "a4", "a5", "a2") for strategy in GATED),
        *(gated(strategy, "a5", "a2") for strategy in ("arrow", "ramole")),
    ]
    return [
        Request("word " * (1 + 7 * i % 9) + str(i), composition, Sampling(max_tokens=max_tokens, logprobs=2))
        for i, composition in enumerate(compositions)
    ]


def run(engine: LocalEngine, requests: Sequence[Request]) -> list[Generation]:
    return [generation for _, generation in sorted(engine.run(requests), key=lambda each: each[0])]


def plain(pool: Pool, base: BaseModel, composition: Composition) -> Row:
    kind = composition.gate.kind if composition.gate else ""
    experts = EXPERTS if kind == "moe" else ()
    modules: dict[str, LoraPair] | None = None
    if kind in ("ramole", "moe"):
        modules = make_router(base.model, kind, ATTENTION, 3 if kind == "ramole" else len(EXPERTS))
    adapters = tuple(pool.weights(name) for name in composition.adapters)
    router = replace(adapters[0], modules=modules) if modules is not None else None
    return Row(adapters, composition.weights, composition.gate, router, experts)


def check_against_reference(engine: LocalEngine, base: BaseModel, pool: Pool, tolerance: float = 1e-3) -> None:
    """Each chosen token's log-probability, given those before it."""
    requests = make_requests()
    requests = [request for request in requests if request.composition.mixer is Mixer.OUTPUTS]
    # The engine's own hooks do not act here: outside of a step the model is the base model, and a deep copy of another.
    for request, generation in zip(requests, run(engine, requests), strict=True):
        prompt = engine._intake.tokenize(request)
        tokens = [choice.token for choice in generation.logprobs]
        assert len(tokens) == generation.completion_tokens > 0
        model = gated_model(tiny_llama(), plain(pool, base, request.composition))
        with torch.inference_mode():
            logits = model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
        expected = logits.log_softmax(-1)
        found = torch.tensor([choice.logprob for choice in generation.logprobs])
        wanted = expected[torch.arange(len(tokens)), tokens]
        torch.testing.assert_close(found, wanted, rtol=0, atol=tolerance, msg=lambda m, r=request: f"{r}: {m}")
        assert (expected.max(-1).values - wanted).max() < tolerance, "the engine takes the most likely token"


def test_answers_equal_the_formula(engine: LocalEngine, base: BaseModel, pool: Pool) -> None:
    check_against_reference(engine, base, pool)


def test_prompts_in_pieces_and_few_slots_change_nothing(base: BaseModel, pool: Pool, routers: dict[str, Path]) -> None:
    # Four adapters and a router are the most that one of the requests needs.
    engine = LocalEngine(
        base, pool, routers=list(routers.values()), slots=5, step_tokens=3, batch_size=4, prefix_mib=0, cache_mib=64
    )
    try:
        check_against_reference(engine, base, pool)
    finally:
        engine.close()


def test_gates_change_answers(engine: LocalEngine) -> None:
    prompt = Request("one two three", BASE_COMPOSITION, Sampling(max_tokens=12, logprobs=1))
    compositions = [gated(strategy, "a1", "a4", "a5", "a2") for strategy in ("mixture", *GATED)]
    answers = run(engine, [replace(prompt, composition=composition) for composition in compositions])
    for one, other in itertools.combinations(answers, 2):
        gaps = [abs(a.logprob - b.logprob) for a, b in zip(one.logprobs, other.logprobs, strict=False)]
        assert one.text != other.text or max(gaps) > 1e-3


def test_a_gate_alone_is_the_adapter_itself(engine: LocalEngine) -> None:
    def answer(composition: Composition) -> str:
        return run(engine, [Request("hello", composition, Sampling(max_tokens=12))])[0].text

    alone = answer(Composition("selection", ("a5",), (1.0,)))
    assert answer(compose_explicit("arrow", {"a5": 0.4})) == alone
    for kind in ("arrow", "spectral", "ramole", "moe"):
        assert answer(Composition(kind, ("a5",), (0.4,), gate=Gate(kind))) == alone


def test_prefixes_are_those_of_the_same_gate_and_router(base: BaseModel, pool: Pool, routers: dict[str, Path]) -> None:
    engine = LocalEngine(base, pool, routers=list(routers.values()), cache_mib=64)
    text = "the same long beginning of all prompts " * 4

    def cached(composition: Composition) -> int:
        return run(engine, [Request(text, composition, Sampling(max_tokens=1))])[0].cached_tokens

    compositions = [gated(strategy, "a1", "a4", "a5") for strategy in ("mixture", *GATED)]
    compositions.append(Composition("arrow", ("a1", "a4", "a5"), (0.1, 0.2, 0.3), gate=Gate("arrow", 3, 0.7)))
    assert [cached(composition) for composition in compositions] == [0] * len(compositions)
    assert all(cached(composition) > 0 for composition in compositions)
    engine.close()


def test_merges_are_as_they_were(engine: LocalEngine) -> None:
    merged = Composition("svd", ("a0", "a1"), (0.5, 0.5), merge=Merge("svd"))
    assert engine._adapters.route(merged).gate is None


def test_an_adapter_and_its_forms_are_told_apart(engine: LocalEngine) -> None:
    names = ("a0", "a1")
    routes = [
        engine._adapters.route(Composition("x", names, (0.5, 0.5), gate=gate))
        for gate in (None, Gate("arrow"), Gate("spectral"), Gate("ramole"))
    ]
    refs = [set(route.adapters) for route in routes]
    assert not refs[0] & refs[1] and not refs[1] & refs[2] and refs[0] == refs[3]
    assert len(routes[3].refs) == 3 and len({ref.digest for route in routes for ref in route.refs}) == 7


def test_what_cannot_be_routed_is_refused_with_the_remedy(
    base: BaseModel, pool: Pool, routers: dict[str, Path]
) -> None:
    engine = LocalEngine(base, pool, routers=[routers["moe"]], cache_mib=8)

    def refused(composition: Composition, problem: str) -> None:
        with pytest.raises(InvalidInputError, match=problem):
            engine.submit(Request("hello", composition))

    refused(gated("moe", "a1", "a3"), "'a3' is no expert of the router 'moe'; expected one of a4, a0, a2, a5, a1")
    refused(gated("ramole", "a1", "a4"), "needs a trained router of that kind, and this engine has moe; train one with")
    refused(gated("arrow;top_k=0", "a1", "a4"), "top_k is 0")
    refused(compose_explicit("arrow", {"a1": 1.5, "a2": -0.5}), "gate arrow has the weight -0.5")
    refused(Composition("x", ("a1", "a2"), (0.5, 0.5), gate=Gate("x")), "unknown gate 'x'")
    with pytest.raises(AdapterNotFoundError):
        engine.submit(Request("hello", gated("arrow", "a1", "nobody")))
    engine.close()
    engine = LocalEngine(base, pool, slots=2, routers=[routers["moe"]], cache_mib=8)
    refused(gated("moe", "a1", "a2"), "3")  # two adapters and the router need three slots
    engine.close()


def test_routers_of_one_kind_are_refused(base: BaseModel, pool: Pool, routers: dict[str, Path], tmp_path: Path) -> None:
    write_router(tmp_path / "second", "moe", make_router(base.model, "moe", ("q_proj",), 1), ["a1"])
    with pytest.raises(InvalidInputError, match="both of the kind moe"):
        LocalEngine(base, pool, routers=[routers["moe"], tmp_path / "second"], cache_mib=8)
    with pytest.raises(InvalidInputError, match=r"no router\.json"):
        LocalEngine(base, pool, routers=[tmp_path], cache_mib=8)


def test_a_router_of_another_model_is_refused_when_it_is_used(base: BaseModel, pool: Pool, tmp_path: Path) -> None:
    modules = {"model.layers.0.self_attn.q_proj": LoraPair(torch.ones(2, 7), torch.ones(9, 2), 1.0)}
    write_router(tmp_path / "foreign", "ramole", modules)
    engine = LocalEngine(base, pool, routers=[tmp_path / "foreign"], cache_mib=8)
    with pytest.raises(InvalidInputError, match="'router foreign'.*trained for this base model"):
        run(engine, [Request("hello", gated("ramole", "a1", "a2"))])
    assert run(engine, [Request("hello", gated("arrow", "a1", "a2"), Sampling(max_tokens=2))])
    engine.close()


def test_bfloat16_is_near_float32(base: BaseModel, pool: Pool, routers: dict[str, Path]) -> None:
    halved = BaseModel(base.name, tiny_llama().to(torch.bfloat16), tiny_tokenizer())
    requests = make_requests(max_tokens=1)
    outcomes = []
    for each in (base, halved):
        engine = LocalEngine(each, pool, routers=list(routers.values()), cache_mib=64)
        outcomes.append([generation.logprobs[0].logprob for generation in run(engine, requests)])
        engine.close()
    assert max(abs(a - b) for a, b in zip(*outcomes, strict=True)) < 0.2
