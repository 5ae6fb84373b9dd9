from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
import torch

from loraretriever.engine.local import LocalEngine
from loraretriever.errors import AdapterNotFoundError, InvalidInputError
from loraretriever.models import BaseModel, render_prompt
from loraretriever.pool import Pool
from loraretriever.types import BASE_COMPOSITION, Composition, Generation, Mixer, Request, Sampling

COMPOSITIONS = (
    BASE_COMPOSITION,
    Composition("selection", ("a1",), (1.0,)),
    Composition("mixture", ("a0", "a2", "a5"), (0.5, 0.3, 0.2)),
    Composition("fusion", ("a3", "a4"), (0.5, 0.5), Mixer.PARAMETERS),
    Composition("mixture", ("a4", "a5"), (0.9, 0.6)),
)


def make_requests(count: int = 13, max_tokens: int = 9) -> list[Request]:
    compositions = itertools.cycle(COMPOSITIONS)
    return [
        Request("word " * (1 + 5 * i % 7) + str(i), next(compositions), Sampling(max_tokens=max_tokens - i % 4))
        for i in range(count)
    ]


def run(engine: LocalEngine, requests: Sequence[Request]) -> list[Generation]:
    results = list(engine.run(requests))
    assert sorted(position for position, _ in results) == list(range(len(requests)))
    return [generation for _, generation in sorted(results)]


def hf_greedy(base: BaseModel, request: Request) -> str:
    """The base model's answer by transformers' own generate."""
    ids = base.tokenizer(render_prompt(base.tokenizer, request.prompt), add_special_tokens=False, return_tensors="pt")
    output = base.model.generate(**ids, max_new_tokens=request.sampling.max_tokens, do_sample=False)
    return str(base.tokenizer.decode(output[0, ids.input_ids.shape[1] :], skip_special_tokens=True))


def test_base_rows_equal_transformers_generate(base: BaseModel, pool: Pool) -> None:
    requests = make_requests()
    results = run(LocalEngine(base, pool), requests)
    checked = [(r, g) for r, g in zip(requests, results, strict=True) if r.composition == BASE_COMPOSITION]
    assert len(checked) > 2
    for request, generation in checked:
        assert generation.text == hf_greedy(base, request)


@pytest.mark.parametrize(("slots", "batch_size"), [(32, 32), (3, 32), (3, 4), (6, 1)])
def test_each_answer_is_what_it_is_alone(base: BaseModel, pool: Pool, slots: int, batch_size: int) -> None:
    requests = make_requests()
    alone = [run(LocalEngine(base, pool), [request])[0] for request in requests]
    mixed = run(LocalEngine(base, pool, slots=slots, batch_size=batch_size), requests)
    assert [g.text for g in mixed] == [g.text for g in alone]
    assert [g.finish_reason for g in mixed] == [g.finish_reason for g in alone]
    assert [g.completion_tokens for g in mixed] == [g.completion_tokens for g in alone]
    assert len({generation.text for generation in alone}) > 8, "the adapters must make a difference"


def test_the_base_model_is_left_as_it_was(base: BaseModel, pool: Pool) -> None:
    request = Request("hello", COMPOSITIONS[2])
    engine = LocalEngine(base, pool)
    before = hf_greedy(base, request)
    run(engine, [request])
    assert hf_greedy(base, request) == before


def test_a_new_revision_shows_at_the_next_call(base: BaseModel, pool: Pool) -> None:
    engine = LocalEngine(base, pool)
    request = Request("hello", COMPOSITIONS[1])
    before = run(engine, [request])[0].text
    original = pool.get("a1")
    pool.add(pool.get("a5").folder, name="a1", samples=["sample 1"])
    changed = run(engine, [request])[0].text
    assert changed == run(engine, [Request("hello", Composition("selection", ("a5",), (1.0,)))])[0].text
    assert changed != before
    assert pool.get("a1").revision == original.revision + 1


