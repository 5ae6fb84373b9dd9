from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_open
from prometheus_client.parser import text_string_to_metric_families as parse

from loraretriever.server.metrics import FAMILIES, MOST_ADAPTERS, OTHER_ADAPTERS, PREFIX, Metrics
from loraretriever.types import Adapter, EngineStats, Generation, Route

OPEN_METRICS = "application/openmetrics-text; version=1.0.0,text/plain;q=0.5"


def adapter(name: str, tenant: str | None = None, enabled: bool = True) -> Adapter:
    created = datetime.now(UTC)
    return Adapter(name, 1, "0" * 64, Path("a"), "base", enabled, "", (), "", created, (8,), ("q_proj",), 1, 1, tenant)


class FakePool:
    """A pool of which only the adapters are known."""

    def __init__(self, *adapters: Adapter) -> None:
        self.adapters = list(adapters)
        self.change = 1
        self.reads = 0

    def list(self) -> list[Adapter]:
        self.reads += 1
        return self.adapters

    def put(self, *adapters: Adapter) -> None:
        self.adapters = [*adapters]
        self.change += 1


def engine_stats(**figures: object) -> EngineStats:
    given = {
        "running": 3,
        "waiting": 2,
        "batch_size": 8,
        "queue": 16,
        "slots": 4,
        "slots_used": 1,
        "cache_tokens": 1000,
        "cache_tokens_used": 100,
        "host_bytes": 5,
    }
    return EngineStats(**given | figures)  # type: ignore[arg-type]


def generation(**changes: object) -> Generation:
    whole = Generation("text", "stop", 10, 5, 1.0, first_token_seconds=0.6, queue_seconds=0.2)
    return dataclasses.replace(whole, **changes)  # type: ignore[arg-type]


def samples(metrics: Metrics) -> dict[str, float]:
    """All samples of ours as Prometheus reads them, by name without prefix, and labels."""
    text = metrics.text("")[0].decode()
    found = {}
    for family in parse(text):
        for name, labels, value, *_ in family.samples:
            shown = ",".join(f"{key}={labels[key]}" for key in sorted(labels))
            found[name.removeprefix(PREFIX) + (f"{{{shown}}}" if shown else "")] = value
    return found


def test_requests_by_endpoint_method_and_status() -> None:
    metrics = Metrics()
    for status in (200, 200, 404):
        metrics.request_started()
        metrics.request_done("/v1/route", "POST", status, 0.2)
    metrics.request_started()
    found = samples(metrics)
    assert found["http_requests_total{endpoint=/v1/route,method=POST,status=200}"] == 2
    assert found["http_requests_total{endpoint=/v1/route,method=POST,status=404}"] == 1
    assert found["http_request_duration_seconds_count{endpoint=/v1/route}"] == 3
    assert found["http_request_duration_seconds_sum{endpoint=/v1/route}"] == pytest.approx(0.6)
    assert found["http_request_duration_seconds_bucket{endpoint=/v1/route,le=0.1}"] == 0
    assert found["http_request_duration_seconds_bucket{endpoint=/v1/route,le=0.25}"] == 3
    assert found["http_requests_open"] == 1


def test_a_client_cannot_make_up_methods() -> None:
    metrics = Metrics()
    for number in range(50):
        metrics.request_done("unknown", f"FETCH{number}", 405, 0.1)
    assert samples(metrics)["http_requests_total{endpoint=unknown,method=other,status=405}"] == 50


def test_answers() -> None:
    metrics = Metrics()
    metrics.answered(generation(), retrieval_seconds=0.5)
    metrics.answered(generation(finish_reason="length", completion_tokens=1, seconds=0.6))
    metrics.answered(
        generation(finish_reason="aborted", completion_tokens=0, first_token_seconds=None, queue_seconds=None)
    )
    found = samples(metrics)
    assert found["request_success_total{finished_reason=stop}"] == 1
    assert found["request_success_total{finished_reason=aborted}"] == 1
    assert found["e2e_request_latency_seconds_sum"] == pytest.approx(1.5 + 0.6 + 1.0)
    assert found["time_to_first_token_seconds_count"] == 2
    assert found["time_to_first_token_seconds_sum"] == pytest.approx(1.1 + 0.6)
    assert found["request_queue_time_seconds_count"] == 2
    assert found["request_time_per_output_token_seconds_count"] == 1  # one token has nothing after it
    assert found["request_time_per_output_token_seconds_sum"] == pytest.approx(0.1)
    assert found["request_generation_tokens_sum"] == 6


def test_the_share_of_fallbacks_follows_from_two_counters() -> None:
    metrics = Metrics()
    metrics.routed(Route("a", (), fallback=True), 0.002)
    metrics.routed(Route("b", (), fallback=False), 0.002)
    found = samples(metrics)
    assert found["routed_prompts_total"] == 2
    assert found["fallbacks_total"] == 1
    assert found["retrieval_seconds_count"] == 2


