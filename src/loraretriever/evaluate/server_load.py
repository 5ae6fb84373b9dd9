"""Sends requests to a server with locust. A script for a process of its own: it imports nothing of this package.

locust puts gevent in the place of threads and sockets, so it must come before everything else. The argument is the
server's address. A line of standard output says that the script is ready; then each line that it reads is a turn, and
is answered by a line with what came of it (see `server_drivers.py`). locust's own messages go to standard error.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from typing import Any

import locust
from geventhttpclient.client import HTTPClientPool
from locust.env import Environment
from locust.exception import StopUser
from locust.runners import LocalRunner

PATH = "/v1/chat/completions"
_CONNECTIONS = 1024  # at most
_SECONDS = 600.0  # that a request may take


class BadAnswerError(Exception):
    """The server's answer is not what was asked for."""


class Turn:
    """Jobs that users take one after the other until there are none. Times are in seconds from its making."""

    def __init__(self, jobs: list[dict[str, Any]]) -> None:
        self.left = iter(enumerate([(_body(job), job) for job in jobs]))
        self.served: dict[int, dict[str, Any]] = {}
        self.errors: list[str] = []
        self.start = time.perf_counter()

    def now(self) -> float:
        """Seconds since the turn's beginning."""
        return time.perf_counter() - self.start


def _body(job: dict[str, Any]) -> str:
    body = {
        "model": "auto",
        "messages": [{"role": "user", "content": job["prompt"]}],
        "max_tokens": job["max_tokens"],
        "temperature": 0,
        "ignore_eos": True,
    }
    if job["stream"]:
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    return json.dumps(body)


class Client(locust.FastHttpUser):
    """A client that sends its next request when the last one is answered. Connections outlive turns."""

    turn: Turn
    client_pool = HTTPClientPool(concurrency=_CONNECTIONS, network_timeout=_SECONDS, connection_timeout=_SECONDS)

    @locust.task
    def ask(self) -> None:
        """Send one request, and note when what of its answer came."""
        turn = self.turn
        place, (body, job) = next(turn.left, (None, ("", {})))
        if place is None:
            raise StopUser
        start = turn.now()
        with self.client.post(
            PATH, data=body, headers={"content-type": "application/json"}, stream=True, catch_response=True
        ) as response:
            try:
                if response.status_code != 200:
                    raise BadAnswerError(f"status {response.status_code}: {response.text}")
                stream = response.stream
                row = _read_stream(stream, turn) if job["stream"] else _read_whole(stream, turn)
                if row["tokens"] != job["max_tokens"] or row["finish_reason"] != "length":
                    raise BadAnswerError(
                        f"{row['tokens']} tokens, {row['finish_reason']}; expected {job['max_tokens']}"
                    )
            except Exception as error:  # a connection that broke, too
                response.failure(error)
                return
            turn.served[place] = {"start": start, **row}
            response.request_meta["response_time"] = 1000 * (row["end"] - start)  # locust's is to the headers
            response.success()


def _read_whole(stream: Any, turn: Turn) -> dict[str, Any]:
    answer = json.loads(stream.read())
    end = turn.now()
    choice = answer["choices"][0]
    return _row(None, end, answer["usage"], answer["lora"], choice["message"]["content"], choice["finish_reason"])


def _read_stream(stream: Any, turn: Turn) -> dict[str, Any]:
    first, texts, reason = None, [], None
    usage, lora = None, None
    for event in _events(stream):
        if "error" in event:
            raise BadAnswerError(json.dumps(event))
        lora, usage = event.get("lora", lora), event.get("usage", usage)
        for choice in event["choices"]:
            delta = choice["delta"]
            if first is None and "role" not in delta:  # the event with the role comes before any token
                first = turn.now()
            texts.append(delta.get("content") or "")
            reason = choice["finish_reason"] or reason
    return _row(first, turn.now(), usage, lora, "".join(texts), reason)


def _events(stream: Any) -> Iterator[dict[str, Any]]:
    """The events until `[DONE]`. Line by line: locust's own iterators wait until a block is full."""
    while True:
        line = stream.readline(b"\n\n")
        if not line:
            raise BadAnswerError("the stream ended before [DONE]")
        if line == b"data: [DONE]\n\n":
            stream.read()  # the end, so that the connection serves the next request
            return
        if line.startswith(b"data: "):
            yield json.loads(line[len(b"data: ") :])


def _row(
    first: float | None, end: float, usage: dict[str, Any] | None, lora: dict[str, Any] | None, text: str, reason: Any
) -> dict[str, Any]:
    if usage is None or lora is None:
        raise BadAnswerError("the answer has no usage, or says nothing of adapters")
    return {
        "first": first,
        "end": end,
        "tokens": usage["completion_tokens"],
        "prompt_tokens": usage["prompt_tokens"],
        "composition": lora["composition"],
        "text": text,
        "finish_reason": reason,
    }


def run(runner: LocalRunner, order: dict[str, Any]) -> dict[str, Any]:
    """Let as many users as the order says answer its jobs; `served` is in the jobs' order."""
    turn = Client.turn = Turn(order["jobs"])
    told: list[str] = []

    def note(exception: Exception | None = None, **_: Any) -> None:
        if exception is not None:
            told.append(f"{type(exception).__name__}: {exception}")

    def note_crash(exception: Exception, **_: Any) -> None:
        told.append(f"the client failed: {exception!r}")

    events: Any = runner.environment.events
    events.request.add_listener(note)
    events.user_error.add_listener(note_crash)
    try:
        runner.spawn_users({Client.__name__: min(order["concurrency"], len(order["jobs"]))}, wait=True)
    finally:
        events.request.remove_listener(note)
        events.user_error.remove_listener(note_crash)
    seconds = turn.now()
    lost = len(order["jobs"]) - len(turn.served)
    if told or lost:
        return {"error": f"{lost} of {len(order['jobs'])} requests failed: {'; '.join(dict.fromkeys(told))[:2000]}"}
    return {"served": [turn.served[place] for place in range(len(order["jobs"]))], "seconds": seconds}


def main() -> None:
    """Answer lines until there are no more."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    runner = Environment(user_classes=[Client], host=sys.argv[1]).create_local_runner()
    Client.host = sys.argv[1]
    _answer(answers, {"locust": locust.__version__})
    for line in sys.stdin:
        _answer(answers, run(runner, json.loads(line)))


def _answer(answers: Any, value: object) -> None:
    answers.write(json.dumps(value) + "\n")
    answers.flush()


if __name__ == "__main__":
    main()