def test_stop_strings_and_end_tokens(base: BaseModel, pool: Pool) -> None:
    engine = LocalEngine(base, pool)
    whole = run(engine, [Request("hello", sampling=Sampling(max_tokens=20))])[0]
    assert whole.finish_reason == "length" and whole.completion_tokens == 20
    stop = whole.text[7:10]
    cut = run(engine, [Request("hello", sampling=Sampling(max_tokens=20, stop=("never", stop)))])[0]
    assert cut.text == whole.text[: whole.text.index(stop)]
    assert cut.finish_reason == "stop"
    base.model.generation_config.eos_token_id = [2, base.tokenizer(whole.text[5]).input_ids[0]]
    try:
        ended = run(LocalEngine(base, pool), [Request("hello", sampling=Sampling(max_tokens=20))])[0]
    finally:
        base.model.generation_config.eos_token_id = 2
    assert ended.text == whole.text[: whole.text.index(whole.text[5])]
    assert ended.finish_reason == "stop"


def test_a_seeded_row_does_not_depend_on_its_neighbours(base: BaseModel, pool: Pool) -> None:
    engine = LocalEngine(base, pool)
    seeded = Request("hello", COMPOSITIONS[2], Sampling(max_tokens=12, temperature=1.3, top_p=0.95, seed=7))
    other = Request("hello there", sampling=Sampling(max_tokens=5, temperature=2.0))
    alone = run(engine, [seeded])[0].text
    assert run(engine, [other, seeded, other, other])[1].text == alone
    assert (
        run(engine, [Request("hello", COMPOSITIONS[2], Sampling(max_tokens=12, temperature=1.3, seed=8))])[0].text
        != alone
    )


def test_raw_and_chat_prompts(base: BaseModel, pool: Pool) -> None:
    raw, chat = run(LocalEngine(base, pool), [Request("abc", chat=False), Request("abc")])
    assert (raw.prompt_tokens, chat.prompt_tokens) == (3, 6)


@pytest.mark.parametrize(
    ("request_", "match"),
    [
        (Request("", chat=False), "prompt 2 is empty"),
        (Request("x" * 500, sampling=Sampling(max_tokens=20)), "takes 512 in all"),
        (
            Request("x", Composition("mixture", ("a0", "a1", "a2", "a3"), (1.0,) * 4)),
            "uses 4 adapters, but there are 3",
        ),
    ],
)
def test_bad_requests_run_nothing(base: BaseModel, pool: Pool, request_: Request, match: str) -> None:
    with pytest.raises(InvalidInputError, match=match):
        next(LocalEngine(base, pool, slots=3).run([Request("fine"), request_]))


def test_an_unknown_adapter(base: BaseModel, pool: Pool) -> None:
    with pytest.raises(AdapterNotFoundError, match="a9"):
        next(LocalEngine(base, pool).run([Request("fine", Composition("selection", ("a9",), (1.0,)))]))


def test_a_running_call_keeps_the_revisions_it_started_with(base: BaseModel, pool: Pool) -> None:
    requests = [
        Request(text, Composition("selection", (name,), (1.0,))) for text, name in (("x", "a2"), ("long x", "a3"))
    ]
    engine = LocalEngine(base, pool, batch_size=1)
    expected = run(engine, requests)
    stream = LocalEngine(base, pool, batch_size=1).run(requests)
    first = next(stream)
    pool.add(pool.get("a0").folder, name="a3", samples=["sample 3"])
    assert [first, *stream][1][1].text == expected[1].text
    assert run(engine, requests)[1].text != expected[1].text


def test_lone_surrogates_are_read_as_question_marks(base: BaseModel, pool: Pool) -> None:
    strange, plain = run(LocalEngine(base, pool), [Request("a \ud800 b"), Request("a ? b")])
    assert strange.text == plain.text


def test_no_requests(base: BaseModel, pool: Pool) -> None:
    assert run(LocalEngine(base, pool), []) == []


def test_no_gradients_are_kept(base: BaseModel, pool: Pool) -> None:
    run(LocalEngine(base, pool), make_requests(3))
    assert torch.is_grad_enabled()
    assert all(parameter.grad is None for parameter in base.model.parameters())