def test_rejections_and_jobs() -> None:
    metrics = Metrics()
    metrics.rejected("rate_limit")
    metrics.job("add", "queued")
    metrics.job("add", "failed")
    found = samples(metrics)
    assert found["requests_rejected_total{reason=rate_limit}"] == 1
    assert found["jobs_total{kind=add,state=failed}"] == 1


def test_the_engine_is_followed_by_differences() -> None:
    metrics = Metrics()
    now = engine_stats(steps=10, step_sequences=30, batch_sizes=((1, 2), (4, 8), (512, 0)), generated_tokens=30)
    metrics.follow(lambda: now)
    assert samples(metrics)["generation_tokens_total"] == 30
    now = engine_stats(
        running=0, steps=13, step_sequences=1034, batch_sizes=((1, 3), (4, 9), (512, 0)), generated_tokens=37
    )
    found = samples(metrics)
    assert found["generation_tokens_total"] == 37
    assert found["num_requests_running"] == 0
    assert found["engine_steps_total"] == 13
    assert found["engine_step_sequences_count"] == 13
    assert found["engine_step_sequences_sum"] == 1034
    assert found["engine_step_sequences_bucket{le=1.0}"] == 3
    assert found["engine_step_sequences_bucket{le=2.0}"] == 3
    assert found["engine_step_sequences_bucket{le=4.0}"] == 12
    assert found["engine_step_sequences_bucket{le=256.0}"] == 12
    assert found["engine_step_sequences_bucket{le=+Inf}"] == 13  # one step was larger than the engine's bounds


def test_counters_do_not_fall_when_the_engine_is_another_one() -> None:
    metrics = Metrics()
    now: EngineStats | None = None
    metrics.follow(lambda: now)
    assert samples(metrics)["generation_tokens_total"] == 0
    now = engine_stats(steps=10, generated_tokens=30)
    samples(metrics)
    now = engine_stats(steps=2, generated_tokens=5)
    assert samples(metrics)["generation_tokens_total"] == 35


def test_every_figure_of_the_engine_is_shown() -> None:
    counters = {
        field.name: place
        for place, field in enumerate(dataclasses.fields(EngineStats), start=100)
        if field.name not in ("batch_sizes", "batch_size", "queue")
    }
    metrics = Metrics()
    metrics.follow(lambda: engine_stats(**counters))
    assert set(counters.values()) <= set(samples(metrics).values())


def test_adapters_have_their_tenant_and_vanish_with_the_pool_s() -> None:
    metrics = Metrics()
    pool = FakePool(adapter("sql"), adapter("acme:sql", "acme"), adapter("own", "acme", enabled=False))
    metrics.follow(lambda: None, pool, "base")
    for name in ("sql", "acme:sql", "acme:sql", "own"):
        metrics.adapter_used(name)
    found = samples(metrics)
    assert found["adapter_used_total{adapter=sql,tenant=}"] == 1
    assert found["adapter_used_total{adapter=acme:sql,tenant=acme}"] == 2
    assert found["adapter_used_total{adapter=own,tenant=acme}"] == 1
    assert found["pool_adapters{enabled=true}"] == 2
    assert found["pool_adapters{enabled=false}"] == 1
    pool.put(adapter("sql"))
    metrics.adapter_used("own")  # a request that began before the removal
    found = samples(metrics)
    assert [name for name in found if name.startswith("adapter_used")] == ["adapter_used_total{adapter=sql,tenant=}"]
    assert found["pool_adapters{enabled=false}"] == 0


def test_the_pool_is_read_only_when_it_has_changed() -> None:
    metrics = Metrics()
    pool = FakePool(adapter("sql"))
    metrics.follow(lambda: None, pool)
    samples(metrics)
    samples(metrics)
    assert pool.reads == 1
    pool.put(adapter("sql"), adapter("new"))
    assert samples(metrics)["pool_adapters{enabled=true}"] == 2
    assert pool.reads == 2


def test_a_pool_that_takes_long_to_read_is_read_rarely(monkeypatch: pytest.MonkeyPatch) -> None:
    now, busy = 100.0, 0.0

    class Slow(FakePool):
        def list(self) -> list[Adapter]:
            nonlocal busy
            busy += 1.0
            return super().list()

    monkeypatch.setattr("loraretriever.server.metrics.time.monotonic", lambda: now)
    monkeypatch.setattr("loraretriever.server.metrics.time.thread_time", lambda: busy)
    metrics = Metrics()
    pool = Slow(adapter("sql"))
    metrics.follow(lambda: None, pool)
    metrics.figures()
    pool.put()
    now += 19
    metrics.figures()
    assert pool.reads == 1
    now += 2
    metrics.figures()
    assert pool.reads == 2


