from __future__ import annotations

import threading
from collections.abc import Sequence

import numpy as np
import pytest

from loraretriever.errors import InvalidInputError, LoraRetrieverError
from loraretriever.retrieve import caching
from loraretriever.retrieve.caching import CachingEncoder, QueueEncoder
from loraretriever.retrieve.encoder import Vectors


class ScriptedEncoder:
    """The vector of a text is its length; `bad` fails. While `gate` is closed, calls wait, after raising `entered`."""

    tag = "scripted"

    def __init__(self) -> None:
        self.calls: list[list[str]] = []
        self.gate, self.entered = threading.Event(), threading.Semaphore(0)
        self.gate.set()

    def encode(self, texts: Sequence[str]) -> Vectors:
        self.calls.append(list(texts))
        self.entered.release()
        assert self.gate.wait(30)
        if "bad" in texts:
            raise ValueError("bad text")
        return np.array([[len(text), 1] for text in texts], dtype=np.float32).reshape(-1, 2)


def lengths(vectors: Vectors) -> list[float]:
    return vectors[:, 0].tolist()


def test_the_cache_encodes_each_text_once() -> None:
    inner = ScriptedEncoder()
    encoder = CachingEncoder(inner)
    assert encoder.tag == "scripted"
    assert lengths(encoder.encode(["a", "bb", "a"])) == [1, 2, 1]
    assert lengths(encoder.encode(["ccc", "bb", "\ud800", "ccc"])) == [3, 2, 1, 3]
    assert lengths(encoder.encode(["a"])) == [1]
    assert inner.calls == [["a", "bb"], ["ccc", "\ud800"]]
    assert encoder.encode([]).shape == (0, 2)


def test_the_cache_forgets_what_was_not_used_longest() -> None:
    inner = ScriptedEncoder()
    encoder = CachingEncoder(inner, size=2)
    for texts in (["a"], ["b"], ["a"], ["c"]):
        encoder.encode(texts)
    encoder.encode(["a", "b"])
    assert inner.calls == [["a"], ["b"], ["c"], ["b"]]
    assert lengths(encoder.encode(["1", "22", "333"])) == [1, 2, 3]  # more than it holds


def test_the_caller_may_change_what_the_cache_returned() -> None:
    encoder = CachingEncoder(ScriptedEncoder())
    for _ in range(3):
        vectors = encoder.encode(["aa"])
        assert lengths(vectors) == [2]
        vectors[:] = -1


def test_many_threads_share_a_cache() -> None:
    encoder = CachingEncoder(ScriptedEncoder(), size=5)
    wrong: list[object] = []

    def work(seed: int) -> None:
        chooser = np.random.default_rng(seed)
        for _ in range(100):
            texts = ["x" * n for n in chooser.integers(0, 20, size=4)]
            if lengths(encoder.encode(texts)) != [len(text) for text in texts]:
                wrong.append(texts)

    run_all([threading.Thread(target=work, args=(seed,)) for seed in range(4)])
    assert not wrong


class Caller(threading.Thread):
    """Encodes in a thread and keeps what came of it."""

    def __init__(self, encoder: QueueEncoder, *texts: str) -> None:
        super().__init__(daemon=True)
        self.encoder, self.texts = encoder, texts
        self.result: list[float] | None = None
        self.error: Exception | None = None

    def run(self) -> None:
        try:
            self.result = lengths(self.encoder.encode(self.texts))
        except Exception as error:
            self.error = error


def run_all(threads: Sequence[threading.Thread]) -> None:
    for thread in threads:
        thread.start()
    join_all(threads)


def join_all(threads: Sequence[threading.Thread]) -> None:
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()


def gather(encoder: QueueEncoder, inner: ScriptedEncoder, callers: Sequence[Caller]) -> Caller:
    """Let the callers queue up, in order, behind one call that is being encoded."""
    inner.gate.clear()
    first = Caller(encoder, "first")
    first.start()
    assert inner.entered.acquire(timeout=30)
    for count, caller in enumerate(callers, 1):
        caller.start()
        while len(encoder._waiting) < count:
            threading.Event().wait(0.001)
    return first


