"""What a benchmark of the server reports: figures with and without it, and their ratios."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from loraretriever.evaluate.engine_report import Percentiles, Spread, spread
from loraretriever.evaluate.environment import Environment
from loraretriever.evaluate.server_drivers import Served, Turn

SERVER, ALONE = "server", "alone"
_DIGITS = 4

# (contender, requests at a time) -> its turns, one per round
Turns = Mapping[tuple[str, int], Sequence[Turn]]


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much is measured: `waves` times as many requests as there are at a time, but at least `least_requests`.

    `pairs`: requests of one token, of each kind, for the server's own time.
    """

    concurrencies: tuple[int, ...] = (1, 8, 32)
    waves: int = 5
    least_requests: int = 12
    max_tokens: int = 32
    pairs: int = 100

    def requests(self, concurrency: int) -> int:
        """Of one turn."""
        return max(self.least_requests, self.waves * concurrency)


@dataclass(frozen=True, slots=True)
class Figures:
    """One contender, so many requests at a time.

    Tokens are generated ones. `first_token_seconds` is from the request to its first token at the client,
    `token_seconds` the time for each after it. `cpu_ms_*` is processor time by process: all threads of it, those that
    wait for the others of a product among them, because they do not sleep.
    """

    requests_per_second: Spread
    tokens_per_second: Spread
    first_token_seconds: Percentiles | None
    token_seconds: Percentiles | None
    cpu_ms_per_request: Mapping[str, Spread]
    cpu_ms_per_token: Mapping[str, Spread]


@dataclass(frozen=True, slots=True)
class OwnTime:
    """What the server adds to a request of one token, one request at a time, in milliseconds.

    `median` of the differences between the server's time and the engine's for the same prompt, both measured where the
    answer is read; `values` has all of them.
    """

    median: float
    p95: float
    server_p50: float
    alone_p50: float
    values: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class SetUp:
    """What was measured, where and how. Load averages are of one minute."""

    environment: Environment
    base_model: str
    dtype: str
    pool: str
    adapters: int
    seed: int
    rounds: int
    quick: bool
    sizes: Sizes
    load_average_before: float
    load_average_after: float
    seconds: float


@dataclass(frozen=True, slots=True)
class Agreement:
    """Shares of the requests for which both chose the same composition, and gave the same text.

    Texts part where two tokens are equally probable up to rounding, which depends on what else is in a batch.
    """

    compositions: float
    texts: float


@dataclass(frozen=True, slots=True)
class ServerReport:
    """`ratios` by their name: server / engine alone in the same round, of requests per second and of processor time.

    `own_ms` has the kinds `whole` and `stream`, by how the server sent its answer.
    """

    set_up: SetUp
    ratios: Mapping[str, Spread]
    own_ms: Mapping[str, OwnTime]
    figures: Mapping[str, Mapping[str, Figures]]
    agreement: Agreement


def find_figures(turns: Turns) -> dict[str, dict[str, Figures]]:
    """By contender and requests at a time."""
    figures: dict[str, dict[str, Figures]] = {}
    for (contender, concurrency), own in turns.items():
        served = [each for turn in own for each in turn.served]
        per_token = [
            (each.end - each.first) / (each.tokens - 1) for each in served if each.first is not None and each.tokens > 1
        ]
        names = own[0].cpu_seconds
        figures.setdefault(contender, {})[f"c{concurrency}"] = Figures(
            spread([_requests_per_second(turn) for turn in own]),
            spread([_tokens(turn) / turn.seconds for turn in own]),
            _percentiles([each.first - each.start for each in served if each.first is not None]),
            _percentiles(per_token),
            {name: spread([1e3 * turn.cpu_seconds[name] / len(turn.served) for turn in own]) for name in names},
            {name: spread([1e3 * turn.cpu_seconds[name] / _tokens(turn) for turn in own]) for name in names},
        )
    return figures


def find_ratios(turns: Turns) -> dict[str, Spread]:
    """Of the server and the engine alone in the same round.

    Semantics: values[r] = figure of the server in round r / figure of the engine alone in round r.
    """
    ratios = {}
    for concurrency in dict.fromkeys(concurrency for _, concurrency in turns):
        pairs = list(zip(turns[SERVER, concurrency], turns[ALONE, concurrency], strict=True))
        ratios[f"requests_per_second_c{concurrency}"] = spread(
            [_requests_per_second(server) / _requests_per_second(alone) for server, alone in pairs]
        )
        # Both answer the same requests with as many tokens each, so this is the ratio per request and per token.
        ratios[f"cpu_c{concurrency}"] = spread([_own_cpu(server) / _own_cpu(alone) for server, alone in pairs])
    return ratios


def find_own_time(server: Sequence[Served], alone: Sequence[Served]) -> OwnTime:
    """Of the same requests, one by one."""
    ours = [1e3 * (each.end - each.start) for each in server]
    others = [1e3 * (each.end - each.start) for each in alone]
    differences = [one - other for one, other in zip(ours, others, strict=True)]
    median, p95 = (round(float(np.percentile(differences, q)), 3) for q in (50, 95))
    server_p50, alone_p50 = (round(float(np.median(times)), 3) for times in (ours, others))
    return OwnTime(median, p95, server_p50, alone_p50, tuple(round(value, 3) for value in differences))


def find_agreement(turns: Turns) -> Agreement:
    """Of all requests of all turns."""
    pairs = [
        pair
        for (contender, concurrency), own in turns.items()
        if contender == SERVER
        for turn, other in zip(own, turns[ALONE, concurrency], strict=True)
        for pair in zip(turn.served, other.served, strict=True)
    ]
    compositions = sum(one.composition == other.composition for one, other in pairs)
    texts = sum(one.text == other.text for one, other in pairs)
    return Agreement(round(compositions / len(pairs), _DIGITS), round(texts / len(pairs), _DIGITS))


def _requests_per_second(turn: Turn) -> float:
    return len(turn.served) / turn.seconds


def _tokens(turn: Turn) -> int:
    return sum(each.tokens for each in turn.served)


def _own_cpu(turn: Turn) -> float:
    """Processor seconds of what answers, without the load generator."""
    return next(seconds for name, seconds in turn.cpu_seconds.items() if name != "load generator")


def _percentiles(values: Sequence[float]) -> Percentiles | None:
    if not values:
        return None
    return Percentiles(*(round(float(np.percentile(values, q)), _DIGITS) for q in (50, 95, 99)))