def test_a_pool_that_cannot_be_read_takes_no_figures_away(caplog: pytest.LogCaptureFixture) -> None:
    class Broken(FakePool):
        def list(self) -> list[Adapter]:
            raise OSError("disk I/O error")

    metrics = Metrics()
    metrics.follow(lambda: None, Broken())
    metrics.rejected("overloaded")
    assert samples(metrics)["requests_rejected_total{reason=overloaded}"] == 1
    assert "cannot be read" in caplog.text


def test_adapters_beyond_the_most_are_counted_together_and_take_the_place_of_removed_ones() -> None:
    metrics = Metrics()
    names = [f"a{number}" for number in range(MOST_ADAPTERS + 5)]
    pool = FakePool(*map(adapter, names))
    metrics.follow(lambda: None, pool)
    for name in names:
        metrics.adapter_used(name)
    series = {name: value for name, value in samples(metrics).items() if name.startswith("adapter_used")}
    assert len(series) == MOST_ADAPTERS + 1
    assert series[f"adapter_used_total{{adapter={OTHER_ADAPTERS},tenant=}}"] == 5
    pool.put(*map(adapter, names[10:]))
    samples(metrics)
    metrics.adapter_used(names[-1])
    assert samples(metrics)[f"adapter_used_total{{adapter={names[-1]},tenant=}}"] == 1


def test_two_servers_in_one_process_share_nothing() -> None:
    one, other = Metrics(), Metrics()
    one.rejected("overloaded")
    assert not any(name.startswith("requests_rejected") for name in samples(other))


@pytest.mark.parametrize(
    ("accept", "content_type", "read"),
    [
        ("", "text/plain", parse),
        ("text/html,*/*", "text/plain", parse),
        (OPEN_METRICS, "application/openmetrics-text", parse_open),
    ],
)
def test_both_formats_can_be_read(accept: str, content_type: str, read: Callable[[str], object]) -> None:
    metrics = Metrics()
    metrics.follow(lambda: engine_stats(steps=1, step_sequences=3, batch_sizes=((4, 1),)), FakePool(adapter('a"\\\n')))
    metrics.adapter_used('a"\\\n')
    metrics.answered(generation())
    metrics.request_done("/v1/route", "POST", 200, 0.2)
    body, found = metrics.text(accept)
    assert found.startswith(content_type)
    names = {family.name for family in read(body.decode())}  # type: ignore[attr-defined]
    assert {family.name.removesuffix("_total") for family in FAMILIES} <= names
    assert "process_resident_memory_bytes" in names


def test_names_and_explanations_are_proper() -> None:
    for family in FAMILIES:
        assert family.name.startswith(PREFIX)
        assert family.name.endswith("_total") == (family.kind == "counter")
        assert family.help.endswith(".") or family.name.endswith("build_info")
        assert list(family.bounds) == sorted(set(family.bounds))
    assert len({family.name for family in FAMILIES}) == len(FAMILIES)


def test_every_metric_is_in_the_documentation() -> None:
    page = (Path(__file__).parents[3] / "docs" / "metrics.md").read_text(encoding="utf-8")
    for family in FAMILIES:
        assert f"`{family.name.removeprefix(PREFIX)}`" in page, family.name


def test_worker_processes_show_their_sum_whatever_the_environment_says(tmp_path: Path) -> None:
    """Real processes: prometheus_client's own several-processes mode is on in one of them, and changes nothing."""
    program = (
        "import sys; from pathlib import Path; from loraretriever.server.metrics import Metrics\n"
        "metrics = Metrics(Path(sys.argv[1])); metrics.start(); metrics.request_started()\n"
        "metrics.request_done('/v1/route', 'POST', 200, 0.2); metrics.request_started(); metrics.close()\n"
    )
    other_mode = tmp_path / "other"
    other_mode.mkdir()
    for number in range(2):
        environment = os.environ | ({"PROMETHEUS_MULTIPROC_DIR": str(other_mode)} if number else {})
        subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=True, env=environment)
    metrics = Metrics(tmp_path)
    metrics.request_done("/v1/route", "POST", 200, 0.2)
    found = samples(metrics)
    assert found["http_requests_total{endpoint=/v1/route,method=POST,status=200}"] == 3
    assert found["http_request_duration_seconds_count{endpoint=/v1/route}"] == 3
    assert found["http_requests_open"] == -1  # of this process, which began none; the others have ended
    assert not any(name.startswith("process_") for name in found)


def test_figures_can_be_counted_and_read_by_many_threads() -> None:
    metrics = Metrics()
    metrics.follow(lambda: None, FakePool(adapter("sql")))

    def work() -> None:
        for _ in range(200):
            metrics.answered(generation())
            metrics.adapter_used("sql")
            metrics.figures()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = samples(metrics)
    assert found["request_success_total{finished_reason=stop}"] == 800
    assert found["adapter_used_total{adapter=sql,tenant=}"] == 800
