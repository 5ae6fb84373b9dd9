"""What a plan is made from: drawn requests, recorded ones, costs."""

from __future__ import annotations

import json
import logging
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loraretriever.errors import InvalidInputError
from loraretriever.evaluate.plan import measure
from loraretriever.evaluate.plan.costs import Footprint, StepCosts, read_machine
from loraretriever.evaluate.plan.fleet import Deployment, simulate
from loraretriever.evaluate.plan.measure import Case, fit_costs, sizes_for
from loraretriever.evaluate.plan.trace import Trace, read_trace
from loraretriever.evaluate.plan.workload import Lengths, Workload, popularity
from loraretriever.server import logs
from loraretriever.server.observe import Record
from loraretriever.types import Generation
from tiny import write_peft_folder
from tiny_text import write_base_model

COSTS = StepCosts(
    step=0.02,
    row=0.004,
    prompt=0.002,
    tokens_2=0.01,
    tokens_8=0.02,
    chunk=0.005,
    pair=1e-5,
    adapted=0.003,
    adapter=1e-3,
    use=1e-4,
)
FOOTPRINT = Footprint(weights=1000, adapter=100, token=10)


# Drawn requests


def test_arrivals_lengths_and_adapters_are_those_asked_for() -> None:
    workload = Workload(5.0, 20_000, pool=50, zipf=1.2, prompt=Lengths(10, 100), answer=Lengths(7, 7))
    calls = workload.calls()
    assert calls == workload.calls()
    gaps = np.diff([call.arrival for call in calls])
    assert np.mean(gaps) == pytest.approx(0.2, rel=0.03)
    assert np.std(gaps) == pytest.approx(0.2, rel=0.03)
    prompts = [call.prompt for call in calls]
    assert (min(prompts), max(prompts)) == (10, 100)
    assert np.mean(prompts) == pytest.approx(90 / math.log(10), rel=0.03)
    assert {call.answer for call in calls} == {7}
    counts = Counter(call.adapters[0] for call in calls)
    shares = np.array([counts[adapter] for adapter in range(50)]) / len(calls)
    assert np.abs(shares - popularity(50, 1.2)).max() < 0.01


@pytest.mark.parametrize(("pool", "k"), ((3, 3), (40, 3), (200, 5)))
def test_a_request_has_k_distinct_adapters(pool: int, k: int) -> None:
    for call in Workload(1.0, 500, pool=pool, zipf=2.0, k=k).calls():
        assert len(set(call.adapters)) == len(call.adapters) == k
        assert max(call.adapters) < pool


def test_a_faster_workload_has_the_same_requests() -> None:
    slow, fast = Workload(1.0, 100, k=2).calls(), Workload(4.0, 100, k=2).calls()
    for one, other in zip(slow, fast, strict=True):
        assert one.arrival == pytest.approx(4 * other.arrival)
        assert (one.adapters, one.prompt, one.answer) == (other.adapters, other.prompt, other.answer)


@pytest.mark.parametrize(
    ("make", "message"),
    (
        (lambda: Workload(rate=0), "rate is 0; expected a finite number above 0"),
        (lambda: Workload(requests=0), "requests is 0"),
        (lambda: Workload(zipf=-1), "zipf is -1; expected from 0"),
        (lambda: Workload(pool=2, k=3), "k is 3; expected from 0 to the pool's size"),
        (lambda: Lengths(0, 5), "a range of tokens is 0 to 5"),
        (lambda: Lengths(6, 5), "a range of tokens is 6 to 5"),
    ),
)
def test_workloads_that_cannot_be_drawn_are_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        make()


# Recorded requests


def write(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_trace_is_read_by_arrival(tmp_path: Path) -> None:
    file = write(
        tmp_path / "trace.jsonl",
        {"time": 12.5, "adapters": ["sql", "german"], "prompt_tokens": 30, "completion_tokens": 8},
        {"time": 10.0, "composition": "mixture(german=0.3,sql=0.7)", "prompt_tokens": 5, "completion_tokens": 0},
        {"time": 13.0, "composition": "base", "prompt_tokens": 5, "completion_tokens": 3, "finish_reason": "stop"},
    )
    trace = read_trace(file)
    assert [call.arrival for call in trace.calls] == [0.0, 2.5, 3.0]
    assert [call.adapters for call in trace.calls] == [(0, 1), (0, 1), ()]
    assert [(call.prompt, call.answer) for call in trace.calls] == [(5, 1), (30, 8), (5, 4)]
    assert trace.adapters == 2
    assert trace.rate == pytest.approx(2 / 3)
    assert [call.arrival for call in trace.at(2.0).calls] == pytest.approx([0.0, 2.5 / 3, 1.0])


def test_the_servers_log_is_a_trace(tmp_path: Path) -> None:
    """The lines are made by the server's own formatter; they are written when a request has ended."""
    lines = []
    for seconds in (0.25, 2.0):
        record = Record("r")
        record.composed("mixture(sql=0.75,german=0.25)", False)
        record.answered(Generation("text", "stop", 21, 4, seconds), 0)
        entry = logging.makeLogRecord({"name": "loraretriever.access", "created": 1000.0 + seconds, "msg": "done"})
        setattr(entry, logs.FIELDS, {"route": "/v1/completions", "seconds": seconds} | record.finish())
        lines.append(json.loads(logs.JsonFormatter().format(entry)))
    quiet = {"time": "2026-01-01T00:00:00Z", "logger": "loraretriever.access", "route": "/v1/models", "seconds": 0.1}
    other = {"time": "2026-01-01T00:00:00Z", "logger": "uvicorn.error", "message": "started"}
    several = lines[0] | {"composition": "several"}
    trace = read_trace(write(tmp_path / "server.log", other, lines[1], quiet, several, lines[0]))
    assert [call.arrival for call in trace.calls] == pytest.approx([0.0, 0.0], abs=2e-3)
    assert [(call.adapters, call.prompt, call.answer) for call in trace.calls] == [((0, 1), 21, 5)] * 2


@pytest.mark.parametrize(
    ("change", "message"),
    (
        ({"time": "yesterday"}, r":2: time is 'yesterday'; expected seconds, or a date and time"),
        ({"time": None}, r":2: time is None; expected a number"),
        ({"prompt_tokens": "many"}, r":2: prompt_tokens is 'many'; expected a number, 0 or more"),
        ({"prompt_tokens": None}, r":2: prompt_tokens is None"),
        ({"completion_tokens": -1}, r":2: completion_tokens is -1"),
        ({"seconds": True}, r":2: seconds is True"),
        ({"adapters": "sql"}, r":2: adapters is 'sql'; expected a list of names"),
        ({"composition": "mixture(sql"}, r":2: 'mixture\(sql' is no composition"),
        ({"composition": None}, r":2: composition is None; expected one such as mixture"),
    ),
)
def test_a_line_of_another_form_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    row = {"time": 1.0, "composition": "sql", "prompt_tokens": 5, "completion_tokens": 3}
    with pytest.raises(InvalidInputError, match=message):
        read_trace(write(tmp_path / "trace.jsonl", row, row | change))


def test_a_trace_without_requests_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="has no request with prompt_tokens"):
        read_trace(write(tmp_path / "trace.jsonl", {"time": 1.0}))


