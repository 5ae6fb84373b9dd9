"""Processes, and signals to them. 0 workers: the process itself serves."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import psutil
import pytest

SCRIPT = Path(__file__).parent.parent / "server_app.py"
WAIT = 60.0


class Program:
    """The script on its way."""

    def __init__(self, workers: int, mode: str) -> None:
        arguments = [sys.executable, str(SCRIPT), str(workers), mode]
        self.process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def url(self) -> str:
        """Once it is ready."""
        url: str = json.loads(self.process.stdout.readline())["url"]
        return url

    def end(self) -> tuple[int, str, str]:
        """Exit code and what it has written; waits for it."""
        out, err = self.process.communicate(timeout=WAIT)
        return self.process.returncode, out, err


@pytest.fixture
def start() -> Iterator[Callable[..., Program]]:
    programs: list[Program] = []

    def call(workers: int, mode: str = "serve") -> Program:
        programs.append(Program(workers, mode))
        return programs[-1]

    yield call
    for program in programs:
        if program.process.poll() is None:
            children = psutil.Process(program.process.pid).children(recursive=True)
            program.process.kill()
            for child in children:
                child.kill()
        program.process.communicate()


def get(url: str) -> httpx.Response:
    return httpx.get(url, timeout=WAIT, trust_env=False)


def ask_in_thread(url: str) -> tuple[threading.Thread, list[str]]:
    answers: list[str] = []

    def ask() -> None:
        try:
            answers.append(get(url).json())
        except httpx.HTTPError as error:
            answers.append(type(error).__name__)

    thread = threading.Thread(target=ask)
    thread.start()
    return thread, answers


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_requests_finish(start: Callable[..., Program], workers: int, number: int) -> None:
    program = start(workers)
    url = program.url()
    thread, answers = ask_in_thread(url + "/wait")
    get(url + "/waiting")
    program.process.send_signal(number)
    get(url + "/go-on")
    thread.join(WAIT)
    code, out, err = program.end()
    assert (answers, code, out) == (["done"], 0, ""), err
    assert "Traceback" not in err


@pytest.mark.parametrize("workers", [0, 2])
def test_a_second_interrupt_ends_at_once(start: Callable[..., Program], workers: int) -> None:
    program = start(workers)
    url = program.url()
    children = psutil.Process(program.process.pid).children(recursive=True)
    thread, answers = ask_in_thread(url + "/wait")
    if workers < 2:
        get(url + "/waiting")
    program.process.send_signal(signal.SIGINT)
    while "stopping" not in (line := program.process.stderr.readline()):
        assert line, "it ended without a word"
    program.process.send_signal(signal.SIGINT)
    code, _, _ = program.end()
    assert code == 128 + signal.SIGINT
    assert psutil.wait_procs(children, WAIT)[1] == []
    thread.join(WAIT)
    assert answers != ["done"]


def test_workers_share_a_socket_and_a_folder(start: Callable[..., Program]) -> None:
    program = start(2)
    url = program.url()
    pids = {get(url + "/pid").json() for _ in range(50)}
    assert os.getpid() not in pids and program.process.pid not in pids
    (folder,) = get(url + "/shared").json()
    assert Path(folder).is_dir()
    program.process.terminate()
    assert program.end()[0] == 0
    assert not Path(folder).exists()


def test_workers_share_the_processors(start: Callable[..., Program], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    threads = int(get(start(2).url() + "/threads").json())
    assert threads == max(1, len(os.sched_getaffinity(0)) // 2)


def test_a_dead_worker_is_replaced(start: Callable[..., Program]) -> None:
    program = start(1)
    url = program.url()
    dead = get(url + "/pid").json()
    os.kill(dead, signal.SIGKILL)
    with httpx.Client(timeout=WAIT, trust_env=False) as client:  # waits in the socket's queue meanwhile
        while (alive := _try(client, url + "/pid")) in (dead, None):
            pass
    assert alive != dead
    program.process.terminate()
    code, _, err = program.end()
    assert code == 0
    assert f"worker {dead} ended with exit code -9; another one starts in 1 s" in err


def _try(client: httpx.Client, url: str) -> int | None:
    try:
        pid: int = client.get(url).json()
    except httpx.HTTPError:  # the dead one had taken the connection
        return None
    return pid


@pytest.mark.parametrize(("mode", "message"), [("fail", "error: no such model"), ("die", "exit code 9 before")])
def test_workers_that_cannot_start_end_the_server(start: Callable[..., Program], mode: str, message: str) -> None:
    code, out, err = start(2, mode).end()
    assert (code, out) == (1, "")
    assert message in err
    assert "Traceback" not in err


def test_workers_end_with_their_parent(start: Callable[..., Program]) -> None:
    program = start(2)
    program.url()
    children = psutil.Process(program.process.pid).children(recursive=True)
    assert len(children) >= 2
    program.process.kill()
    assert psutil.wait_procs(children, WAIT)[1] == []