def test_calls_that_wait_are_encoded_together_in_their_order() -> None:
    inner = ScriptedEncoder()
    encoder = QueueEncoder(inner, max_batch=4)
    callers = [Caller(encoder, "x" * n) for n in range(6)] + [Caller(encoder, *("many", "texts", "in", "one", "call"))]
    first = gather(encoder, inner, callers)
    inner.gate.set()
    join_all([first, *callers])
    assert inner.calls == [
        ["first"],
        ["", "x", "xx", "xxx"],
        ["x" * 4, "x" * 5],
        ["many", "texts", "in", "one", "call"],
    ]
    assert [caller.result for caller in callers] == [[0], [1], [2], [3], [4], [5], [4, 5, 2, 3, 4]]
    assert encoder.tag == "scripted"


def test_an_error_reaches_the_call_that_caused_it() -> None:
    inner = ScriptedEncoder()
    encoder = QueueEncoder(inner)
    callers = [Caller(encoder, "a"), Caller(encoder, "b", "bad"), Caller(encoder, "ccc")]
    first = gather(encoder, inner, callers)
    inner.gate.set()
    join_all([first, *callers])
    assert [caller.result for caller in callers] == [[1], None, [3]]
    assert isinstance(callers[1].error, ValueError)
    assert lengths(encoder.encode(["after"])) == [5]


def test_closing_serves_those_who_wait_and_refuses_others() -> None:
    inner = ScriptedEncoder()
    encoder = QueueEncoder(inner)
    callers = [Caller(encoder, "a"), Caller(encoder, "bb")]
    first = gather(encoder, inner, callers)
    closing = threading.Thread(target=encoder.close, daemon=True)
    closing.start()
    while not encoder._closed:
        threading.Event().wait(0.001)
    with pytest.raises(LoraRetrieverError, match="closed"):
        encoder.encode(["late"])
    assert closing.is_alive()
    inner.gate.set()
    join_all([first, *callers, closing])
    assert [caller.result for caller in callers] == [[1], [2]]


def test_an_interrupted_leader_leaves_the_queue_usable() -> None:
    class Interrupted(ScriptedEncoder):
        def encode(self, texts: Sequence[str]) -> Vectors:
            if "stop" in texts:
                raise KeyboardInterrupt
            return super().encode(texts)

    encoder = QueueEncoder(Interrupted())
    with pytest.raises(KeyboardInterrupt):
        encoder.encode(["stop"])
    assert lengths(encoder.encode(["go"])) == [2]
    encoder.close()


def test_many_threads_share_a_queue() -> None:
    encoder = QueueEncoder(ScriptedEncoder(), max_batch=3)
    callers = [Caller(encoder, *["x" * (n % 7)] * (n % 3)) for n in range(40)]
    run_all(callers)
    assert [caller.result for caller in callers] == [[n % 7] * (n % 3) for n in range(40)]


def test_who_has_encoded_gives_its_workers_back_before_anybody_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers that stay would outnumber the processors, and slow down the engine's thread."""
    inner = ScriptedEncoder()
    encoder = QueueEncoder(inner)
    released: list[tuple[int, bool]] = []
    monkeypatch.setattr(caching, "release_workers", lambda: released.append((threading.get_ident(), encoder._busy)))
    encoder.encode(["a"])
    with pytest.raises(ValueError, match="bad text"):
        encoder.encode(["bad"])
    assert released == [(threading.get_ident(), True)] * 2


def test_tokens_are_counted_by_the_encoder_or_else_words() -> None:
    class Counting(ScriptedEncoder):
        def count_tokens(self, texts: Sequence[str]) -> int:
            return 100 * len(texts)

    for wrap in (CachingEncoder, QueueEncoder):
        assert wrap(Counting()).count_tokens(["a text", "b"]) == 200
        assert wrap(ScriptedEncoder()).count_tokens(["a text", "b"]) == 3


def test_sizes_must_be_positive() -> None:
    with pytest.raises(InvalidInputError, match="size is 0"):
        CachingEncoder(ScriptedEncoder(), size=0)
    with pytest.raises(InvalidInputError, match="max_batch is 0"):
        QueueEncoder(ScriptedEncoder(), max_batch=0)
