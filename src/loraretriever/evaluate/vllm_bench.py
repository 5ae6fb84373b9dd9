"""The benchmark of the server before vLLM: what the gateway adds to a request, and what new compositions cost.

A vLLM server with our plug-in runs already; our server is started before it. *Overhead*: pairs of requests of one
token, by the gateway, which retrieves and composes, and straight to vLLM for the same composition, in turns.
*Compositions*: a closed loop through the gateway, in which a share of the requests ask for a composition that nobody
has asked for before; the others for one of a few that vLLM knows.
"""

from __future__ import annotations

import itertools
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx

from loraretriever.compose import compose_explicit
from loraretriever.compose.pinned import pinned_name
from loraretriever.errors import LoraRetrieverError
from loraretriever.evaluate.environment import Environment, environment
from loraretriever.evaluate.server_bench import Prompts
from loraretriever.evaluate.server_drivers import check_extra, server
from loraretriever.pool import Pool

SHARES = (0.0, 0.1, 0.25, 0.5, 1.0)  # of requests with a new composition
_WORDS = 8  # of a prompt: the model's own time is only in the way
_TIMEOUT = 600.0


@dataclass(frozen=True, slots=True)
class Options:
    """What to measure. `url`: the vLLM server's, without `/v1`. The other sizes are numbers of requests."""

    pool: str | Path
    url: str
    seed: int = 0
    pairs: int = 100
    requests: int = 96
    concurrency: int = 16
    max_tokens: int = 16
    k: int = 3
    known: int = 4  # compositions that come again


@dataclass(frozen=True, slots=True)
class Overhead:
    """Milliseconds of a request of one token: medians, and that of the differences within the pairs."""

    gateway: float
    direct: float
    difference: float
    retrieval: float  # of the gateway's time, as its answers tell


@dataclass(frozen=True, slots=True)
class Throughput:
    """Requests answered, and compositions that were new, in a second; the share of new ones that was asked for."""

    share: float
    requests_per_second: float
    compositions_per_second: float


@dataclass(frozen=True, slots=True)
class VllmReport:
    """All figures. `half_at`: new compositions in a second with half the throughput of none; None: never so slow.

    It is read off the straight line between the two measured points around the half.
    """

    environment: Environment
    pool: str
    server: dict[str, Any]  # what vLLM's plug-in says of it
    options: Options
    overhead: Overhead
    throughput: tuple[Throughput, ...]
    half_at: float | None
    seconds: float


def count_steps(options: Options) -> int:
    """How often `bench_vllm` advances."""
    return 1 + options.pairs + len(SHARES)


def bench_vllm(options: Options, advance: Callable[[], None] = lambda: None) -> VllmReport:
    """Start the gateway, and measure. Advances `count_steps` times.

    Raises:
        PoolError: the pool cannot be opened, or has no adapter.
        LoraRetrieverError: a request failed, or there is no vLLM server.
    """
    check_extra()
    start = time.perf_counter()
    prompts = Prompts(options.pool, options.seed)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory(prefix="loraretriever-bench-")))
        arguments = ["--pool", str(options.pool), "--log-level", "warning", "--engine", "vllm"]
        _, url = stack.enter_context(server([*arguments, "--vllm-url", options.url], folder))
        limits = httpx.Limits(max_connections=None)
        gateway = stack.enter_context(httpx.Client(base_url=url, timeout=_TIMEOUT, limits=limits))
        direct = stack.enter_context(httpx.Client(base_url=options.url, timeout=_TIMEOUT, limits=limits))
        pool = stack.enter_context(Pool.open(options.pool))
        advance()
        told = direct.get("/loraretriever").json()
        overhead = _overhead(options, pool, prompts, gateway, direct, advance)
        names = [adapter.name for adapter in pool.list(enabled_only=True)]
        load = _Load(options, names, prompts, gateway)
        throughput = tuple(load.run(share, advance) for share in SHARES)
    return VllmReport(
        environment(),
        str(options.pool),
        told,
        options,
        overhead,
        throughput,
        find_half(throughput),
        round(time.perf_counter() - start, 1),
    )


def find_half(points: Sequence[Throughput]) -> float | None:
    """New compositions in a second where the throughput is half of the first point's, between measured points."""
    half = points[0].requests_per_second / 2
    for one, other in itertools.pairwise(points):
        if one.requests_per_second >= half > other.requests_per_second:
            part = (one.requests_per_second - half) / (one.requests_per_second - other.requests_per_second)
            return one.compositions_per_second + part * (other.compositions_per_second - one.compositions_per_second)
    return None


