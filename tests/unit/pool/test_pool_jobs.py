"""Jobs: seen by all processes, told to their tenant only, and failed when their process died."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from datetime import datetime, timedelta

import pytest
from sqlalchemy import text

from loraretriever.errors import PoolError
from loraretriever.pool import Job, JobError, Pool, jobs


@pytest.fixture
def other(pool: Pool) -> Iterator[Pool]:
    with Pool.open(pool.location) as other:
        yield other


def get(pool: Pool, id_: str) -> Job:
    job = pool.jobs.get(id_, None)
    assert job is not None
    return job


def age(pool: Pool, seconds: float, column: str = "heartbeat") -> None:
    """As if this much time had passed."""
    with pool._database.write() as session:
        for id_, then in session.execute(text(f"SELECT id, {column} FROM jobs")).all():
            before = datetime.fromisoformat(str(then)) - timedelta(seconds=seconds)
            session.execute(text(f"UPDATE jobs SET {column} = :t WHERE id = :id"), {"t": str(before), "id": id_})


def test_the_life_of_a_job(pool: Pool, other: Pool) -> None:
    job = pool.jobs.create("add", "acme", "acme:sql")
    assert (job.kind, job.tenant, job.subject, job.state, job.progress) == ("add", "acme", "acme:sql", "queued", 0.0)
    assert len(job.id) == 32 and job.created == job.updated
    assert other.jobs.get(job.id, None) == job
    pool.jobs.update(job.id, 0.25, "downloading")
    running = get(other, job.id)
    assert (running.state, running.progress, running.message) == ("running", 0.25, "downloading")
    assert running.updated > job.updated
    pool.jobs.update(job.id, 7.0, "checking")
    assert get(other, job.id).progress == 1.0
    pool.jobs.finish(job.id, {"name": "sql", "revision": 1})
    done = get(other, job.id)
    assert (done.state, done.progress, done.message, done.error) == ("succeeded", 1.0, "", None)
    assert done.result == {"name": "sql", "revision": 1}
    failing = pool.jobs.create("add", None, "x")
    pool.jobs.fail(failing.id, "its base model is another one", "adapter_refused")
    failed = get(other, failing.id)
    assert (failed.state, failed.error) == ("failed", JobError("its base model is another one", "adapter_refused"))
    assert other.jobs.list(None) == [failed, done]
    assert other.jobs.list(None, limit=1) == [failed]
    assert pool.jobs.get("no such", None) is None


def test_tenants_do_not_see_each_others_jobs(pool: Pool) -> None:
    ids = {tenant: pool.jobs.create("add", tenant, "x").id for tenant in (None, "acme", "globex")}
    for view, visible in ((None, [None, "acme", "globex"]), ("", [None]), ("acme", ["acme"]), ("initech", [])):
        assert {job.tenant for job in pool.jobs.list(view)} == set(visible)
        assert [tenant for tenant, id_ in ids.items() if pool.jobs.get(id_, view)] == visible


def test_a_job_whose_process_was_killed_has_failed(pool: Pool) -> None:
    script = """
import sys
from loraretriever.pool import Pool
with Pool.open(sys.argv[1]) as pool:
    queued = pool.jobs.create("add", "acme", "acme:sql")
    running = pool.jobs.create("add", "acme", "acme:sql")
    pool.jobs.update(running.id, 0.5, "downloading")
    done = pool.jobs.create("add", "acme", "acme:sql")
    pool.jobs.finish(done.id, {})
    print(queued.id, running.id, done.id, flush=True)
    sys.stdin.readline()
"""
    command = [sys.executable, "-c", script, str(pool.location)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        ids = process.stdout.readline().split()
        process.send_signal(signal.SIGKILL)
    assert [get(pool, id_).state for id_ in ids] == ["queued", "running", "succeeded"], "it may be slow"
    age(pool, jobs.ABANDONED_AFTER.total_seconds() + 1)
    for id_ in ids[:2]:
        job = pool.jobs.get(id_, "acme")
        assert job and job.error and (job.state, job.error.code) == ("failed", jobs.ABANDONED)
        assert "ended before it was done" in job.error.message
    assert [job.state for job in pool.jobs.list("acme")].count("failed") == 2
    assert get(pool, ids[2]).state == "succeeded"


def test_a_process_tells_that_it_lives(pool: Pool, other: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "HEARTBEAT_SECONDS", 0.01)
    job = other.jobs.create("add", None, "x")
    beats = threading.Event()
    write = other._database.write

    def counted() -> object:
        beats.set()
        return write()

    for _ in range(2):  # the second time after a read that would have found it abandoned
        age(pool, 3600)
        monkeypatch.setattr(other._database, "write", counted)
        for _ in range(2):  # the first one may have begun before
            beats.clear()
            assert beats.wait(30)
        monkeypatch.undo()
        monkeypatch.setattr(jobs, "HEARTBEAT_SECONDS", 0.01)
    other.jobs.close()
    assert get(pool, job.id).state == "queued"


def test_heartbeats_go_on_after_an_error(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "HEARTBEAT_SECONDS", 0.01)
    pool.jobs.create("add", None, "x")
    tried = threading.Semaphore(0)

    def broken() -> object:
        tried.release()
        raise PoolError("the disk is full")

    monkeypatch.setattr(pool._database, "write", broken)
    assert all(tried.acquire(timeout=30) for _ in range(3))


def test_the_thread_ends_with_the_last_job(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "HEARTBEAT_SECONDS", 0.01)
    for _ in range(2):
        job = pool.jobs.create("add", None, "x")
        thread = pool.jobs._thread
        assert thread is not None and thread.is_alive()
        pool.jobs.fail(job.id, "no", "code")
        thread.join(timeout=30)
        assert not thread.is_alive()
    pool.jobs.create("add", None, "x")
    thread = pool.jobs._thread
    pool.jobs.close()
    assert thread is not None and not thread.is_alive()


def test_a_job_that_was_taken_for_abandoned_may_still_succeed(pool: Pool) -> None:
    job = pool.jobs.create("add", None, "x")
    age(pool, 3600)  # the host slept
    assert get(pool, job.id).state == "failed"
    pool.jobs.update(job.id, 0.5, "checking")
    assert (get(pool, job.id).state, get(pool, job.id).error) == ("running", None)
    pool.jobs.finish(job.id, {})
    assert (get(pool, job.id).state, get(pool, job.id).error) == ("succeeded", None)


def test_old_jobs_are_forgotten(pool: Pool) -> None:
    old, unfinished = (pool.jobs.create("add", None, "x").id for _ in range(2))
    pool.jobs.finish(old, {})
    age(pool, jobs.KEPT.total_seconds() + 1, "updated")
    new = pool.jobs.create("add", None, "x").id
    assert {job.id for job in pool.jobs.list(None)} == {unfinished, new}
