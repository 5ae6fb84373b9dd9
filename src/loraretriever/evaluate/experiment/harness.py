"""Runs methods over the stream, under each setting, and puts what came out into `Results`."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loraretriever.compose import get_strategy, weigh
from loraretriever.evaluate.experiment.answers import CHOICES, Answer
from loraretriever.evaluate.experiment.methods import Method
from loraretriever.evaluate.experiment.results import METRICS, PRIMARY, SETTINGS, CurvePoint, MethodInfo, TestPrompt
from loraretriever.evaluate.experiment.setup import Setup, timed_copies
from loraretriever.evaluate.metrics import score_all
from loraretriever.jsonl import read_jsonl
from loraretriever.types import BASE_COMPOSITION

TIMINGS = "timings.jsonl"
Scores = dict[tuple[str, str], NDArray[np.float64]]


@dataclass(frozen=True, slots=True)
class Timing:
    """One timed batch of a method, and one of the base model right before it."""

    method: str
    turn: int
    tokens: int
    seconds: float  # retrieval and composition included
    compose_seconds: float  # of all prompts together
    base_tokens: int
    base_seconds: float


def prepare(setup: Setup, methods: Sequence[Method]) -> list[Method]:
    """Fit and train what needs it, before the engine is made; methods that cannot be had here are left out."""
    return [method for method in methods if method.prepare(setup)]


def answer_all(setup: Setup, methods: Sequence[Method]) -> tuple[Scores, dict[str, float]]:
    """Scores of each method under each setting, and the mean number of adapters of its IID compositions."""
    scores: Scores = {}
    width: dict[str, float] = {}
    scorer = _Scorer()
    with (setup.folder / CHOICES).with_suffix(".tmp").open("w", encoding="utf-8") as choices:
        for method in methods:
            settings = [setting for setting in SETTINGS if setting in method.settings]
            composed = {setting: method.compose(setup, setup.prompts, setting) for setting in settings}
            # All settings at once, so that batches are full for longer.
            rows = [each for compositions in composed.values() for each in compositions]
            answers = method.answer(setup, method.info.title, setup.prompts * len(settings), rows)
            for place, (setting, compositions) in enumerate(composed.items()):
                for prompt, composition in zip(setup.prompts, compositions, strict=True):
                    choices.write(_choice(method.info.name, setting, prompt, setup.key(composition)))
                start = place * len(setup.prompts)
                own = answers[start : start + len(setup.prompts)]
                scores[method.info.name, setting] = scorer.score(setup.prompts, own)
            if "iid" in composed:
                width[method.info.name] = float(np.mean([len(each.adapters) for each in composed["iid"]]))
    (setup.folder / CHOICES).with_suffix(".tmp").replace(setup.folder / CHOICES)
    return scores, width


def _choice(method: str, setting: str, prompt: TestPrompt, composition: str) -> str:
    row = {"method": method, "setting": setting, "prompt": prompt.id, "composition": composition}
    return json.dumps(row) + "\n"


class _Scorer:
    """Scores answers, each distinct one once."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, str], tuple[float, ...]] = {}

    def score(self, prompts: Sequence[TestPrompt], answers: Sequence[Answer]) -> NDArray[np.float64]:
        """Shape: (prompts, METRICS)."""
        rows = []
        for prompt, answer in zip(prompts, answers, strict=True):
            key = prompt.id, answer.text
            if key not in self._known:
                self._known[key] = tuple(score_all(answer.text, prompt.targets))
            rows.append(self._known[key])
        return np.array(rows, dtype=np.float64).reshape(len(rows), len(METRICS))


def primary_mean(prompts: Sequence[TestPrompt], scores: NDArray[np.float64]) -> float:
    """Mean over tasks of the mean of each task's own metric, between 0 and 100."""
    by_task: dict[str, list[float]] = {}
    for prompt, row in zip(prompts, scores, strict=True):
        by_task.setdefault(prompt.task, []).append(float(row[METRICS.index(PRIMARY[prompt.metric])]))
    return 100 * float(np.mean([np.mean(values) for values in by_task.values()]))


def time_all(setup: Setup, methods: Sequence[Method]) -> dict[str, MethodInfo]:
    """Take the time of each method beside the base model's, in turns; turns that were taken before are kept."""
    file = setup.folder / TIMINGS
    known = [Timing(**row) for _, row in read_jsonl(file)] if file.is_file() else []
    done = {(timing.method, timing.turn) for timing in known}
    rounds = range(setup.options.timed_rounds)
    todo = [(turn, method) for turn in rounds for method in methods if (method.info.name, turn) not in done]
    if todo:
        with setup.stage("taking the time", len(todo)) as advance, file.open("a", encoding="utf-8") as stream:
            _warm_up(setup)
            for unique, (turn, method) in enumerate(todo, 2):
                timing = _time(setup, method, turn, unique)
                if timing is not None:
                    stream.write(json.dumps(asdict(timing)) + "\n")
                    stream.flush()
                    known.append(timing)
                advance()
    return {method.info.name: _with_times(method.info, known, setup.options.timed_prompts) for method in methods}


