"""The engine as a server sees it: streams, aborts, full queues, deadlines, n answers, prefixes, failing adapters."""

from __future__ import annotations

import gc
import math
import threading
import weakref
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from batch_helpers import Library
from loraretriever.compose import compose_explicit
from loraretriever.compose.merged import MergedStore
from loraretriever.engine.local import LocalEngine
from loraretriever.engine.pages import PageTable
from loraretriever.errors import EngineError, InvalidInputError, OverloadedError, PoolError
from loraretriever.models import BaseModel
from loraretriever.pool import Pool
from loraretriever.types import AdapterWeights, Composition, Generation, Request, Sampling

LONG = Sampling(max_tokens=200, ignore_end=True)
WAIT = 60  # seconds until a test that hangs fails


@pytest.fixture
def engine(base: BaseModel, pool: Pool) -> Iterator[LocalEngine]:
    engine = LocalEngine(base, pool, cache_mib=8, prefix_mib=1)
    yield engine
    engine.close()


def adapter(name: str) -> Composition:
    return Composition("selection", (name,), (1.0,))


def test_pieces_are_the_answer(engine: LocalEngine) -> None:
    stream = engine.submit(Request("tell me", adapter("a1"), Sampling(max_tokens=30, ignore_end=True)))
    pieces = list(stream)
    (generation,) = stream.result()
    assert len(pieces) > 2
    assert "".join(piece.text for piece in pieces) == generation.text
    assert [piece.finish_reason for piece in pieces[:-1]] == [None] * (len(pieces) - 1)
    assert pieces[-1].finish_reason == generation.finish_reason == "length"
    assert 0 < (generation.first_token_seconds or 0) <= generation.seconds


def test_a_stop_string_across_tokens_never_shows(engine: LocalEngine) -> None:
    whole = engine.submit(Request("tell me", sampling=Sampling(max_tokens=30))).result()[0].text
    stop = whole[11:14]
    assert whole.index(stop) > 0
    pieces = list(engine.submit(Request("tell me", sampling=Sampling(max_tokens=30, stop=(stop,)))))
    assert "".join(piece.text for piece in pieces) == whole[: whole.index(stop)]
    assert pieces[-1].finish_reason == "stop"


def test_n_answers_share_the_prompt_and_differ_by_seed(engine: LocalEngine) -> None:
    prompt = "a long prompt that takes several blocks of the prefix cache to hold"
    sampling = Sampling(max_tokens=12, temperature=1.0, seed=5, n=4)
    stream = engine.submit(Request(prompt, adapter("a2"), sampling))
    pieces = list(stream)
    answers = stream.result()
    assert [answer.index for answer in answers] == [0, 1, 2, 3]
    assert len({answer.text for answer in answers}) == 4
    assert answers[0].cached_tokens == 0
    assert all(answer.cached_tokens >= 48 for answer in answers[1:])
    for answer in answers:
        assert "".join(piece.text for piece in pieces if piece.index == answer.index) == answer.text
        seeded = Sampling(max_tokens=12, temperature=1.0, seed=5 + answer.index)
        assert engine.submit(Request(prompt, adapter("a2"), seeded)).result()[0].text == answer.text


def test_log_probabilities_are_those_of_the_model(engine: LocalEngine, base: BaseModel) -> None:
    request = Request("tell me", sampling=Sampling(max_tokens=6, logprobs=3), chat=False)
    stream = engine.submit(request)
    pieces = list(stream)
    (generation,) = stream.result()
    assert tuple(choice for piece in pieces for choice in piece.logprobs) == generation.logprobs
    ids = base.tokenizer("tell me").input_ids
    chosen = [choice.token for choice in generation.logprobs]
    with torch.inference_mode():
        logits = base.model(input_ids=torch.tensor([ids + chosen])).logits[0, len(ids) - 1 : -1]
    for row, choice in zip(logits.log_softmax(-1), generation.logprobs, strict=True):
        assert choice.logprob == pytest.approx(float(row[choice.token]), abs=1e-3)
        assert [each.token for each in choice.top] == row.topk(3).indices.tolist()
        assert choice.top[0].token == choice.token  # greedy


