"""Waiting requests are answered by the adapters of their submission; what the engine has done is counted."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from loraretriever.engine.local import LocalEngine
from loraretriever.errors import AdapterNotFoundError
from loraretriever.models import BaseModel
from loraretriever.pool import Pool
from loraretriever.types import Adapter, AdapterWeights, Composition, EngineStats, Request, Sampling
from tiny import TINY_BASE, TINY_SPEC, lora_tensors, write_peft_folder

WAIT = 60.0  # seconds; only a test that fails waits so long
ASK = Sampling(max_tokens=8, ignore_end=True)
LONG = Sampling(max_tokens=400, ignore_end=True)


class Gated:
    """A pool whose weights are read only while `gate` is open, and not at all once they are `gone`."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self.gate = threading.Event()
        self.begun = threading.Event()
        self.gone = False
        self.reads = 0

    def get(self, name: str) -> Adapter:
        return self._pool.get(name)

    def weights(self, name: str, digest: str | None = None) -> AdapterWeights:
        self.begun.set()
        assert self.gate.wait(WAIT)
        if self.gone:
            raise AdapterNotFoundError(f"{name} is gone")
        self.reads += 1
        return self._pool.weights(name, digest)


def selection(name: str) -> Composition:
    return Composition("selection", (name,), (1.0,))


def source(folder: Path, seed: int) -> Path:
    tensors = {key: 8 * value for key, value in lora_tensors(seed=seed).items()}
    return write_peft_folder(folder / f"source{seed}", tensors=tensors)


@pytest.fixture
def changing(tmp_path: Path) -> Iterator[Pool]:
    """A pool that a test may change, with the adapters "a" and "b"."""
    with Pool.create(tmp_path / "pool", TINY_BASE, spec=TINY_SPEC) as pool:
        pool.add(source(tmp_path, 0), name="a", samples=["one"])
        pool.add(source(tmp_path, 1), name="b", samples=["two"])
        yield pool


@pytest.mark.parametrize("change", ["removed", "revised"])
def test_a_pool_that_changes_between_submission_and_load(
    base: BaseModel, changing: Pool, tmp_path: Path, change: str
) -> None:
    request = Request("tell me", selection("a"), ASK)
    engine = LocalEngine(base, changing, cache_mib=8)
    expected = engine.submit(request).result()[0].text
    engine.close()

    gated = Gated(changing)
    engine = LocalEngine(base, gated, cache_mib=8)
    stream = engine.submit(request)
    assert gated.begun.wait(WAIT)
    with Pool.open(tmp_path / "pool") as other:  # as another process would
        if change == "removed":
            other.remove("a")
        else:
            other.add(source(tmp_path, 2), name="a", samples=["one"])
    gated.gate.set()
    assert stream.result()[0].text == expected
    if change == "removed":
        with pytest.raises(AdapterNotFoundError):
            engine.submit(request)
    else:
        assert engine.submit(request).result()[0].text != expected
    engine.close()


def test_waiting_requests_do_not_need_the_pool_any_more(base: BaseModel, pool: Pool) -> None:
    """With one slot and one row, all but the first load early."""
    gated = Gated(pool)
    gated.gate.set()
    engine = LocalEngine(base, gated, cache_mib=8, batch_size=1, slots=1)
    first = engine.submit(Request("first", selection("a0"), LONG))
    streams = [engine.submit(Request("x", selection(f"a{i}"), ASK)) for i in range(1, 6)]
    loaded = threading.Event()
    ready = engine._adapters.store._on_ready
    assert ready is not None

    def on_ready() -> None:
        ready()
        if gated.reads == 6:
            loaded.set()

    engine._adapters.store._on_ready = on_ready
    on_ready()
    assert loaded.wait(WAIT)
    gated.gone = True
    assert all(stream.result()[0].completion_tokens == 8 for stream in streams)
    assert first.result()[0].completion_tokens == 400
    engine.close()


def test_an_adapter_that_is_gone_fails_those_who_need_it(base: BaseModel, pool: Pool) -> None:
    gated = Gated(pool)
    gated.gone = True
    gated.gate.set()
    engine = LocalEngine(base, gated, cache_mib=8)
    stream = engine.submit(Request("x", selection("a0"), ASK))
    with pytest.raises(AdapterNotFoundError, match="a0 is gone"):
        stream.result()
    gated.gone = False
    assert engine.submit(Request("x", selection("a0"), ASK)).result()
    engine.close()


