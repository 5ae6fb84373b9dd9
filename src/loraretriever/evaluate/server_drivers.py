"""Processes that a benchmark of the server starts: the server, the load generator, the engine alone.

The last two are drivers. A driver writes a line of JSON when it is ready. A turn is a line to it, with `jobs` and their
`concurrency`; the line that it answers has `served`, an object for each job as in `Served`, and `seconds`, from the
turn's beginning to the last answer's end; or else `error`.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any, Self

from loraretriever.errors import LoraRetrieverError, require_extra

_LOG_LINES = 15
_PATIENCE = 60.0  # seconds that a process gets to end by itself


@dataclass(frozen=True, slots=True)
class Job:
    """One request. With `stream`, its answer is sent token by token; the engine alone always does so."""

    prompt: str
    max_tokens: int
    stream: bool = True


@dataclass(frozen=True, slots=True)
class Served:
    """What came of a job. Times are in seconds from the turn's beginning; `first` is None for a whole answer."""

    start: float
    first: float | None
    end: float
    tokens: int
    prompt_tokens: int
    composition: str
    text: str
    finish_reason: str


@dataclass(frozen=True, slots=True)
class Turn:
    """What came of all jobs of a turn. Processor seconds are those of each process, by its name."""

    served: Sequence[Served]
    seconds: float
    cpu_seconds: Mapping[str, float]


class Process:
    """A process of ours with a pipe to read and one to write. `name` stands in errors."""

    def __init__(self, name: str, command: Sequence[str], folder: Path, environment: Mapping[str, str] = {}) -> None:
        """Start it. `folder` takes its messages; `environment` is added to ours."""
        self.name = name
        self._log = folder / f"{name.replace(' ', '-')}.log"
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True,
                env={**os.environ, **environment},
            )  # fmt: skip
        self.pid = self._process.pid
        self._usage: Any = import_module("psutil").Process(self.pid)  # by name: it has no types

    def write(self, value: object) -> None:
        """Write a line of JSON."""
        with suppress(BrokenPipeError):  # it has ended: reading says so
            self._pipe(self._process.stdin).write(json.dumps(value) + "\n")
            self._pipe(self._process.stdin).flush()

    def read(self) -> Any:
        """Read a line of JSON.

        Raises:
            LoraRetrieverError: the process has ended.
        """
        line = self._pipe(self._process.stdout).readline()
        if not line:
            code = self._process.wait()
            tail = "\n".join(self._log.read_text(encoding="utf-8", errors="replace").splitlines()[-_LOG_LINES:])
            raise LoraRetrieverError(
                f"the {self.name} ended with exit status {code}; expected an answer. Its last messages:\n{tail}"
            )
        return json.loads(line)

    def cpu_seconds(self) -> float:
        """Processor time of all its threads so far."""
        times = self._usage.cpu_times()
        return float(times.user + times.system)

    def close(self) -> None:
        """End it: by the end of its input and a signal, or else by force."""
        with self._process:  # closes the pipes and waits
            with suppress(BrokenPipeError):
                self._pipe(self._process.stdin).close()
            self._process.terminate()
            try:
                self._process.wait(_PATIENCE)
            except subprocess.TimeoutExpired:
                self._process.kill()

    @staticmethod
    def _pipe(pipe: IO[str] | None) -> IO[str]:
        assert pipe is not None
        return pipe

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Driver(Process):
    """Answers turns. `ready` is what it said when it was ready."""

    def __init__(self, name: str, command: Sequence[str], folder: Path, environment: Mapping[str, str] = {}) -> None:
        """Start it and wait until it is ready.

        Raises:
            LoraRetrieverError: it ended before, or said why it cannot.
        """
        super().__init__(name, command, folder, environment)
        self.watched: list[Process] = [self]  # whose processor time is noted
        try:
            self.ready = self._answer()
        except BaseException:
            self.close()
            raise

    def run(self, jobs: Sequence[Job], concurrency: int) -> Turn:
        """Answer jobs, so many at a time.

        Raises:
            LoraRetrieverError: a request failed, or the process has ended.
        """
        before = {process.name: process.cpu_seconds() for process in self.watched}
        self.write({"jobs": [dataclasses.asdict(job) for job in jobs], "concurrency": concurrency})
        answer = self._answer()
        used = {process.name: process.cpu_seconds() - before[process.name] for process in self.watched}
        return Turn([Served(**row) for row in answer["served"]], answer["seconds"], used)

    def _answer(self) -> Any:
        answer = self.read()
        if "error" in answer:
            raise LoraRetrieverError(f"the {self.name} failed: {answer['error']}")
        return answer


@contextmanager
def server(options: Sequence[str], folder: Path, environment: Mapping[str, str] = {}) -> Iterator[tuple[Process, str]]:
    """A server process with these options of `loraretriever serve`, ready, and its address.

    Raises:
        LoraRetrieverError: it ended before it was ready.
    """
    command = [sys.executable, "-m", "loraretriever", "serve", *options, "--port", "0", "--json"]
    with Process("server", command, folder, environment) as process:
        yield process, str(process.read()["url"])


def load_generator(url: str, folder: Path) -> Driver:
    """locust, which sends its jobs to a server."""
    script = Path(__file__).with_name("server_load.py")
    # -P: a script's own folder would be searched for modules first, and ours has names of other packages.
    return Driver("load generator", [sys.executable, "-P", str(script), url], folder)


def engine_alone(pool: str, settings: Mapping[str, Any], folder: Path, environment: Mapping[str, str] = {}) -> Driver:
    """The pool's retriever and engine without a server. `settings` are fields of `Settings`."""
    setup = json.dumps({"pool": pool, "settings": settings})
    return Driver(
        "engine alone", [sys.executable, "-m", "loraretriever.evaluate.server_alone", setup], folder, environment
    )


def check_extra() -> None:
    """Before anything is started.

    Raises:
        MissingExtraError: the packages are not installed.
    """
    with require_extra("bench"):
        import_module("psutil")
        if find_spec("locust") is None:  # not imported: gevent would take our threads over
            raise ImportError("there is no locust", name="locust")