def test_an_abort_frees_everything_at_once(engine: LocalEngine) -> None:
    streams = [engine.submit(Request(f"prompt {i}", adapter(f"a{i}"), LONG)) for i in range(4)]
    for stream in streams:
        next(iter(stream))
    for stream in streams:
        stream.abort()
        stream.abort()
    assert [stream.result()[0].finish_reason for stream in streams] == ["aborted"] * 4
    assert engine._runner.table.used == 0
    assert not engine._steps.scheduler.pinned and not engine._steps.sequences
    assert engine.submit(Request("again", adapter("a1"), Sampling(max_tokens=3))).result()[0].finish_reason == "length"


def test_a_full_queue_says_so_and_run_waits(base: BaseModel, pool: Pool) -> None:
    engine = LocalEngine(base, pool, cache_mib=8, batch_size=1, queue=2)
    running = engine.submit(Request("first", sampling=LONG))
    next(iter(running))
    waiting = [engine.submit(Request(f"{i}", sampling=Sampling(max_tokens=2))) for i in range(2)]
    with pytest.raises(OverloadedError, match="2 of the queue's 2 places"):
        engine.submit(Request("too many", sampling=Sampling(max_tokens=2)))
    with pytest.raises(InvalidInputError, match="asks for 3 answers"):
        engine.submit(Request("never", sampling=Sampling(max_tokens=2, n=3)))
    many = list(engine.run([Request(f"{i}", sampling=Sampling(max_tokens=2)) for i in range(7)]))
    assert sorted(position for position, _ in many) == list(range(7))
    assert all(stream.result()[0].completion_tokens <= 2 for stream in [*waiting, running][:2])
    running.abort()
    engine.close()


def test_timeouts_end_with_what_there_is(base: BaseModel, pool: Pool) -> None:
    engine = LocalEngine(base, pool, cache_mib=8, batch_size=1)
    running = engine.submit(Request("first", sampling=LONG, timeout=1e-3))
    never = engine.submit(Request("second", sampling=LONG, timeout=0.0))
    assert running.result()[0].finish_reason == "timeout"
    (generation,) = never.result()
    assert (generation.finish_reason, generation.text, generation.first_token_seconds) == ("timeout", "", None)
    engine.close()


def test_the_urgent_go_first(base: BaseModel, pool: Pool) -> None:
    engine = LocalEngine(base, pool, cache_mib=8, batch_size=1)
    order: list[int] = []

    def note(priority: int, event: object) -> None:
        if isinstance(event, Generation):
            order.append(priority)

    with engine._lock:  # all are there before the first step
        streams = {
            priority: engine.submit(Request(f"{priority}", sampling=Sampling(max_tokens=1), priority=priority))
            for priority in (3, 1, 2, 0)
        }
    for priority, stream in streams.items():
        stream.listen(partial(note, priority))
    engine.submit(Request("last", sampling=Sampling(max_tokens=1), priority=4)).result()
    assert order == [0, 1, 2, 3]
    engine.close()


def test_prefixes_are_reused_for_the_same_composition_only(engine: LocalEngine) -> None:
    prompt = "you are a helpful assistant. " * 3
    ask = Sampling(max_tokens=4)
    first = engine.submit(Request(prompt + "one", adapter("a1"), ask)).result()[0]
    same = engine.submit(Request(prompt + "two", adapter("a1"), ask)).result()[0]
    other = engine.submit(Request(prompt + "two", adapter("a2"), ask)).result()[0]
    base = engine.submit(Request(prompt + "two", sampling=ask)).result()[0]
    assert (first.cached_tokens, other.cached_tokens, base.cached_tokens) == (0, 0, 0)
    assert same.cached_tokens == 80
    assert same.prompt_tokens > 80


def test_merged_adapters_are_made_once(base: BaseModel, pool: Pool, tmp_path: Path) -> None:
    made: list[str] = []

    class Counting:
        get = staticmethod(pool.get)

        @staticmethod
        def weights(name: str, digest: str | None = None) -> AdapterWeights:
            made.append(name)
            return pool.weights(name, digest)

    composition = compose_explicit("ties", {"a4": 0.6, "a5": 0.4})
    texts = []
    for _ in range(2):  # the second engine finds what the first has left on disk
        engine = LocalEngine(base, Counting(), cache_mib=8, merged=MergedStore(tmp_path / "merged", 1 << 24))
        requests = [Request(f"prompt {i % 2}", composition, Sampling(max_tokens=8)) for i in range(4)]
        texts.append([generation.text for _, generation in sorted(engine.run(requests), key=lambda each: each[0])])
        engine.close()
    assert sorted(made) == ["a4", "a5"]
    assert texts[0] == texts[1]
    plain = LocalEngine(base, pool, cache_mib=8)
    assert texts[0][0] != plain.submit(Request("prompt 0", sampling=Sampling(max_tokens=8))).result()[0].text
    plain.close()