def test_an_error_that_nobody_waits_for_is_forgotten(base: BaseModel, pool: Pool) -> None:
    gated = Gated(pool)
    engine = LocalEngine(base, gated, cache_mib=8)
    stream = engine.submit(Request("x", selection("a0"), ASK))
    assert gated.begun.wait(WAIT)
    stream.abort()
    failed = threading.Event()
    engine._adapters.store._on_ready = failed.set
    gated.gone = True
    gated.gate.set()
    assert failed.wait(WAIT)
    gated.gone = False
    assert engine.submit(Request("x", selection("a0"), ASK)).result()[0].completion_tokens == 8
    engine.close()


def test_what_has_been_done_is_counted(base: BaseModel, pool: Pool) -> None:
    engine = LocalEngine(base, pool, cache_mib=8, prefix_mib=1, batch_size=4, queue=50, slots=2)
    before = engine.stats()
    assert before == EngineStats(
        running=0, waiting=0, batch_size=4, queue=50, slots=2, slots_used=0, host_bytes=0, cache_tokens_used=0,
        cache_tokens=engine._runner.table.tokens, batch_sizes=tuple((1 << i, 0) for i in range(9)),
    )  # fmt: skip
    prompts = ["a beginning of more than sixteen tokens"] * 3 + ["x"]
    results = [each for _, each in engine.run([Request(each, selection("a1"), ASK) for each in prompts])]
    stats = engine.stats()
    assert stats.prompt_tokens == sum(each.prompt_tokens for each in results)
    assert stats.cached_tokens == sum(each.cached_tokens for each in results)
    assert stats.generated_tokens == sum(each.completion_tokens for each in results) == 32
    assert sum(count for _, count in stats.batch_sizes) == stats.steps > 0
    assert stats.step_sequences == 4 * stats.steps  # they began and ended together
    assert dict(stats.batch_sizes)[4] == stats.steps
    assert (stats.slots_used, stats.slot_loads, stats.adapter_loads, stats.adapter_hits) == (1, 1, 1, 0)
    assert stats.host_bytes > 0 and stats.running == stats.waiting == stats.cache_tokens_used == 0

    engine.submit(Request(prompts[0], selection("a1"), ASK)).result()
    after = engine.stats()
    assert (after.adapter_hits, after.slot_loads, after.adapter_loads) == (1, 1, 1)
    assert after.cached_tokens - stats.cached_tokens == 32
    assert dict(after.batch_sizes)[1] == after.steps - stats.steps
    engine.close()


def test_what_is_going_on_can_be_seen(base: BaseModel, pool: Pool) -> None:
    engine = LocalEngine(base, pool, cache_mib=8, batch_size=1)
    running = engine.submit(Request("first", sampling=LONG))
    next(iter(running))
    waiting = [engine.submit(Request(f"{i}", sampling=ASK)) for i in range(3)]
    stats = engine.stats()
    assert (stats.running, stats.waiting) == (1, 3) and stats.cache_tokens_used > 0
    running.abort()
    assert all(stream.result() for stream in waiting)
    engine.close()


def test_the_time_in_the_queue(base: BaseModel, pool: Pool) -> None:
    engine = LocalEngine(base, pool, cache_mib=8, batch_size=1)
    first = engine.submit(Request("first", sampling=LONG))
    second = engine.submit(Request("second", sampling=ASK))
    never = engine.submit(Request("never", sampling=ASK, timeout=0.0))
    one, two = first.result()[0], second.result()[0]
    assert one.queue_seconds is not None and one.first_token_seconds is not None
    assert two.queue_seconds is not None and two.first_token_seconds is not None
    assert 0 <= one.queue_seconds < one.first_token_seconds
    assert one.first_token_seconds < two.queue_seconds < two.first_token_seconds
    assert never.result()[0].queue_seconds is None
    engine.close()


def test_stats_need_no_lock(base: BaseModel, pool: Pool) -> None:
    engine = LocalEngine(base, pool, cache_mib=8)
    seen: list[Any] = []
    with engine._lock:
        thread = threading.Thread(target=lambda: seen.append(engine.stats()))
        thread.start()
        thread.join(WAIT)
        assert len(seen) == 1
    engine.close()
