"""A replica of the engine, called as Ray Serve calls it, and the ingress's door; no cluster runs here."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from loraretriever.cluster import ingress, replica
from loraretriever.cluster.replica import EngineReplica
from loraretriever.compose import compose_explicit
from loraretriever.config import ServerSettings, load_settings
from loraretriever.engine.stream import Event, Stream, Unheard
from loraretriever.errors import EngineEndedError, EngineError, InvalidInputError
from loraretriever.pool import Pool
from loraretriever.server.run import Plan
from loraretriever.types import Generation, Piece, Request, Sampling
from tiny import write_peft_folder
from unit.server.conftest import make_pool

Run = Callable[[Any], Any]
LONG = Sampling(max_tokens=400, ignore_end=True)


@pytest.fixture
def plan(tmp_path: Path, cluster_models: Path, monkeypatch: pytest.MonkeyPatch) -> Plan:
    """Of a tiny pool."""
    monkeypatch.setattr(replica.logs, "configure", lambda *_: None)
    monkeypatch.setattr(replica, "keep_freed_memory", lambda: None)
    monkeypatch.setattr(replica, "quiet_libraries", lambda: None)
    return Plan(str(make_pool(tmp_path, cluster_models)), load_settings(cache_mib=8, slots=4), ServerSettings())


@pytest.fixture
def engine(plan: Plan) -> Iterator[EngineReplica]:
    made = EngineReplica(plan, adapters=4)
    yield made
    made.__del__()
    del made._threads


async def collect(engine: EngineReplica, request: Request, expires: float | None = None) -> list[list[Event]]:
    return [events async for events in engine.answer(request, expires, "")]


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.01)


@pytest.fixture
def run() -> Iterator[Run]:
    """Runs coroutines on one event loop, as a replica does."""
    with asyncio.Runner() as runner:
        yield runner.run


def test_first_nothing_then_pieces_at_last_the_answers(run: Run, engine: EngineReplica) -> None:
    batches = run(collect(engine, Request("Add 3 and 4.", sampling=Sampling(max_tokens=5, n=2, ignore_end=True))))
    assert batches[0] == []
    events = [event for batch in batches for event in batch]
    answers = [event for event in events if isinstance(event, Generation)]
    assert sorted(answer.index for answer in answers) == [0, 1]
    for answer in answers:
        pieces = [event.text for event in events if isinstance(event, Piece) and event.index == answer.index]
        assert "".join(pieces) == answer.text


def test_what_an_ingress_asks_at_the_beginning(run: Run, engine: EngineReplica) -> None:
    assert run(engine.max_length()) == 512 and run(engine.reduces_to()) is None
    engine._engine = SimpleNamespace(reduces_to=8, close=engine._engine.close)
    assert run(engine.reduces_to()) == 8


def test_errors_are_events(run: Run, engine: EngineReplica) -> None:
    ((error,),) = run(collect(engine, Request("x" * 5000)))
    assert type(error) is InvalidInputError


def test_the_revision_is_the_one_that_was_looked_up(
    run: Run, engine: EngineReplica, plan: Plan, tmp_path: Path
) -> None:
    request = Request("Add 3 and 4.", compose_explicit("mixture", {"sql": 1.0}), Sampling(max_tokens=12))

    def text(*digests: str) -> str:
        last = run(collect(engine, Request(request.prompt, request.composition, request.sampling, digests=digests)))[-1]
        assert isinstance(last[-1], Generation)
        return last[-1].text

    with Pool.open(plan.pool) as pool:
        before = pool.get("sql").digest
        old = text()
        folder = write_peft_folder(tmp_path / "sql2", seed=77, base_model=pool.base_model)
        pool.add(folder, name="sql", samples=["Write a query."])
        after = pool.get("sql").digest
    assert text(after) == text() != old
    assert text(before) == old
    with pytest.raises(InvalidInputError, match="2 digests"):
        text(before, after)


def test_a_caller_that_cancels_frees_the_engine(run: Run, engine: EngineReplica) -> None:
    async def cancel() -> None:
        reading = asyncio.ensure_future(collect(engine, Request("Add 3 and 4.", sampling=LONG)))
        await until(lambda: engine._engine.stats().running > 0)
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading
        await until(lambda: engine._engine.stats().running == 0)

    before = engine._engine.stats().generated_tokens
    run(cancel())
    assert engine._engine.stats().generated_tokens - before < LONG.max_tokens


def test_what_is_cancelled_while_it_is_submitted_does_not_run(
    run: Run, engine: EngineReplica, monkeypatch: pytest.MonkeyPatch
) -> None:
    submit = engine._engine.submit
    submitted = []

    def slowly(request: Request) -> Any:
        time.sleep(0.2)
        submitted.append(submit(request))
        return submitted[-1]

    async def cancel() -> None:
        reading = asyncio.ensure_future(collect(engine, Request("Add 3 and 4.", sampling=LONG)))
        await asyncio.sleep(0.05)
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading
        await until(lambda: bool(submitted))
        await until(lambda: engine._engine.stats().running + engine._engine.stats().waiting == 0)

    monkeypatch.setattr(engine._engine, "submit", slowly)
    run(cancel())
    assert [answer.finish_reason for answer in submitted[0].result()] == ["aborted"]


def test_time_that_has_passed_before_counts(run: Run, engine: EngineReplica) -> None:
    (_, *_, last) = run(collect(engine, Request("Add 3.", sampling=LONG, timeout=600), expires=time.time() - 1))
    assert isinstance(last[-1], Generation) and last[-1].finish_reason == "timeout"


def test_an_engine_that_can_step_is_healthy(run: Run, engine: EngineReplica) -> None:
    async def check() -> None:
        await engine.check_health()
        steps = engine._engine.stats().steps
        await engine.check_health()
        assert engine._engine.stats().steps > steps, "it was idle, and has been tried"

    run(check())


def test_an_engine_that_hangs_is_not(engine: EngineReplica, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    has_ended = threading.Event()
    silent = SimpleNamespace(result=has_ended.wait, abort=has_ended.set)
    monkeypatch.setattr(replica, "_PROBE_SECONDS", 0.05)
    run(engine.check_health())
    monkeypatch.setattr(engine._engine, "submit", lambda request: silent)
    with pytest.raises(EngineError, match="no step"):
        run(engine.check_health())


class Left(BaseException):
    """Instead of the end of the process."""


@pytest.mark.parametrize("what", ["answer", "check_health"])
def test_the_replica_of_an_engine_that_has_ended_ends(
    engine: EngineReplica, run: Run, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    def leave(status: int) -> None:
        raise Left(status)

    def submit(request: Request) -> Stream:
        stream = Stream(1, lambda: None, unheard)
        stream.fail(EngineEndedError("vLLM has ended"))
        unheard.deliver()
        return stream

    unheard = Unheard()
    monkeypatch.setattr(replica.os, "_exit", leave)
    run(engine.check_health())
    monkeypatch.setattr(engine._engine, "submit", submit)
    with pytest.raises(Left):
        run(collect(engine, Request("Add 3 and 4.")) if what == "answer" else engine.check_health())


def test_servers_that_are_away_are_no_fault_of_the_replica(
    engine: EngineReplica, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With vLLM's servers behind it, a request that can be submitted and aborted is enough."""
    unheard = Unheard()

    def submit(request: Request) -> Stream:
        def end() -> None:
            stream.finish(Generation("", "aborted", 0, 0, 0.0))
            unheard.deliver()

        stream = Stream(1, end, unheard)
        return stream

    monkeypatch.setattr(replica, "_PROBE_SECONDS", 0.5)
    run(engine.check_health())
    monkeypatch.setattr(engine._engine, "submit", submit)
    with pytest.raises(EngineError, match="no step"):
        run(engine.check_health())
    engine._has_servers = True
    run(engine.check_health())


