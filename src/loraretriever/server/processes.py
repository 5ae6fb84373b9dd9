"""Several processes that serve at one socket, each with models of its own.

uvicorn's own supervisor is not used: it kills workers that do not answer for some seconds (importing torch takes as
long), starts those that cannot start again and again, and does not hear a second signal.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import socket
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from types import FrameType

from loraretriever.errors import LoraRetrieverError
from loraretriever.server.run import OpenApp, Plan, open_app, serve_here

_log = logging.getLogger(__name__)
_READY = "ready"
_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_LONGEST_DELAY = 60.0  # seconds between two starts of a worker that dies each time
_EXTRA_SECONDS = 20.0  # beyond what requests and jobs have, for the models and the pool to be closed

_spawn = multiprocessing.get_context("spawn")


def serve_in_workers(
    plan: Plan, listener: socket.socket, on_ready: Callable[[], None], open_app: OpenApp = open_app
) -> None:
    """Serve in `plan.server.workers` processes until a signal ends them; one that dies is started again.

    Args:
        on_ready: called once, when all have loaded their models.

    Raises:
        LoraRetrieverError: a worker could not start, before all were ready.
    """
    with tempfile.TemporaryDirectory(prefix="loraretriever-") as shared:
        supervisor = _Supervisor(replace(plan, shared=Path(shared)), listener, on_ready, open_app)
        with supervisor.signals():
            supervisor.run()


@dataclass(slots=True)
class _Worker:
    """A process, the pipe to it, and when it is started, should it be dead."""

    process: SpawnProcess
    pipe: Connection
    is_ready: bool = False
    deaths: int = 0  # since one was ready
    restart: float = 0.0


class _Supervisor:
    def __init__(self, plan: Plan, listener: socket.socket, on_ready: Callable[[], None], open_app: OpenApp) -> None:
        self._plan = plan
        self._listener = listener
        self._on_ready: Callable[[], None] | None = on_ready
        self._open_app = open_app
        self._workers: list[_Worker] = []
        self._is_stopping = False
        self._failure: str | None = None
        self._bell, self._bell_end = _spawn.Pipe(duplex=False)

    @contextmanager
    def signals(self) -> Iterator[None]:
        before = {number: signal.signal(number, self._on_signal) for number in _SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def run(self) -> None:
        try:
            for _ in range(self._plan.server.workers):
                self._workers.append(self._start(is_replacement=False))
            while not self._is_stopping:
                self._wait(self._next_restart())
                self._look_after_workers()
            self._stop_all()
        finally:
            self._kill_all()
        if self._failure is not None:
            raise LoraRetrieverError(self._failure)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._is_stopping and number == signal.SIGINT:
            self._kill_all()
            os._exit(128 + number)
        self._is_stopping = True
        self._bell_end.send_bytes(b"!")

    def _start(self, is_replacement: bool, deaths: int = 0) -> _Worker:
        ours, theirs = _spawn.Pipe()
        arguments = (self._plan, self._listener, theirs, self._open_app, is_replacement)
        process = _spawn.Process(target=_work, args=arguments, name="loraretriever-worker")
        process.start()
        theirs.close()  # the worker's end is now the worker's only: each side sees when the other dies
        return _Worker(process, ours, deaths=deaths)

    def _next_restart(self) -> float | None:
        times = [worker.restart for worker in self._workers if worker.restart]
        return max(0.0, min(times) - time.monotonic()) if times else None

    def _wait(self, seconds: float | None) -> None:
        """Until a worker says something or dies, a signal comes, or so many seconds have passed."""
        alive = [worker for worker in self._workers if not worker.restart]
        ends = [worker.process.sentinel for worker in alive]
        happened = wait([self._bell, *ends, *(worker.pipe for worker in alive)], seconds)
        for worker in alive:
            if worker.pipe in happened:
                self._read(worker)

    def _read(self, worker: _Worker) -> None:
        try:
            message = worker.pipe.recv()
        except (EOFError, OSError):
            worker.process.join()  # it is about to end
            return
        if message != _READY:
            self._failure = message if self._on_ready is not None else None
            _log.error("worker %s: %s", worker.process.pid, message)
            return
        worker.is_ready, worker.deaths = True, 0
        if self._on_ready is not None and all(each.is_ready for each in self._workers):
            self._on_ready()
            self._on_ready = None

    def _look_after_workers(self) -> None:
        for place, worker in enumerate(self._workers):
            if self._is_stopping:
                return
            if worker.restart:
                if time.monotonic() >= worker.restart:
                    self._workers[place] = self._start(is_replacement=True, deaths=worker.deaths)
            elif not worker.process.is_alive():
                self._mourn(worker)

    def _mourn(self, worker: _Worker) -> None:
        """Plan a dead worker's restart; when the server was never ready, give up."""
        worker.pipe.close()
        ending = f"worker {worker.process.pid} ended with exit code {worker.process.exitcode}"
        if self._on_ready is not None:
            self._failure = self._failure or f"{ending} before the server was ready; the log may say why."
            self._is_stopping = True
            return
        delay = min(2.0**worker.deaths, _LONGEST_DELAY)
        worker.deaths += 1
        worker.restart = time.monotonic() + delay
        _log.error("%s; another one starts in %.0f s", ending, delay)

    def _stop_all(self) -> None:
        for worker in self._workers:
            if worker.process.is_alive():
                worker.process.terminate()
        deadline = time.monotonic() + 2 * self._plan.server.shutdown_seconds + _EXTRA_SECONDS
        for worker in self._workers:
            worker.process.join(max(0.0, deadline - time.monotonic()))

    def _kill_all(self) -> None:
        for worker in self._workers:
            if worker.process.is_alive():
                _log.warning("worker %s is killed", worker.process.pid)
                worker.process.kill()
                worker.process.join()


def _work(plan: Plan, listener: socket.socket, pipe: Connection, open_app: OpenApp, is_replacement: bool) -> None:
    """What a worker process does."""
    # torch reads this when it is imported. Workers that all use all processors would wait for each other.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, _processors() // plan.server.workers)))
    warnings.simplefilter("ignore")  # as the command line does
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until the server hears signals: no traceback
    threading.Thread(target=_follow_parent, args=(pipe,), daemon=True).start()

    def say(message: str) -> None:
        with suppress(OSError):  # the parent is gone, and we soon too
            pipe.send(message)

    try:
        serve_here(plan, listener, lambda: say(_READY), open_app, is_replacement)
    except LoraRetrieverError as error:
        say(str(error))
        raise SystemExit(1) from None


def _processors() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _follow_parent(pipe: Connection) -> None:
    """End with the parent, however it ended."""
    with suppress(EOFError, OSError):
        pipe.recv()
    os.kill(os.getpid(), signal.SIGTERM)
