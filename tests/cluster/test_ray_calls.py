"""A request on its way to replicas that die, are full, or say nothing; no cluster runs here."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from ray.exceptions import ActorDiedError, RayTaskError
from ray.serve.exceptions import BackPressureError

from loraretriever.cluster import call as calls
from loraretriever.cluster.affinity import affinity_key
from loraretriever.cluster.call import Call
from loraretriever.cluster.figures import ReplicaFigures
from loraretriever.compose import compose_explicit
from loraretriever.engine.stream import Event, Unheard
from loraretriever.errors import AdmissionError, EngineError, InvalidInputError, LoraRetrieverError, OverloadedError
from loraretriever.types import EngineStats, Generation, Piece, Request, Sampling

WAIT = 30.0
HELLO = [
    Piece("hel"),
    Piece("lo", finish_reason="stop"),
    Generation("hello", "stop", 3, 2, 0.5, first_token_seconds=0.1),
]
ACCEPTED: list[Event] = []
Step = list[Event] | Exception | None  # events, an error of Ray, or silence


class ScriptedAnswers:
    """What a replica sends, step by step."""

    def __init__(self, script: Sequence[Step]) -> None:
        self._script = list(script)
        self.cancelled = False
        self._failed: Step = None

    async def __anext__(self) -> list[Event]:
        step = self._script.pop(0)
        if step is None:
            await asyncio.Event().wait()
        if isinstance(step, Exception):
            self._failed = step
            raise step
        assert step is not None
        return step

    def cancel(self) -> None:
        self.cancelled = True
        if isinstance(self._failed, Exception):  # as Ray's own do
            raise self._failed


class ScriptedHandle:
    """Stands for a deployment: each request gets the next script."""

    def __init__(self, *scripts: Sequence[Step]) -> None:
        self._scripts = list(scripts)
        self.models: list[str] = []
        self.sent: list[tuple[Request, float | None, str]] = []
        self.answers: list[ScriptedAnswers] = []

    def options(self, *, multiplexed_model_id: str) -> ScriptedHandle:
        self.models.append(multiplexed_model_id)
        return self

    def remote(self, request: Request, expires: float | None, affinity: str) -> ScriptedAnswers:
        self.sent.append((request, expires, affinity))
        self.answers.append(ScriptedAnswers(self._scripts.pop(0)))
        return self.answers[-1]


@pytest.fixture
def loop(monkeypatch: pytest.MonkeyPatch) -> Iterator[asyncio.AbstractEventLoop]:
    """An event loop that runs in a thread."""
    monkeypatch.setattr(calls, "_PAUSE", 0.001)
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    yield loop
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


def died() -> Exception:
    return ActorDiedError()


def called(loop: asyncio.AbstractEventLoop, handle: Any, affinity: str = "", **options: Any) -> Call:
    call = Call(Request("hi", **options), affinity, handle, loop, Unheard())
    loop.call_soon_threadsafe(call.start)
    return call


def test_events_come_as_the_replica_sent_them(loop: asyncio.AbstractEventLoop) -> None:
    handle = ScriptedHandle([ACCEPTED, HELLO[:1], HELLO[1:]])
    call = called(loop, handle, "sql@1")
    assert [piece.text for piece in call.stream] == ["hel", "lo"]
    (generation,) = call.stream.result()
    assert (generation.text, generation.finish_reason) == ("hello", "stop")
    assert generation.seconds >= 0.5 and generation.first_token_seconds is not None
    assert handle.models == ["sql@1"]
    assert not handle.answers[0].cancelled


@pytest.mark.parametrize(
    "first", [[died()], [ACCEPTED, died()], [[OverloadedError("full")]]], ids=["died", "later", "full"]
)
def test_a_request_that_has_not_begun_goes_to_another_replica(
    loop: asyncio.AbstractEventLoop, first: list[Step]
) -> None:
    handle = ScriptedHandle(first, [ACCEPTED, HELLO])
    (generation,) = called(loop, handle, "sql@1").stream.result()
    assert generation.text == "hello"
    assert handle.models == ["sql@1", ""], "any other replica, for its own has failed it"


@pytest.mark.parametrize("error", [died(), OverloadedError("full")])
def test_after_some_attempts_it_fails(loop: asyncio.AbstractEventLoop, error: Exception) -> None:
    step: Step = [error] if isinstance(error, LoraRetrieverError) else error
    handle = ScriptedHandle(*[[step]] * 4)
    with pytest.raises(OverloadedError if isinstance(error, OverloadedError) else EngineError):
        called(loop, handle).stream.result()
    assert len(handle.sent) == 4


@pytest.mark.parametrize("last", [died(), [OverloadedError("stopping")]])
def test_an_answer_that_has_begun_ends_with_an_error(loop: asyncio.AbstractEventLoop, last: Step) -> None:
    handle = ScriptedHandle([ACCEPTED, HELLO[:1], last])
    stream = called(loop, handle).stream
    pieces = iter(stream)
    assert next(pieces).text == "hel"
    with pytest.raises(LoraRetrieverError):
        next(pieces)
    assert len(handle.sent) == 1, "no part of an answer comes twice"


def test_errors_of_the_engine_keep_class_and_message(loop: asyncio.AbstractEventLoop) -> None:
    for kind in (InvalidInputError, AdmissionError, EngineError):
        with pytest.raises(kind, match="no good") as caught:
            called(loop, ScriptedHandle([[kind("no good")]])).stream.result()
        assert type(caught.value) is kind


def test_errors_of_ray_become_ours(loop: asyncio.AbstractEventLoop) -> None:
    full = ScriptedHandle([BackPressureError(num_queued_requests=9, max_queued_requests=9)])
    with pytest.raises(OverloadedError, match="max_queued_requests=9.*Send it again"):
        called(loop, full).stream.result()
    broken = RayTaskError("answer", "a stack", ValueError("broken"))
    with pytest.raises(EngineError, match="broken"):
        called(loop, ScriptedHandle([broken])).stream.result()
    with pytest.raises(EngineError, match="TypeError"):
        called(loop, ScriptedHandle([TypeError("a mistake of ours")])).stream.result()


def test_aborted_wherever_it_is(loop: asyncio.AbstractEventLoop) -> None:
    for script in ([None], [ACCEPTED, None], [ACCEPTED, HELLO[:1], None]):
        handle = ScriptedHandle(script)
        call = called(loop, handle, sampling=Sampling(n=2))
        begun = len(script) == 3
        if begun:
            assert next(iter(call.stream)).text == "hel"
        call.abort()
        call.abort()
        results = call.stream.result()
        assert [each.finish_reason for each in results] == ["aborted", "aborted"]
        assert results[0].text == ("hel" if begun else "")
        assert all(answers.cancelled for answers in handle.answers)


def test_time_in_the_line_for_a_replica_counts(loop: asyncio.AbstractEventLoop) -> None:
    handle = ScriptedHandle([None])
    (generation,) = called(loop, handle, timeout=0.05).stream.result()
    assert (generation.finish_reason, generation.completion_tokens) == ("timeout", 0)
    assert handle.answers[0].cancelled


def key(strategy: str = "mixture", revision: str = "1", **weights: float) -> str:
    composition = compose_explicit(strategy, weights)
    return affinity_key(Request("", composition, digests=tuple(revision * 64 for _ in composition.adapters)))


def test_requests_of_the_heaviest_adapter_belong_together() -> None:
    assert affinity_key(Request("")) == ""
    assert key(sql=0.7, german=0.3) == key(math=0.1, sql=0.9) == key(sql=1)
    assert key(sql=0.3, german=0.7) == key(german=1)
    assert key(sql=1) != key(sql=1, revision="2")


def test_each_merge_is_an_adapter_of_its_own() -> None:
    merges = [
        key("ties", sql=0.5, german=0.5),
        key("ties", sql=0.50000001, german=0.49999999),
        key("svd", sql=0.5, german=0.5),
    ]
    assert len({*merges, key("ties", revision="2", sql=0.5, german=0.5)}) == 4


def figures(steps: int, running: int = 0) -> EngineStats:
    return EngineStats(running, 0, 8, 64, 4, 0, 512, 0, 0, steps=steps, batch_sizes=((1, steps), (2, 0)))


def test_figures_of_replicas_add_up_and_counters_never_fall() -> None:
    both = ReplicaFigures()
    assert both.total().steps == 0
    both.update({"a": figures(10, running=1), "b": figures(5, running=2)})
    total = both.total()
    assert (total.steps, total.running, total.slots) == (0, 3, 8), "counted before anybody looked"
    both.update({"a": figures(12, running=1), "b": figures(5)})
    both.update({"b": figures(6), "c": figures(4)})
    total = both.total()
    assert (total.steps, total.running, total.slots) == (2 + 1 + 4, 0, 8)
    assert dict(total.batch_sizes) == {1: 7, 2: 0}