@pytest.mark.parametrize(
    ("client", "is_told"),
    [(("127.0.0.1", 9), False), (("::1", 9), False), (("192.0.2.7", 9), True), (None, True), (("", 0), True)],
)
def test_the_server_is_told_of_other_machines(run: Run, client: tuple[str, int] | None, is_told: bool) -> None:
    """Without keys it answers to this machine only, and the proxy stands between it and the client."""
    seen: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append(dict(scope["headers"]))
        await send({"type": "http.response.start", "status": 200, "headers": [(b"x-request-id", b"1"), (b"a", b"b")]})

    async def send(message: Any) -> None:
        seen.append(message["headers"])

    door = ingress._Door(app, SimpleNamespace())  # type: ignore[arg-type]
    run(door({"type": "http", "client": client, "headers": [(b"host", b"localhost")]}, send, send))  # type: ignore[arg-type]
    assert (b"forwarded" in seen[0]) == is_told
    assert seen[1] == [(b"a", b"b")], "the proxy adds the id"


@pytest.mark.parametrize("error", [None, EngineError("broken")])
def test_a_replica_of_the_server_is_there_when_its_models_are(run: Run, error: Exception | None) -> None:
    state = SimpleNamespace(is_loaded=False, loading_error=None)
    sent: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "lifespan.startup.complete"})

    async def send(message: Any) -> None:
        sent.append(message["type"])

    async def start() -> None:
        starting = asyncio.ensure_future(ingress._Door(app, state)({"type": "lifespan"}, send, send))  # type: ignore[arg-type]
        await asyncio.sleep(0.1)
        assert sent == []
        state.is_loaded, state.loading_error = error is None, error
        await starting

    run(start())
    assert sent == ["lifespan.startup.complete" if error is None else "lifespan.startup.failed"]
