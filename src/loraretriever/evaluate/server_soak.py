"""A soak test of the server: many clients under load while its adapters are added, updated and deleted.

A few *contents* are adapters with samples. Some names have one of two contents in turn, others come and go. Answers are
short and greedy, so the engine alone can answer everything beforehand that a client may be told: an answer is right if
it is that of contents which the names had at some moment between the request and its answer.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import random
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

import httpx
import numpy as np

from loraretriever.evaluate.server_soak_answers import History, Mix, References
from loraretriever.evaluate.server_soak_changes import ALTERNATING, PASSING, Changer, Content, Memory, MemoryWatch
from loraretriever.evaluate.server_soak_clients import Client, Log, bad_requests
from loraretriever.pipeline import LoraRetriever
from loraretriever.pool.peft_config import CONFIG_FILE

CONTENTS = 5
_MODELS = {"mixture(a0=0.7,a1=0.3)": ("mixture", (0.7, 0.3)), "fusion(a0=0.5,a1=0.5)": ("fusion", (0.5, 0.5))}
_CALM_SECONDS = 60.0  # for the server to end what it does, once the last client has gone
_POLL_SECONDS = 0.1
_MOST_PROBLEMS = 200  # after which it ends
_RESTLESS = ("num_requests_running", "num_requests_waiting", "kv_cache_tokens_used")  # 0 when nothing runs
_SHOWN = ("adapter_slots", "adapter_slots_used", "adapter_host_bytes", "kv_cache_tokens")
_COUNTED = ("adapter_slot_loads_total", "adapter_loads_total", "adapter_evictions_total", "num_preemptions_total")


@dataclass(frozen=True, slots=True)
class Options:
    """How long and how hard. It ends after `seconds` or `requests`, whichever comes first.

    `change_seconds`: from one round of changes to the next (0: at once); `patience`: after so many seconds a request
    hangs. Memory counts from `warm_up` seconds on; it may grow by `growth_mib`.
    """

    seconds: float = 300.0
    requests: int | None = None
    clients: int = 50
    change_seconds: float = 1.0
    max_tokens: int = 8
    patience: float = 120.0
    warm_up: float = 60.0
    growth_mib: float = 64.0
    seed: int = 0


@dataclass(frozen=True, slots=True)
class SoakReport:
    """What happened. `problems` and `unrest` are empty if all is well.

    `requests`: by kind and outcome; `changes`: those that were made, by kind; `calm`: the server's figures at the end.
    `indistinct`: pairs of references that could be taken for each other, of `references` in all.
    """

    requests: Mapping[str, Mapping[str, int]]
    changes: Mapping[str, int]
    problems: Mapping[str, int]
    examples: Sequence[str]
    unrest: Sequence[str]
    seconds: float
    latency_p50: float
    latency_p99: float
    latency_max: float
    memory: Memory | None
    calm: Mapping[str, float]
    references: int
    indistinct: int
    greatest_difference: float

    @property
    def is_well(self) -> bool:
        """Whether nothing went wrong."""
        return not self.problems and not self.unrest


def initial_contents(contents: Sequence[Content]) -> dict[str, Content]:
    """What names the server's pool has at the beginning, and with which contents."""
    return {name: contents[places[0]] for name, places in ALTERNATING.items()}


def make_references(
    retriever: LoraRetriever, contents: Sequence[Content], prompts: Sequence[str], max_tokens: int
) -> References:
    """All answers that may come. The retriever's pool has the contents under their own names."""
    names = [content.name for content in contents]
    mixes = [Mix.of("", ()), *(Mix.of("mixture", [(name, 1.0)]) for name in names)]
    mixes += [Mix.of("mixture", [(one, 0.5), (other, 0.5)]) for one, other in itertools.combinations(names, 2)]
    for strategy, weights in _MODELS.values():
        for places in itertools.product(*ALTERNATING.values()):
            mixes.append(Mix.of(strategy, zip((names[place] for place in places), weights, strict=True)))
    references = References()
    references.make(retriever, mixes, prompts, max_tokens)
    return references