def _warm_up(setup: Setup) -> None:
    """The first batch pays for what is made once: models, the retrievers' state."""
    prompts = timed_copies(setup.prompts[: setup.options.timed_prompts], 1)
    setup.routes(prompts, "iid")
    setup.routes(prompts, "iid", "paper")
    setup.timed(prompts, [BASE_COMPOSITION] * len(prompts))


def _time(setup: Setup, method: Method, turn: int, unique: int) -> Timing | None:
    prompts = timed_copies(setup.prompts[: setup.options.timed_prompts], unique)
    base_start = time.perf_counter()
    base_tokens = setup.timed(prompts, [BASE_COMPOSITION] * len(prompts))
    start = time.perf_counter()
    compositions = method.compose(setup, prompts, "iid")
    composed = time.perf_counter()
    tokens = method.timed(setup, prompts, compositions)
    end = time.perf_counter()
    setup.forget(prompts)
    if tokens is None:
        return None
    return Timing(method.info.name, turn, tokens, end - start, composed - start, base_tokens, start - base_start)


def _with_times(info: MethodInfo, timings: Sequence[Timing], prompts: int) -> MethodInfo:
    own = [timing for timing in timings if timing.method == info.name]
    if not own:
        return info
    speeds = [each.tokens / each.seconds for each in own]
    relative = [speed * each.base_seconds / each.base_tokens for speed, each in zip(speeds, own, strict=True)]
    return replace(
        info,
        compose_seconds=float(np.median([each.compose_seconds for each in own])) / prompts,
        tokens_per_second=float(np.median(speeds)),
        relative_speed=float(np.median(relative)),
    )


def curve(setup: Setup) -> tuple[CurvePoint, ...]:
    """Quality against k, for mixture and fusion with uniform weights, on some prompts of each task."""
    taken: dict[str, int] = {}
    prompts = []
    for prompt in setup.prompts:
        taken[prompt.task] = taken.get(prompt.task, 0) + 1
        if taken[prompt.task] <= setup.options.curve_prompts:
            prompts.append(prompt)
    scorer = _Scorer()
    points = []
    for strategy, setting, k in _curve_points(setup):
        compositions = [
            get_strategy(strategy)(route.hits[:k], weigh(route.hits[:k], "uniform", 1.0))
            for route in setup.routes(prompts, setting)
        ]
        answers = setup.answer(f"{strategy}, k = {k}, {setting}", prompts, compositions)
        mean = primary_mean(prompts, scorer.score(prompts, answers))
        points.append(CurvePoint(strategy, setting, k, mean, len(prompts)))
    return tuple(points)


def _curve_points(setup: Setup) -> Iterator[tuple[str, str, int]]:
    for strategy in ("mixture", "fusion"):
        for setting in SETTINGS[:2]:
            for k in setup.options.curve_ks:
                yield strategy, setting, k


def rankings(setup: Setup) -> Mapping[str, tuple[tuple[str, ...], ...]]:
    """What both retrievers find for each prompt in the IID setting, best first.

    The adapters of one task count as one, under the name of its first: which of several near-duplicates is found
    first is no error.
    """
    first = {name: setup.catalogue.adapters_of(task)[0] for name, task in setup.catalogue.tasks.items()}
    return {
        name: tuple(
            tuple(dict.fromkeys(first[hit.adapter] for hit in route.hits))
            for route in setup.routes(setup.prompts, "iid", name)
        )
        for name in ("hybrid", "paper")
    }


def describe(setup: Setup) -> dict[str, Any]:
    """Facts for the report's head."""
    tasks = {prompt.task for prompt in setup.prompts}
    return {
        "prompts": len(setup.prompts),
        "tasks": len(tasks),
        "domains": len({prompt.domain for prompt in setup.prompts}),
        "adapters": len(setup.adapters),
        "k": setup.options.k,
        "seed": setup.options.seed,
        "base_model": setup.settings.base_model or setup.lr.pool.base_model,
        "dtype": setup.settings.dtype,
        "timed": f"{setup.options.timed_prompts} prompts, {setup.options.timed_tokens} new tokens each, "
        f"{setup.options.timed_rounds} rounds",
    }
