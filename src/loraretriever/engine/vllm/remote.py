"""vLLM's OpenAI-compatible servers, with our plug-in (`cluster/vllm_plugin.py`) in them."""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import math
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any

import aiohttp

from loraretriever.engine.sampler import Sampled
from loraretriever.engine.vllm.backend import Job, Limits, Part
from loraretriever.errors import (
    AdapterNotFoundError,
    EngineError,
    InvalidInputError,
    LoraRetrieverError,
    ModelLoadError,
    OverloadedError,
)

_log = logging.getLogger(__name__)
_INFO = "/loraretriever"  # of the plug-in
_ROUNDS = 3  # of attempts at all servers, for what has not begun
_FIRST_PAUSE = 0.1  # seconds between the rounds; doubled each time
_POLL = 0.5  # seconds between attempts to reach a server that starts
_CONNECT = 5.0  # seconds
_REST = 5.0  # seconds for which a server that failed comes last
_BALANCE = 1.25  # the most that a server may have, as a multiple of the mean, before jobs go to another one
_EVENT_END = b"\n\n"
_FAILURES = (aiohttp.ClientError, TimeoutError)  # of a server, or on the way to it
_BIAS = 100.0  # the most that vLLM adds to a logit


@dataclass(slots=True)
class _Server:
    url: str
    failed: float = -_REST  # when it failed last
    running: int = 0  # jobs of ours that it has


class _ElsewhereError(Exception):
    """A server has not begun to answer: another may be asked. `error` is the user's, if none does."""

    def __init__(self, error: LoraRetrieverError) -> None:
        super().__init__(str(error))
        self.error = error


class RemoteBackend:
    """One server or several. Each composition has a server of its own, unless that one fails or has far too much."""

    def __init__(self, urls: Sequence[str], key: str | None, timeout: float) -> None:
        """Remember the servers.

        Args:
            urls: their addresses, without `/v1`.
            key: what they were given as `--api-key`.
            timeout: seconds of silence after which a server is asked whether it lives, and in which one must start.
        """
        self._servers = [_Server(url) for url in urls]
        self._timeout = timeout
        self._headers = {"authorization": f"Bearer {key}"} if key else {}
        self._opened: aiohttp.ClientSession | None = None

    @property
    def _session(self) -> aiohttp.ClientSession:
        """The connections; they belong to the loop in which they are first asked for."""
        if self._opened is None:
            timeout = aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT)
            connector = aiohttp.TCPConnector(limit=0)
            self._opened = aiohttp.ClientSession(headers=self._headers, timeout=timeout, connector=connector)
        return self._opened

    async def limits(self) -> Limits:
        """See `Backend`; of several servers the least of each."""
        found = await asyncio.gather(*(self._limits(server) for server in self._servers))
        bases = sorted({each.base for each in found})
        if len(bases) > 1:
            raise ModelLoadError(
                f"the vLLM servers name their base models {', '.join(bases)}; expected the same model of all, under "
                "one --served-model-name."
            )
        return Limits(*(min(getattr(each, name) for each in found) for name in Limits.__slots__))

    async def generate(self, job: Job, on_start: Callable[[], None]) -> AsyncGenerator[Part]:
        """See `Backend`."""
        pause, last = _FIRST_PAUSE, None
        for attempt in range(_ROUNDS):
            if attempt:
                await asyncio.sleep(pause)
                pause *= 2
            for server in self._ordered(job.model):
                try:
                    async with aclosing(self._ask(server, job, on_start)) as parts:
                        async for part in parts:
                            yield part
                    return
                except _ElsewhereError as failure:
                    _log.warning("%s", failure)
                    last = failure.error
        assert last is not None
        raise last

    async def close(self) -> None:
        """See `Backend`."""
        if self._opened is not None:
            await self._opened.close()

    def _ordered(self, model: str) -> list[_Server]:
        """The servers, the model's own one first (rendezvous hashing with bounded loads), those that failed last."""
        now = time.monotonic()
        jobs = 1 + sum(server.running for server in self._servers)
        bound = math.ceil(_BALANCE * jobs / len(self._servers))

        def key(server: _Server) -> tuple[bool, bool, bytes]:
            place = hashlib.sha256(f"{server.url} {model}".encode()).digest()
            return now - server.failed < _REST, server.running >= bound, place

        return sorted(self._servers, key=key)

    async def _limits(self, server: _Server) -> Limits:
        until = time.monotonic() + self._timeout
        while True:
            try:
                async with self._session.get(server.url + _INFO) as answer:
                    status, body = answer.status, await answer.read()
                break
            except _FAILURES as error:
                if time.monotonic() >= until:
                    raise ModelLoadError(
                        f"there is no vLLM server at {server.url}: {_said(error)}. Start it, or name another address "
                        "(vllm_urls)."
                    ) from error
                await asyncio.sleep(_POLL)
        if status == 404:
            raise ModelLoadError(
                f"the server at {server.url} has no plug-in of LoraRetriever; install loraretriever where vLLM is, and "
                "start vLLM with VLLM_PLUGINS=loraretriever in its environment."
            )
        if status != 200:
            said = body[:300].decode("utf-8", "replace")
            raise ModelLoadError(f"the vLLM server at {server.url} answers {status}: {said}")
        info = json.loads(body)
        if not info["pool"]:
            raise ModelLoadError(
                f"the vLLM server at {server.url} does not know the pool; start it with --enable-lora, and with "
                "LORARETRIEVER_POOL and VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 in its environment."
            )
        return Limits(info["max_length"], info["max_rank"], info["slots"], info["base"], info["lanes"])

    async def _ask(self, server: _Server, job: Job, on_start: Callable[[], None]) -> AsyncGenerator[Part]:
        """The answers of one server.

        Raises:
            _ElsewhereError: it failed, or has no room, before it sent anything.
            LoraRetrieverError: it refuses the job, or failed later.
        """
        has_begun = is_done = False
        server.running += 1
        try:
            async with self._session.post(f"{server.url}/v1/completions", json=_body(job)) as answer:
                if answer.status != 200:
                    raise _refusal(server, job, answer.status, await answer.read())
                on_start()
                last: Part | None = None  # of a single answer, kept for what is said of the prompt after it
                async for event in self._events(server, answer):
                    if event == b"[DONE]":
                        is_done = True  # the connection is used again only if the answer is read to its end
                        continue
                    chunk = json.loads(event)
                    has_begun = True
                    if last is not None:
                        last = replace(last, cached=_cached(chunk))
                    for part in _parts(server, chunk):
                        if part.finish_reason and job.sampling.n == 1:
                            last = part
                        else:
                            yield part
                if not is_done:
                    raise aiohttp.ClientPayloadError("the answer ended before it was complete")
            if last is not None:
                yield last
        except _FAILURES as error:
            server.failed = time.monotonic()
            failure = EngineError(f"the vLLM server at {server.url} failed: {_said(error)}; send the request again.")
            if has_begun:
                raise failure from error
            raise _ElsewhereError(failure) from error
        finally:
            server.running -= 1

    async def _events(self, server: _Server, answer: aiohttp.ClientResponse) -> AsyncGenerator[bytes]:
        """The data of an answer's events. Where nothing comes for long, the server is asked whether it lives.

        Raises:
            aiohttp.ClientError, TimeoutError: it does not, or the answer breaks off.
        """
        rest = b""
        while not answer.content.at_eof():
            try:
                async with asyncio.timeout(self._timeout):
                    rest += await answer.content.readany()
            except TimeoutError:
                await self._check_alive(server)
                continue
            *events, rest = rest.split(_EVENT_END)
            for event in events:
                if event.startswith(b"data: "):
                    yield event.removeprefix(b"data: ")

    async def _check_alive(self, server: _Server) -> None:
        timeout = aiohttp.ClientTimeout(total=_CONNECT)
        async with self._session.get(f"{server.url}/health", timeout=timeout) as health:
            if health.status != 200:
                raise aiohttp.ClientPayloadError(f"it says of itself that it is not well: {health.status}")