async def soak(
    url: str,
    contents: Sequence[Content],
    prompts: Sequence[str],
    references: References,
    options: Options,
    pid: int | None = None,
) -> SoakReport:
    """Send requests and change adapters until the time is over; then look whether the server comes to rest.

    `pid`: of the server's process, whose memory is watched.
    """
    log = Log()
    initial = {name: content.name for name, content in initial_contents(contents).items()}
    history = History.of({**dict.fromkeys(PASSING), **initial})
    models = {"adapter": [*ALTERNATING, *PASSING], "composition": list(_MODELS)}
    bad = bad_requests((contents[0].folder / CONFIG_FILE).read_bytes())
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=options.clients)
    async with httpx.AsyncClient(base_url=url, timeout=None, limits=limits, trust_env=False) as http:
        clients = [
            Client(
                http, log, history, references, prompts, models, bad, options.max_tokens, options.patience,
                f"{options.seed} {place}",
            )
            for place in range(options.clients)
        ]  # fmt: skip
        changer = Changer(http, log, history, contents, random.Random(f"{options.seed} changes"))
        watch = MemoryWatch(pid, options.warm_up)
        start = time.perf_counter()
        is_over = asyncio.Event()

        async def keep_sending(client: Client) -> None:
            while not is_over.is_set():
                await client.send()
                is_enough = options.requests is not None and log.requests >= options.requests
                if is_enough or log.problems.total() >= _MOST_PROBLEMS:
                    is_over.set()

        others = [asyncio.ensure_future(each) for each in (changer.run(options.change_seconds, is_over), watch.run())]
        asyncio.get_running_loop().call_later(options.seconds, is_over.set)
        await asyncio.gather(*(keep_sending(client) for client in clients))
        await others[0]
        seconds = time.perf_counter() - start
        others[1].cancel()
        with suppress(asyncio.CancelledError):
            await others[1]
        try:
            calm, unrest = await _find_calm(http)
        except httpx.HTTPError as error:
            calm, unrest = {}, [f"the server does not say what it does: {error!r}"]
    memory = watch.memory()
    if memory is not None and memory.end - memory.start > options.growth_mib:
        unrest.append(f"memory grew by {memory.end - memory.start:.0f} MiB; expected {options.growth_mib:.0f} at most")
    return SoakReport(
        requests={kind: dict(sorted(outcomes.items())) for kind, outcomes in sorted(log.outcomes.items())},
        changes=dict(changer.made),
        problems=dict(log.problems),
        examples=log.examples,
        unrest=unrest,
        seconds=round(seconds, 1),
        **_latencies(log.seconds),
        memory=memory,
        calm=calm,
        references=len(references),
        indistinct=references.indistinct(),
        greatest_difference=round(references.greatest_difference, 6),
    )


async def _find_calm(http: httpx.AsyncClient) -> tuple[dict[str, float], list[str]]:
    """The server's figures when it has come to rest, and what has not."""
    end = time.perf_counter() + _CALM_SECONDS
    while True:
        figures = (await http.get("/v1/stats")).json()
        gauges = {name: sum(each["value"] for each in series) for name, series in figures["gauges"].items()}
        jobs = (await http.get("/v1/jobs", params={"limit": 1000})).json()["data"]
        unfinished = sum(job["state"] in ("queued", "running") for job in jobs)
        still = {name: gauges[name] for name in _RESTLESS}
        still |= {"jobs_unfinished": unfinished, "http_requests_open": gauges["http_requests_open"] - 1}  # ours
        if not any(still.values()) or time.perf_counter() > end:
            break
        await asyncio.sleep(_POLL_SECONDS)
    calm = {**still, **{name: gauges[name] for name in _SHOWN}, "jobs": len(jobs)}
    calm |= {name: sum(each["value"] for each in figures["counters"][name]) for name in _COUNTED}
    unrest = {name: value for name, value in still.items() if value}
    return calm, [f"{name} is {value:g} after {_CALM_SECONDS:.0f} s; expected 0" for name, value in unrest.items()]


def _latencies(seconds: Sequence[float]) -> dict[str, float]:
    values = seconds or [math.nan]
    p50, p99, most = (round(float(np.percentile(values, q)), 3) for q in (50, 99, 100))
    return {"latency_p50": p50, "latency_p99": p99, "latency_max": most}
