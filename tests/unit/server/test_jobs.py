"""Jobs: how they run and end, and who may read of them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from loraretriever.errors import AdmissionError, OverloadedError
from loraretriever.pool import Job, Pool
from loraretriever.server.errors import ApiError
from loraretriever.server.jobs import MAX_UNFINISHED, JobRunner, Progress
from tiny import TINY_BASE, TINY_SPEC

SECONDS = 30.0


@pytest.fixture
def pool(tmp_path: Path) -> Iterator[Pool]:
    with Pool.create(tmp_path / "pool", TINY_BASE, spec=TINY_SPEC) as pool:
        yield pool


@pytest.fixture
def runner(pool: Pool) -> Iterator[JobRunner]:
    runner = JobRunner(pool)
    yield runner
    runner.close(SECONDS)


class Gate:
    """Work that says when it has begun, and goes on when it is told to."""

    def __init__(self) -> None:
        self.begun, self.go_on = threading.Event(), threading.Event()
        self.cleaned = 0

    def work(self, tell: Progress) -> dict[str, Any]:
        tell(0.5, "embedding")
        self.begun.set()
        assert self.go_on.wait(SECONDS)
        tell(0.9, "nearly done")
        return {"revision": 2}

    def clean(self) -> None:
        self.cleaned += 1


def read(pool: Pool, job: Job) -> Job:
    found = pool.jobs.get(job.id, None)
    assert found is not None
    return found


def test_a_job_tells_its_progress_and_its_result(pool: Pool, runner: JobRunner) -> None:
    gate = Gate()
    job, outcome = runner.start("add", None, "sql", gate.work, gate.clean)
    assert (job.kind, job.subject, job.state) == ("add", "sql", "queued")
    assert gate.begun.wait(SECONDS)
    running = read(pool, job)
    assert (running.state, running.progress, running.message) == ("running", 0.5, "embedding")
    gate.go_on.set()
    assert outcome.result(SECONDS) == {"revision": 2}
    done = read(pool, job)
    assert (done.state, done.progress, done.result, done.error) == ("succeeded", 1.0, {"revision": 2}, None)
    assert gate.cleaned == 1


@pytest.mark.parametrize(
    ("error", "status", "message", "code"),
    [
        (AdmissionError("the rank is 0"), 422, "the rank is 0", "adapter_refused"),
        (ApiError(409, "taken", code="x"), 409, "taken", "x"),
        (RuntimeError("/secret/path"), 500, "the server failed", "server_error"),
    ],
)
def test_a_job_that_fails(
    pool: Pool, runner: JobRunner, error: Exception, status: int, message: str, code: str
) -> None:
    def work(tell: Progress) -> dict[str, Any]:
        raise error

    gate = Gate()
    job, outcome = runner.start("add", None, "sql", work, gate.clean)
    with pytest.raises(ApiError) as raised:
        outcome.result(SECONDS)
    assert raised.value.status == status
    failed = read(pool, job)
    assert failed.state == "failed" and failed.error is not None
    assert message in failed.error.message and "secret" not in failed.error.message
    assert failed.error.code == code
    assert gate.cleaned == 1


def test_a_cleanup_that_fails_does_not_leave_the_job_running(pool: Pool, runner: JobRunner) -> None:
    def clean() -> None:
        raise OSError("the disk is gone")

    job, outcome = runner.start("add", None, "sql", lambda tell: {"revision": 1}, clean)
    assert outcome.result(SECONDS) == {"revision": 1}
    assert read(pool, job).state == "succeeded"


def test_one_tenants_jobs_leave_room_for_others(runner: JobRunner) -> None:
    gates = [Gate() for _ in range(MAX_UNFINISHED)]
    outcomes = [runner.start("add", "acme", "acme:sql", gate.work)[1] for gate in gates]
    with pytest.raises(OverloadedError, match="not done yet"):
        runner.start("add", "acme", "acme:sql", gates[0].work)
    with pytest.raises(OverloadedError):
        runner.check_takes("acme")
    runner.check_takes(None)
    other = Gate()
    _, last = runner.start("add", "globex", "globex:sql", other.work)
    for gate in [*gates, other]:
        gate.go_on.set()
    for outcome in [*outcomes, last]:
        outcome.result(SECONDS)
    runner.check_takes("acme")


def test_closing_waits_for_what_runs_and_ends_what_waits(pool: Pool) -> None:
    runner = JobRunner(pool, threads=1)
    first, second = Gate(), Gate()
    running, _ = runner.start("add", None, "sql", first.work, first.clean)
    waiting, outcome = runner.start("add", None, "math", second.work, second.clean)
    assert first.begun.wait(SECONDS)
    closing = threading.Thread(target=runner.close, args=(SECONDS,))
    closing.start()
    with pytest.raises(ApiError, match="stopping"):  # at once: the first one still runs
        outcome.result(SECONDS)
    with pytest.raises(ApiError, match="stopping"):
        runner.start("add", None, "german", first.work)
    first.go_on.set()
    closing.join()
    assert read(pool, running).state == "succeeded"
    assert read(pool, waiting).state == "failed"
    assert (first.cleaned, second.cleaned) == (1, 1)
    assert not second.begun.is_set()


def test_what_runs_too_long_at_the_end_has_failed_and_stays_so(pool: Pool) -> None:
    runner, gate, cleaned = JobRunner(pool), Gate(), threading.Event()
    job, outcome = runner.start("add", None, "sql", gate.work, cleaned.set)
    assert gate.begun.wait(SECONDS)
    runner.close(0)
    failed = read(pool, job)
    assert failed.error is not None and failed.error.code == "stopping"
    with pytest.raises(ApiError):
        outcome.result(0)
    gate.go_on.set()
    assert cleaned.wait(SECONDS)
    assert read(pool, job) == failed


def test_who_reads_of_which_jobs(serve: Callable[..., Any]) -> None:
    with serve(names=("sql",)) as served:
        pool = served.retriever.pool
        secrets = {
            name: pool.keys.create(name, scopes, tenant)[0]
            for name, scopes, tenant in [
                ("operator", ["admin"], None),
                ("shared", ["pool:read"], None),
                ("acme", ["pool:read"], "acme"),
                ("globex", ["pool:read"], "globex"),
            ]
        }
        jobs = {
            tenant: pool.jobs.create("add", tenant, f"{tenant}:sql" if tenant else "sql") for tenant in (None, "acme")
        }
        pool.jobs.fail(jobs["acme"].id, "the rank is 0", "adapter_refused")
        found: dict[str, Any] = {}
        for name, secret in secrets.items():
            with served.client(secret) as client:
                found[name] = client.get("/v1/jobs").json()["data"]
                for job in jobs.values():
                    single = client.get(f"/v1/jobs/{job.id}")
                    is_seen = job.id in {each["id"] for each in found[name]}
                    assert single.status_code == (200 if is_seen else 404)
                    missing = client.get(f"/v1/jobs/{'0' * 32}")
                    assert is_seen or single.text.replace(job.id, "0" * 32) == missing.text
        with served.client(secrets["operator"]) as client:
            assert len(client.get("/v1/jobs?limit=1").json()["data"]) == 1
            assert client.get("/v1/jobs?limit=0").status_code == 400
    assert [each["adapter"] for each in found["operator"]] == ["acme:sql", "sql"]
    assert [each["adapter"] for each in found["shared"]] == ["sql"]
    assert found["globex"] == []
    (own,) = found["acme"]
    assert own["adapter"] == "sql" and own["state"] == "failed"
    assert own["error"] == {"message": "the rank is 0", "code": "adapter_refused"}


def test_states_are_told(pool: Pool) -> None:
    told: list[tuple[str, str]] = []
    runner = JobRunner(pool, on_state=lambda kind, state: told.append((kind, state)))

    def fail(tell: Progress) -> dict[str, Any]:
        raise AdmissionError("no")

    runner.start("add", None, "sql", lambda tell: {})[1].result(SECONDS)
    assert isinstance(runner.start("add", None, "sql", fail)[1].exception(SECONDS), ApiError)
    runner.close(SECONDS)
    assert told == [("add", state) for state in ("queued", "running", "succeeded", "queued", "running", "failed")]