def test_requests_that_arrive_at_once_have_no_other_rate(tmp_path: Path) -> None:
    row = {"time": 1.0, "composition": "sql", "prompt_tokens": 5, "completion_tokens": 3}
    trace: Trace = read_trace(write(tmp_path / "trace.jsonl", row, row))
    assert trace.rate == 0.0
    with pytest.raises(InvalidInputError, match="expected both above 0"):
        trace.at(2.0)


# Costs


def test_costs_are_read_as_they_are_written(tmp_path: Path) -> None:
    content = {"costs": asdict(COSTS), "footprint": asdict(FOOTPRINT), "fit": "whatever"}
    machine = read_machine(write(tmp_path / "costs.json", content))
    assert (machine.costs, machine.footprint) == (COSTS, FOOTPRINT)


@pytest.mark.parametrize(
    ("content", "message"),
    (
        ("{", "cannot read the costs in .*; expected a JSON file"),
        ("[]", "costs has None; expected an object with prompt, row, step, and perhaps"),
        ('{"costs": {"step": 1}}', r"costs has \['step'\]; expected an object"),
        ('{"costs": {"step": 1, "row": 1, "prompt": 1, "magic": 1}}', "magic"),
        ('{"costs": {"step": 1, "row": -1, "prompt": 1}}', "the cost row is -1; expected a number of seconds"),
        ('{"costs": {"step": 0, "row": 0, "prompt": 1}}', "step and row are both 0"),
        ('{"costs": {"step": 1, "row": 1, "prompt": 1}}', "footprint has None"),
        (
            '{"costs": {"step": 1, "row": 1, "prompt": 1}, "footprint": {"weights": 1.5, "adapter": 1, "token": 1}}',
            "the size weights is 1.5",
        ),
    ),
)
def test_other_costs_are_refused(tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "costs.json"
    file.write_text(content)
    with pytest.raises(InvalidInputError, match=message):
        read_machine(file)


def test_costs_are_found_from_the_times_of_batches() -> None:
    seconds = [
        simulate(Deployment(sizes=sizes_for(measure.CASES, case.running)), COSTS, case.calls()).totals.busy
        for case in measure.CASES
    ]
    found, errors = fit_costs(measure.CASES, seconds)
    assert asdict(found) == pytest.approx(asdict(COSTS), rel=1e-4)
    assert max(map(abs, errors)) < 1e-4


def test_a_machine_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORARETRIEVER_CACHE", str(tmp_path / "cache"))
    write_base_model(tmp_path / "base")
    write_peft_folder(tmp_path / "pool" / "sql", base_model=str(tmp_path / "base"))
    cases = (Case(1, 4, 4), Case(4, 4, 4), Case(2, 24, 2), Case(4, 8, 3, 2, 6), Case(6, 8, 4, 1, 3, running=2))
    options = measure.Options(tmp_path / "pool", rounds=1, cases=cases)
    advanced = []
    found = measure.measure(options, lambda: advanced.append(None))
    assert len(advanced) == measure.count_steps(options)
    assert found.costs.step + found.costs.row > 0
    assert len(found.fit.seconds) == len(found.fit.relative_errors) == len(cases)
    assert found.footprint.adapter > 0
    assert found.footprint.weights > found.footprint.token > 0


def test_a_model_too_small_to_measure_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORARETRIEVER_CACHE", str(tmp_path / "cache"))
    write_base_model(tmp_path / "base")
    write_peft_folder(tmp_path / "pool" / "sql", base_model=str(tmp_path / "base"))
    with pytest.raises(InvalidInputError, match="expected 100001 at least"):
        measure.measure(measure.Options(tmp_path / "pool", cases=(Case(1, 100_000, 1),)))
