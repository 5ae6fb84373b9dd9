"""A request's events by a listener: all of them, in order, one at a time, whoever makes them."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from loraretriever.engine.local import LocalEngine
from loraretriever.engine.stream import Stream, Unheard
from loraretriever.errors import EngineError
from loraretriever.models import BaseModel
from loraretriever.pool import Pool
from loraretriever.types import Composition, Generation, Piece, Request, Sampling

WAIT = 60.0  # seconds; only a test that fails waits so long
LONG = Sampling(max_tokens=200, ignore_end=True)
ADAPTER = Composition("selection", ("a1",), (1.0,))


class Listener:
    """Keeps the events, and whether its calls overlapped."""

    def __init__(self, answers: int = 1) -> None:
        self.events: list[Piece | Generation | Exception] = []
        self.ended = threading.Event()
        self.threads: set[str] = set()
        self.overlapped = False
        self._inside = False
        self._answers = answers

    def __call__(self, event: Piece | Generation | Exception) -> None:
        self.overlapped |= self._inside
        self._inside = True
        self.threads.add(threading.current_thread().name)
        self.events.append(event)
        self._inside = False
        if isinstance(event, Exception) or len(self.generations) == self._answers:
            self.ended.set()

    @property
    def generations(self) -> list[Generation]:
        return [event for event in self.events if isinstance(event, Generation)]

    def text(self, index: int = 0) -> str:
        return "".join(e.text for e in self.events if isinstance(e, Piece) and e.index == index)


def make_stream(answers: int = 1) -> tuple[Stream, Unheard, list[str]]:
    unheard, aborts = Unheard(), list[str]()
    return Stream(answers, lambda: aborts.append("aborted"), unheard), unheard, aborts


def generation(index: int = 0) -> Generation:
    return Generation("text", "stop", 1, 1, 0.1, index)


def test_a_listener_gets_what_was_and_what_comes() -> None:
    stream, unheard, _ = make_stream()
    stream.piece(Piece("a"))
    listener = Listener()
    stream.listen(listener)
    assert listener.events == [Piece("a")]
    stream.piece(Piece("b"))
    stream.finish(generation())
    assert listener.events == [Piece("a")]  # the engine may hold its lock
    unheard.deliver()
    assert listener.events == [Piece("a"), Piece("b"), generation()]
    assert not stream._events.qsize()


def test_a_listener_that_comes_late_gets_all_at_once() -> None:
    stream, _, _ = make_stream()
    error = EngineError("failed")
    stream.piece(Piece("a"))
    stream.fail(error)
    listener = Listener()
    stream.listen(listener)
    assert listener.events == [Piece("a"), error]


def test_with_a_listener_nobody_else_reads() -> None:
    stream, _, _ = make_stream()
    stream.listen(Listener())
    for read in (stream.result, lambda: next(iter(stream)), lambda: stream.listen(Listener())):
        with pytest.raises(RuntimeError, match="go to a listener"):
            read()


def test_a_listener_that_raises_is_logged_and_not_called_again(caplog: pytest.LogCaptureFixture) -> None:
    stream, unheard, aborts = make_stream()
    calls: list[Any] = []

    def broken(event: Any) -> None:
        calls.append(event)
        raise ValueError("the loop is closed")

    stream.piece(Piece("a"))
    stream.piece(Piece("b"))
    stream.listen(broken)
    stream.finish(generation())
    unheard.deliver()
    assert calls == [Piece("a")] and aborts == ["aborted"]
    assert "the loop is closed" in caplog.text and len(caplog.records) == 1


def test_events_of_many_threads_come_once_and_one_at_a_time() -> None:
    stream, unheard, _ = make_stream()
    listener = Listener()
    makers, each = 4, 300
    barrier = threading.Barrier(makers + 1)

    def make(first: int) -> None:
        barrier.wait(WAIT)
        for number in range(each):
            stream.piece(Piece(str(number), index=first))
            unheard.deliver()

    threads = [threading.Thread(target=make, args=(i,)) for i in range(makers)]
    for thread in threads:
        thread.start()
    barrier.wait(WAIT)
    stream.listen(listener)
    for thread in threads:
        thread.join(WAIT)
    assert not listener.overlapped and len(listener.events) == makers * each
    for maker in range(makers):
        numbers = [e.text for e in listener.events if isinstance(e, Piece) and e.index == maker]
        assert numbers == [str(number) for number in range(each)]


@pytest.fixture
def engine(base: BaseModel, pool: Pool) -> Any:
    engine = LocalEngine(base, pool, cache_mib=8, prefix_mib=1)
    yield engine
    engine.close()


def test_what_a_listener_hears_of_the_engine(engine: LocalEngine) -> None:
    sampling = Sampling(max_tokens=30, temperature=1.0, seed=3, n=3)
    request = Request("tell me", ADAPTER, sampling)
    listener = Listener(3)
    engine.submit(request).listen(listener)
    assert listener.ended.wait(WAIT)
    for expected in engine.submit(request).result():
        index = expected.index
        (heard,) = (each for each in listener.generations if each.index == index)
        assert heard.text == listener.text(index) == expected.text
        last = max(i for i, e in enumerate(listener.events) if isinstance(e, Piece) and e.index == index)
        piece = listener.events[last]
        assert isinstance(piece, Piece) and piece.finish_reason == heard.finish_reason
        assert listener.events[last + 1] == heard
    assert not listener.overlapped


def test_a_listener_may_abort_and_is_told_without_the_lock(engine: LocalEngine) -> None:
    listener = Listener()
    free: list[bool] = []

    def probe() -> None:
        got = engine._lock.acquire(timeout=WAIT)
        free.append(got)
        if got:
            engine._lock.release()

    def abort_first(event: Piece | Generation | Exception) -> None:
        if not listener.events:
            thread = threading.Thread(target=probe)  # the lock is the same thread's to take again
            thread.start()
            thread.join(WAIT)
            stream.abort()
        listener(event)

    stream = engine.submit(Request("tell me", sampling=LONG))
    stream.listen(abort_first)
    assert listener.ended.wait(WAIT)
    assert free == [True]
    assert [each.finish_reason for each in listener.generations] == ["aborted"]
    assert listener.text() == listener.generations[0].text


def test_a_broken_listener_hurts_only_its_own_request(engine: LocalEngine, caplog: pytest.LogCaptureFixture) -> None:
    def broken(event: Any) -> None:
        raise ValueError("broken")

    beside = engine.submit(Request("fine", sampling=Sampling(max_tokens=40, ignore_end=True)))
    engine.submit(Request("tell me", sampling=LONG)).listen(broken)
    assert beside.result()[0].completion_tokens == 40
    assert engine.stats().running == 0  # it was aborted
    assert engine.stats().generated_tokens < 50
    assert caplog.text.count("ValueError: broken") == 1


def test_the_listener_of_an_aborted_or_closed_request_hears_of_it(base: BaseModel, pool: Pool) -> None:
    engine = LocalEngine(base, pool, cache_mib=8)
    listeners = [Listener(), Listener()]
    streams = [engine.submit(Request(f"{i}", ADAPTER, LONG)) for i in range(2)]
    for stream, listener in zip(streams, listeners, strict=True):
        stream.listen(listener)
    streams[0].abort()
    assert listeners[0].ended.is_set()
    engine.close()
    assert [listener.generations[0].finish_reason for listener in listeners] == ["aborted", "aborted"]
    assert not any(listener.overlapped for listener in listeners)
