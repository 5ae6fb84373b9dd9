"""Clients of a server that is changed meanwhile: right requests, bad ones, and some that do not wait for the answer."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx

from loraretriever.evaluate.server_soak_answers import Answer, History, References
from loraretriever.types import TokenLogprob

CHAT = "/v1/chat/completions"
# How often which kind of request is sent.
KINDS = {"adapter": 28, "composition": 18, "auto": 30, "base": 4, "gone": 8, "bad": 12}
_EXAMPLES = 20  # of problems that are told in full
_LONGEST_WAIT = 1.5  # seconds that a client waits before it goes
_ERROR_FIELDS = {"message", "type", "param", "code"}


@dataclass(slots=True)
class Log:
    """What has happened so far. `problems` must stay empty."""

    outcomes: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    problems: Counter[str] = field(default_factory=Counter)
    examples: list[str] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)  # of requests that were answered

    def note(self, kind: str, outcome: str) -> None:
        """A request has ended as it may."""
        self.outcomes[kind][outcome] += 1

    def problem(self, kind: str, problem: str, example: str) -> None:
        """A request has not."""
        self.note(kind, problem)
        self.problems[problem] += 1
        if len(self.examples) < _EXAMPLES:
            self.examples.append(f"{problem}: {kind}: {example}"[:1000])

    @property
    def requests(self) -> int:
        """How many have ended."""
        return sum(sum(outcomes.values()) for outcomes in self.outcomes.values())


@dataclass(frozen=True, slots=True)
class BadRequest:
    """A request that must be refused, with one of these statuses."""

    statuses: tuple[int, ...]
    method: str
    path: str
    options: Mapping[str, Any] = field(default_factory=dict)


def bad_requests(config: bytes) -> list[BadRequest]:
    """One of each kind. `config` is a good `adapter_config.json`, for an upload with bad weights."""
    messages = [{"role": "user", "content": "Hello"}]

    def chat(statuses: tuple[int, ...], **body: Any) -> BadRequest:
        return BadRequest(statuses, "POST", CHAT, {"json": {"messages": messages, **body}})

    json_type = {"content-type": "application/json"}
    files = {"config": config, "weights": b"these are no weights"}
    return [
        BadRequest((400,), "POST", CHAT, {"content": b"{", "headers": json_type}),
        chat((400,), temperatur=1),
        chat((400,), max_tokens=0),
        chat((400,), max_tokens=10**9),
        chat((400,), messages=[]),
        chat((400,), messages=[{"role": "user", "content": "word " * 50_000}]),
        chat((404,), model="nobody"),
        chat((400,), model="mixture(a0=0.5"),
        chat((400,), model="a0", lora={"adapters": ["a1"]}),
        chat((404,), lora={"adapters": {"nobody": 1.0}}),
        chat((400,), lora={"strategy": "nothing"}),
        BadRequest((405,), "GET", CHAT),
        BadRequest((404,), "GET", "/v1/nothing"),
        BadRequest((404,), "DELETE", "/v1/adapters/nobody"),
        BadRequest((404,), "GET", "/v1/jobs/nothing"),
        BadRequest((413,), "POST", CHAT, {"content": b" " * (5 << 20), "headers": json_type}),
        BadRequest((415,), "POST", "/v1/adapters", {"content": b"?", "headers": {"content-type": "text/plain"}}),
        BadRequest((422,), "POST", "/v1/adapters?wait=true", {"files": files, "data": {"name": "bad"}}),
    ]


class Client:
    """Sends one request after the other, each of a kind drawn at random."""

    def __init__(
        self,
        http: httpx.AsyncClient,
        log: Log,
        history: History,
        references: References,
        prompts: Sequence[str],
        models: Mapping[str, Sequence[str]],
        bad: Sequence[BadRequest],
        max_tokens: int,
        patience: float,
        seed: str,
    ) -> None:
        """`models`: what requests of the kinds `adapter` and `composition` name. `patience`: seconds, then it hangs."""
        self._http = http
        self._log = log
        self._history = history
        self._references = references
        self._prompts = prompts
        self._models = models
        self._bad = bad
        self._max_tokens = max_tokens
        self._patience = patience
        self._random = random.Random(seed)

    async def send(self) -> None:
        """One request."""
        (kind,) = self._random.choices(list(KINDS), list(KINDS.values()))
        start = time.perf_counter()
        try:
            async with asyncio.timeout(self._patience):
                if kind == "bad":
                    await self._send_bad()
                elif kind == "gone":
                    await self._send_and_go()
                else:
                    await self._send_good(kind)
        except TimeoutError:
            self._log.problem(kind, "hang", f"no answer within {self._patience:.0f} s")
        except httpx.HTTPError as error:
            self._log.problem(kind, "connection", repr(error))
        except (KeyError, IndexError, TypeError, ValueError) as error:
            self._log.problem(kind, "malformed", f"the answer cannot be read: {error!r}")
        else:
            if kind != "gone":
                self._log.seconds.append(time.perf_counter() - start)

    def _body(self, kind: str) -> dict[str, Any]:
        body: dict[str, Any] = {
            "model": "auto",
            "messages": [{"role": "user", "content": self._random.choice(self._prompts)}],
            "max_tokens": self._max_tokens,
            "temperature": 0,
        }
        if kind == "auto":
            # The words before it make the text that is routed new each time.
            query = f"{self._random.randrange(10**9)}. {body['messages'][0]['content']}"
            body["lora"] = {"k": self._random.choice((1, 2)), "weighting": "uniform", "query": query}
        elif kind == "base":
            body["model"] = "base"
        else:
            body["model"] = self._random.choice(self._models[kind])
        if self._random.random() < 0.5:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        if self._random.random() < 0.8:
            body |= {"logprobs": True, "top_logprobs": 2}
        return body

    async def _send_good(self, kind: str) -> None:
        body = self._body(kind)
        start = time.perf_counter()
        async with self._http.stream("POST", CHAT, json=body) as response:
            if response.status_code != 200:
                await response.aread()
                self._judge_refusal(kind, body, response, start)
                return
            begun = time.perf_counter()  # a stream begins once the adapters are chosen
            answer = await (_read_stream(response) if body.get("stream") else _read_whole(response))
        self._judge(kind, body, answer, start, begun if body.get("stream") else time.perf_counter())

    def _judge(self, kind: str, body: dict[str, Any], answer: Answer, start: float, end: float) -> None:
        prompt = body["messages"][0]["content"]
        mixes = self._history.mixes(answer.strategy, answer.adapters, start, end)
        outcome = self._references.judge(answer, prompt, mixes)
        expected = {"adapter": [body["model"]], "base": []}.get(kind)
        if outcome == "wrong" or (expected is not None and [name for name, _ in answer.adapters] != expected):
            told = {"answer": answer.text, "adapters": answer.adapters, "possible": [mix.parts for mix in mixes]}
            self._log.problem(kind, "wrong", json.dumps({"model": body["model"], "prompt": prompt, **told}))
        else:
            self._log.note(kind, outcome)

    def _judge_refusal(self, kind: str, body: dict[str, Any], response: httpx.Response, start: float) -> None:
        problem = find_fault(response)
        names = [name for name in self._history.names if name in body["model"]]
        absent = any(None in self._history.contents(name, start, time.perf_counter()) for name in names)
        if problem is not None:
            self._log.problem(kind, "malformed", problem)
        elif response.status_code == 404 and absent:
            self._log.note(kind, "absent")
        elif response.status_code == 503:
            self._log.note(kind, "overloaded")
        else:
            self._log.problem(kind, "unexpected", f"{body['model']}: {response.status_code} {response.text}")

    async def _send_bad(self) -> None:
        bad = self._random.choice(self._bad)
        response = await self._http.request(bad.method, bad.path, **bad.options)
        problem = find_fault(response)
        if problem is not None:
            self._log.problem("bad", "malformed", f"{bad.method} {bad.path}: {problem}")
        elif response.status_code == 503:
            self._log.note("bad", "overloaded")
        elif response.status_code not in bad.statuses:
            sent = json.dumps(bad.options.get("json"))
            told = f"{response.status_code} {response.text:.200}; expected {' or '.join(map(str, bad.statuses))}"
            self._log.problem("bad", "unexpected", f"{bad.method} {bad.path} {sent:.200}: {told}")
        else:
            self._log.note("bad", str(response.status_code))

    async def _send_and_go(self) -> None:
        """A client that does not wait for the answer, or not for all of it."""
        body = self._body(self._random.choice(("adapter", "composition", "auto")))
        body["max_tokens"] = 8 * self._max_tokens
        try:
            async with asyncio.timeout(self._random.uniform(0, _LONGEST_WAIT)):
                async with self._http.stream("POST", CHAT, json=body) as response:
                    events = self._random.randrange(4)
                    async for _ in response.aiter_lines():
                        events -= 1
                        if events < 0:
                            break
        except TimeoutError:
            self._log.note("gone", "before an answer")
        else:
            self._log.note("gone", "in an answer" if response.status_code == 200 else "refused")


def find_fault(response: httpx.Response) -> str | None:
    """What is wrong with the form of an error; None: nothing."""
    told = f"{response.status_code} {response.text:.300}"
    try:
        body = response.json()
    except ValueError:
        return f"not JSON: {told}"
    error = body.get("error") if isinstance(body, dict) else None
    if not isinstance(error, dict) or body.keys() != {"error"} or error.keys() != _ERROR_FIELDS:
        return f"not an error object: {told}"
    if not (isinstance(error["message"], str) and error["message"] and isinstance(error["type"], str)):
        return f"no message or type: {told}"
    if not all(error[name] is None or isinstance(error[name], str) for name in ("param", "code")):
        return f"param or code is no text: {told}"
    if not 400 <= response.status_code < 600 or "x-request-id" not in response.headers:
        return f"a wrong status, or no x-request-id: {told}"
    if response.status_code in (429, 503) and not response.headers.get("retry-after", "").isdecimal():
        return f"no Retry-After: {told}"
    return None


async def _read_whole(response: httpx.Response) -> Answer:
    body = json.loads(await response.aread())
    choice = body["choices"][0]
    logprobs = choice["logprobs"]
    tokens = _tokens(logprobs) if logprobs is not None else ()
    return _answer(response, choice["message"]["content"], choice["finish_reason"], tokens, body["lora"], body["usage"])


async def _read_stream(response: httpx.Response) -> Answer:
    text, reason = "", ""
    tokens: list[TokenLogprob] = []
    lora, usage = None, None
    async for event in _events(response):
        lora, usage = event.get("lora", lora), event.get("usage", usage)
        for choice in event["choices"]:
            text += choice["delta"].get("content") or ""
            tokens += _tokens(choice["logprobs"]) if choice["logprobs"] is not None else ()
            reason = choice["finish_reason"] or reason
    return _answer(response, text, reason, tuple(tokens), lora, usage)


async def _events(response: httpx.Response) -> AsyncIterator[dict[str, Any]]:
    done = False
    async for line in response.aiter_lines():
        if done and line:
            raise ValueError(f"{line!r:.80} after [DONE]")
        if line == "data: [DONE]":
            done = True
        elif line.startswith("data: "):
            event = json.loads(line.removeprefix("data: "))
            if "error" in event:
                raise ValueError(f"an error in a stream: {line:.300}")
            yield event
    if not done:
        raise ValueError("the stream ended before [DONE]")


def _tokens(logprobs: dict[str, Any]) -> tuple[TokenLogprob, ...]:
    return tuple(TokenLogprob(-1, each["token"], each["logprob"]) for each in logprobs["content"])


def _answer(
    response: httpx.Response, text: str, reason: str, tokens: tuple[TokenLogprob, ...], lora: Any, usage: Any
) -> Answer:
    """The answer, if all that was said of it fits together."""
    headers = response.headers
    said = {"x-lora-composition": lora["composition"], "x-lora-fallback": "true" if lora["fallback"] else "false"}
    for name, value in said.items():
        if headers[name] != value:
            raise ValueError(f"the header {name} is {headers[name]!r}; the answer says {value!r}")
    if "x-request-id" not in headers:
        raise ValueError("the answer has no x-request-id")
    if tokens and usage["completion_tokens"] != len(tokens):
        raise ValueError(f"{usage['completion_tokens']} tokens in usage, {len(tokens)} log-probabilities")
    if not usage["completion_tokens"] or reason not in ("stop", "length"):
        raise ValueError(f"{usage['completion_tokens']} tokens, finish_reason {reason!r}")
    adapters = tuple((each["name"], each["weight"]) for each in lora["adapters"])
    return Answer(text, reason, tokens, lora["strategy"], adapters)