def test_an_adapter_that_cannot_be_loaded_fails_its_own_requests(base: BaseModel, pool: Pool) -> None:
    class Broken:
        get = staticmethod(pool.get)

        @staticmethod
        def weights(name: str, digest: str | None = None) -> AdapterWeights:
            if name == "a1":
                raise PoolError("the disk is gone")
            return pool.weights(name, digest)

    engine = LocalEngine(base, Broken(), cache_mib=8)
    good = engine.submit(Request("fine", adapter("a2"), Sampling(max_tokens=20)))
    bad = engine.submit(Request("broken", Composition("mixture", ("a2", "a1"), (0.5, 0.5)), LONG))
    with pytest.raises(PoolError, match="the disk is gone"):
        bad.result()
    with pytest.raises(PoolError, match="the disk is gone"):
        bad.result()
    assert good.result()[0].completion_tokens > 0
    with pytest.raises(PoolError):
        list(engine.run([Request("broken", adapter("a1"))]))
    assert engine.submit(Request("fine", adapter("a3"), Sampling(max_tokens=2))).result()
    engine.close()


def test_a_failing_step_is_heard_of_and_the_engine_goes_on(
    engine: LocalEngine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(works: Any) -> Any:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(engine._runner, "step", fail)
        streams = [engine.submit(Request(f"{i}", adapter("a1"), LONG)) for i in range(2)]
        for stream in streams:
            with pytest.raises(EngineError, match="out of memory"):
                stream.result()
    assert "a step of the engine failed" in caplog.text
    assert engine._runner.table.used == 0
    assert engine.submit(Request("fine", adapter("a1"), Sampling(max_tokens=2))).result()


def test_a_prompt_with_tokens_that_the_model_lacks_is_refused(engine: LocalEngine, base: BaseModel) -> None:
    class Larger:
        chat_template = None

        def __call__(self, text: str, **options: Any) -> Any:
            return SimpleNamespace(input_ids=[5, 10_000])

    engine._intake.tokenizer = Larger()
    with pytest.raises(InvalidInputError, match="token 10000"):
        engine.submit(Request("x"))


def test_one_load_fails_all_that_need_it_and_is_tried_again_later(base: BaseModel, pool: Pool) -> None:
    loads: list[str] = []
    gate = threading.Event()

    class Broken:
        get = staticmethod(pool.get)

        @staticmethod
        def weights(name: str, digest: str | None = None) -> AdapterWeights:
            loads.append(name)
            gate.wait(WAIT)
            if len(loads) == 1:
                raise PoolError("not now")
            return pool.weights(name, digest)

    engine = LocalEngine(base, Broken(), cache_mib=8)
    streams = [engine.submit(Request(f"{i}", adapter("a1"), Sampling(max_tokens=2))) for i in range(8)]
    gate.set()
    for stream in streams:
        with pytest.raises(PoolError, match="not now"):
            stream.result()
    assert loads == ["a1"]
    assert engine.submit(Request("x", adapter("a1"), Sampling(max_tokens=2))).result()
    assert loads == ["a1", "a1"]
    engine.close()


def test_small_steps_with_an_adapter_on_the_output_embeddings(base: BaseModel) -> None:
    library = Library(base.model)
    ref = library.add(3, ("lm_head", "q_proj"))

    class Source:
        get = staticmethod(lambda name: SimpleNamespace(digest=ref.digest))
        weights = staticmethod(lambda name, digest=None: library.adapters[ref])

    requests = [
        Request("a prompt of some length " * (i % 3 + 1), adapter("x"), Sampling(max_tokens=5)) for i in range(6)
    ]
    texts = []
    for sizes in ({"batch_size": 1}, {"batch_size": 2, "step_tokens": 1}, {"batch_size": 4, "step_tokens": 2}):
        engine = LocalEngine(base, Source(), cache_mib=8, prefix_mib=0, **sizes)
        texts.append([generation.text for _, generation in sorted(engine.run(requests), key=lambda each: each[0])])
        engine.close()
    assert texts[0] == texts[1] == texts[2]


def test_a_sequence_larger_than_half_the_cache_runs_to_its_end(base: BaseModel, pool: Pool) -> None:
    engine = LocalEngine(base, pool, cache_mib=8)
    engine._runner.table = PageTable(256)
    whole = Sampling(max_tokens=180, ignore_end=True)
    small = [engine.submit(Request(f"{i}", sampling=Sampling(max_tokens=20, ignore_end=True))) for i in range(3)]
    large = engine.submit(Request("x" * 70, sampling=whole, chat=False))
    assert large.result()[0].completion_tokens == 180
    assert [stream.result()[0].completion_tokens for stream in small] == [20] * 3
    with pytest.raises(InvalidInputError, match="cache"):
        engine.submit(Request("x" * 80, sampling=whole, chat=False))
    engine.close()


def test_many_threads_submit_and_abort(engine: LocalEngine) -> None:
    expected = {
        i: engine.submit(Request(f"prompt {i}", adapter(f"a{i % 6}"), Sampling(max_tokens=6))).result()[0].text
        for i in range(12)
    }
    wrong: list[Any] = []

    def use(first: int) -> None:
        for turn in range(6):
            i = (first + turn) % 12
            stream = engine.submit(Request(f"prompt {i}", adapter(f"a{i % 6}"), Sampling(max_tokens=6)))
            if (first + turn) % 3 == 0:
                stream.abort()
            generation = stream.result()[0]
            if generation.finish_reason != "aborted" and generation.text != expected[i]:
                wrong.append((i, generation.text))

    threads = [threading.Thread(target=use, args=(first,)) for first in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT)
        assert not thread.is_alive()
    assert not wrong
    assert not engine._steps.sequences and not engine._steps.scheduler.running and not engine._steps.scheduler.waiting


def test_a_closed_engine(base: BaseModel, pool: Pool) -> None:
    engine = LocalEngine(base, pool, cache_mib=8)
    stream = engine.submit(Request("long", sampling=LONG))
    engine.close()
    engine.close()
    assert stream.result()[0].finish_reason == "aborted"
    with pytest.raises(OverloadedError, match="stopping"):
        engine.submit(Request("more"))
    with pytest.raises(OverloadedError, match="stopping"):
        list(engine.run([Request("more")]))


def test_closing_the_iterator_of_run_aborts_the_rest(engine: LocalEngine) -> None:
    results = engine.run([Request(f"{i}", sampling=Sampling(max_tokens=1 + 190 * i)) for i in range(2)])
    assert next(results)[0] == 0
    results.close()
    assert not engine._steps.sequences


def test_an_engine_that_nobody_holds_goes_away(base: BaseModel, pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loraretriever.engine.local._LINGER", 0.0)
    engine = LocalEngine(base, pool, cache_mib=8)
    assert engine.submit(Request("hello", adapter("a1"), Sampling(max_tokens=2))).result()
    thread = engine._thread
    if thread is not None:
        thread.join(WAIT)
    engine._layers.eject()  # the model of the other tests
    gone = weakref.ref(engine)
    del engine, thread
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"n": 0}, "n is 0"),
        ({"min_p": 1.5}, "min_p"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"presence_penalty": math.inf}, "presence_penalty"),
        ({"logit_bias": ((-1, 1.0),)}, "logit_bias"),
        ({"logprobs": 21}, "logprobs"),
    ],
)
def test_settings_out_of_range(values: dict[str, Any], match: str) -> None:
    with pytest.raises(InvalidInputError, match=match):
        Sampling(**values)


def test_requests_out_of_range(engine: LocalEngine) -> None:
    with pytest.raises(InvalidInputError, match="timeout"):
        Request("x", timeout=math.nan)
    with pytest.raises(InvalidInputError, match="priority"):
        Request("x", priority=10**6)
    with pytest.raises(InvalidInputError, match="logit_bias"):
        engine.submit(Request("x", sampling=Sampling(logit_bias=((5000, 1.0),))))