def _overhead(
    options: Options,
    pool: Pool,
    prompts: Prompts,
    gateway: httpx.Client,
    direct: httpx.Client,
    advance: Callable[[], None],
) -> Overhead:
    """Pairs of requests with one adapter, which is the same for both and which vLLM has loaded."""
    times: dict[str, list[float]] = {"gateway": [], "direct": [], "retrieval": []}
    for turn in range(options.pairs):
        (first,) = prompts.jobs(1, 1, words=_WORDS)
        routed = _chat(gateway, first.prompt, model="auto", lora={"k": 1, "threshold": 0})
        (adapter,) = (each["name"] for each in routed["lora"]["adapters"])
        model = pinned_name(compose_explicit("selection", {adapter: 1.0}), [pool.get(adapter).digest])
        # A new number in the same words: neither server knows the prompt, and both give it the same adapter.
        number = f"{turn + 10_000_000}"
        prompt = number + first.prompt[first.prompt.index(".") :]
        calls: dict[str, tuple[httpx.Client, dict[str, Any]]] = {
            "gateway": (gateway, {"model": "auto", "lora": {"k": 1, "threshold": 0}}),
            "direct": (direct, {"model": model}),
        }
        for name in calls if turn % 2 else reversed(calls):
            client, how = calls[name]
            begun = time.perf_counter()
            answer = _chat(client, f"{name[0]}{prompt}", **how)
            times[name].append(1000 * (time.perf_counter() - begun))
            if name == "gateway":
                times["retrieval"].append(answer["lora"]["milliseconds"]["retrieve"])
        advance()
    differences = [one - other for one, other in zip(times["gateway"], times["direct"], strict=True)]
    median = statistics.median
    return Overhead(median(times["gateway"]), median(times["direct"]), median(differences), median(times["retrieval"]))


def _chat(client: httpx.Client, prompt: str, max_tokens: int = 1, **how: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": prompt}]
    body = {"messages": messages, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True, **how}
    response = client.post("/v1/chat/completions", json=body)
    if response.status_code != 200:
        raise LoraRetrieverError(f"a request to {client.base_url} failed: {response.text[:500]}")
    answer: dict[str, Any] = response.json()
    return answer


class _Load:
    """So many requests at a time through the gateway, each for a composition that it names."""

    def __init__(self, options: Options, adapters: Sequence[str], prompts: Prompts, gateway: httpx.Client) -> None:
        self._options = options
        self._prompts = prompts
        self._gateway = gateway
        self._new = _compositions(adapters, options.k, random.Random(options.seed))
        self._known = [next(self._new) for _ in range(options.known)]
        self._run(self._known)

    def run(self, share: float, advance: Callable[[], None]) -> Throughput:
        """One turn, in which every so-manieth composition is new."""
        counts = [int((i + 1) * share) > int(i * share) for i in range(self._options.requests)]
        known = itertools.cycle(self._known)
        asked = [next(self._new) if is_new else next(known) for is_new in counts]
        seconds = self._run(asked)
        advance()
        return Throughput(share, len(asked) / seconds, sum(counts) / seconds)

    def _run(self, compositions: Sequence[Mapping[str, float]]) -> float:
        jobs = self._prompts.jobs(len(compositions), self._options.max_tokens, words=_WORDS)
        start = time.perf_counter()
        with ThreadPoolExecutor(self._options.concurrency) as threads:
            pairs = zip(jobs, compositions, strict=True)
            futures = [threads.submit(self._ask, job.prompt, composition) for job, composition in pairs]
            for future in futures:
                future.result()
        return time.perf_counter() - start

    def _ask(self, prompt: str, composition: Mapping[str, float]) -> None:
        _chat(self._gateway, prompt, self._options.max_tokens, model="auto", lora={"adapters": dict(composition)})


def _compositions(adapters: Sequence[str], k: int, chance: random.Random) -> Iterator[dict[str, float]]:
    """Mixtures of k random adapters with random weights; no two are the same."""
    while True:
        weights = [chance.random() + 0.1 for _ in range(min(k, len(adapters)))]
        chosen = chance.sample(adapters, len(weights))
        yield {name: weight / sum(weights) for name, weight in zip(chosen, weights, strict=True)}