def _body(job: Job) -> dict[str, Any]:
    """The request to vLLM; tokens go both ways, so that the text is made here, as for the local engine."""
    sampling = job.sampling
    return {
        "model": job.model,
        "prompt": list(job.tokens),
        "stream": True,
        "stream_options": {"include_usage": True},
        "return_token_ids": True,
        "return_tokens_as_token_ids": True,
        "max_tokens": sampling.max_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "min_p": sampling.min_p,
        "repetition_penalty": sampling.repetition_penalty,
        "presence_penalty": sampling.presence_penalty,
        "frequency_penalty": sampling.frequency_penalty,
        "logit_bias": {str(token): min(max(value, -_BIAS), _BIAS) for token, value in sampling.logit_bias} or None,
        "seed": sampling.seed,
        "stop": list(sampling.stop),
        "n": sampling.n,
        "logprobs": sampling.logprobs,
        "ignore_eos": sampling.ignore_end,
        "cache_salt": job.namespace or None,
    }


def _parts(server: _Server, chunk: dict[str, Any]) -> list[Part]:
    """The parts in one event of the stream."""
    if error := chunk.get("error"):
        raise EngineError(f"the vLLM server at {server.url} failed: {error['message']}; send the request again.")
    return [Part(choice["index"], tuple(_sampled(choice)), choice.get("finish_reason")) for choice in chunk["choices"]]


def _cached(chunk: dict[str, Any]) -> int | None:
    """Tokens of the prompt that were not computed, in the last event; None where the server does not tell."""
    return ((chunk.get("usage") or {}).get("prompt_tokens_details") or {}).get("cached_tokens")


def _sampled(choice: dict[str, Any]) -> list[Sampled]:
    ids, logprobs = choice.get("token_ids") or [], choice.get("logprobs")
    if not logprobs:
        return [Sampled(token) for token in ids]
    tops = logprobs["top_logprobs"] or [{}] * len(ids)
    return [
        Sampled(token, logprob, tuple((_token(name), value) for name, value in (top or {}).items()))
        for token, logprob, top in zip(ids, logprobs["token_logprobs"], tops, strict=True)
    ]


def _token(name: str) -> int:
    return int(name.removeprefix("token_id:"))


def _refusal(server: _Server, job: Job, status: int, body: bytes) -> Exception:
    """What an answer means that is none."""
    said = _message(body)
    if status == 404:
        return AdapterNotFoundError(f"the vLLM server at {server.url} does not find {job.model!r:.300}: {said}")
    if status in (401, 403):
        return EngineError(f"the vLLM server at {server.url} refuses the key (vllm_key): {said}")
    if status in (429, 503):
        return _ElsewhereError(OverloadedError(f"the vLLM server at {server.url} cannot take it now: {said}"))
    if status >= 500:
        return _ElsewhereError(EngineError(f"the vLLM server at {server.url} answered {status}: {said}"))
    return InvalidInputError(f"vLLM refuses the request: {said}")


def _message(body: bytes) -> str:
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return body[:300].decode("utf-8", "replace")


def _said(error: Exception) -> str:
    return f"{type(error).__name__}{f' ({error})' if str(error) else ''}"
