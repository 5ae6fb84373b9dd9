"""Jobs: work on a pool that goes on after its request was answered, such as adding an adapter from the hub."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from sqlalchemy import ColumnElement, delete, select, true, update
from sqlalchemy.orm import Session

from loraretriever.errors import PoolError
from loraretriever.pool.database import Database
from loraretriever.pool.schema import JobRow

HEARTBEAT_SECONDS = 15.0
ABANDONED_AFTER = timedelta(seconds=60)  # without a heartbeat
KEPT = timedelta(days=7)  # jobs that are done
ABANDONED = "abandoned"  # the code of their error
_AT_WORK = ("queued", "running")


@dataclass(frozen=True, slots=True)
class JobError:
    """Why a job failed, in words and as a code."""

    message: str
    code: str


@dataclass(frozen=True, slots=True)
class Job:
    """A piece of work and how far it is. `subject`: the name in the pool of the adapter that it is about."""

    id: str
    kind: str
    tenant: str | None
    subject: str
    state: str  # "queued", "running", "succeeded" or "failed"
    progress: float  # from 0 to 1
    message: str  # what is done now
    result: Mapping[str, Any] | None  # JSON
    error: JobError | None
    created: datetime
    updated: datetime


Jobs = list[Job]  # inside the class, `list` is its method


class JobStore:
    """The jobs of a pool, which all processes see. Threads may share it.

    A thread tells four times a minute that the process of the unfinished jobs made here lives. A job whose process
    ended without finishing it has failed for whoever reads it a minute later.
    """

    def __init__(self, database: Database) -> None:
        """Use `Pool.jobs`."""
        self._database = database
        self._lock = threading.Lock()
        self._own: set[str] = set()  # unfinished ones made here
        self._thread: threading.Thread | None = None
        self._closed = threading.Event()

    def create(self, kind: str, tenant: str | None, subject: str) -> Job:
        """A new job, queued; `update` says that it runs."""
        now = _now()
        with self._database.write() as session:
            session.execute(delete(JobRow).where(JobRow.state.not_in(_AT_WORK), JobRow.updated < now - KEPT))
            row = JobRow(
                id=secrets.token_hex(16), kind=kind, tenant=tenant, subject=subject, state="queued", progress=0.0,
                message="", created=now, updated=now, heartbeat=now,
            )  # fmt: skip
            session.add(row)
            session.flush()
            job = _to_job(row)
        with self._lock:
            self._own.add(job.id)
            if self._thread is None and not self._closed.is_set():
                self._thread = threading.Thread(target=self._beat, name="loraretriever-jobs", daemon=True)
                self._thread.start()
        return job

    def update(self, id: str, progress: float, message: str) -> None:
        """Say how far a job is, from 0 to 1, and what is done now."""
        done = min(max(progress, 0.0), 1.0)
        self._set(id, state="running", progress=done, message=message, error=None, code=None)

    def finish(self, id: str, result: Mapping[str, Any]) -> None:
        """The job is done. `result`: what JSON can hold."""
        self._set(id, state="succeeded", progress=1.0, message="", result=dict(result), error=None, code=None)
        self._forget(id)

    def fail(self, id: str, message: str, code: str) -> None:
        """The job cannot be done."""
        self._set(id, state="failed", message="", error=message, code=code)
        self._forget(id)

    def get(self, id: str, view: str | None) -> Job | None:
        """A job; None when there is none, or another tenant's. `view`: as in `Pool.view`, its tenant's jobs alone."""
        found = self._read(JobRow.id == id, view, 1)
        return found[0] if found else None

    def list(self, view: str | None, limit: int = 100) -> Jobs:
        """The last jobs, newest first."""
        return self._read(true(), view, limit)

    def close(self) -> None:
        """End the thread. What is unfinished will be found abandoned."""
        self._closed.set()
        with self._lock:
            thread, self._thread = self._thread, None
        if thread is not None:
            thread.join()

    def _read(self, condition: ColumnElement[bool], view: str | None, limit: int) -> Jobs:
        if view is not None:
            condition = condition & (JobRow.tenant == view if view else JobRow.tenant.is_(None))
        query = select(JobRow).where(condition).order_by(JobRow.created.desc(), JobRow.id).limit(limit)
        with self._database.read() as session:
            rows = session.scalars(query).all()
            oldest = _now() - ABANDONED_AFTER
            if all(row.state not in _AT_WORK or row.heartbeat >= oldest for row in rows):
                return [_to_job(row) for row in rows]
        with self._database.write() as session:
            _fail_abandoned(session)
            return [_to_job(row) for row in session.scalars(query)]

    def _set(self, identity: str, **values: Any) -> None:
        now = _now()
        with self._database.write() as session:
            session.execute(update(JobRow).where(JobRow.id == identity).values(**values, updated=now, heartbeat=now))

    def _forget(self, identity: str) -> None:
        with self._lock:
            self._own.discard(identity)

    def _beat(self) -> None:
        """In a thread of its own, as long as there are jobs that were made here."""
        while not self._closed.wait(HEARTBEAT_SECONDS):
            with self._lock:
                own = list(self._own)
                if not own:
                    self._thread = None
                    return
            try:
                with self._database.write() as session:
                    session.execute(update(JobRow).where(JobRow.id.in_(own)).values(heartbeat=_now()))
            except PoolError:
                continue  # a full disk, say: four are missed before anybody takes the jobs for abandoned


def _fail_abandoned(session: Session) -> None:
    now = _now()
    lost = JobRow.state.in_(_AT_WORK) & (JobRow.heartbeat < now - ABANDONED_AFTER)
    message = "the process that did this ended before it was done. Look whether it took effect, or ask for it again."
    values = {"state": "failed", "message": "", "error": message, "code": ABANDONED, "updated": now}
    session.execute(update(JobRow).where(lost).values(**values))


def _now() -> datetime:
    return datetime.now(UTC).replace(tzinfo=None)


def _to_job(row: JobRow) -> Job:
    return Job(
        id=row.id,
        kind=row.kind,
        tenant=row.tenant,
        subject=row.subject,
        state=row.state,
        progress=row.progress,
        message=row.message,
        result=row.result,
        error=None if row.error is None else JobError(row.error, row.code or ""),
        created=row.created.replace(tzinfo=UTC),
        updated=row.updated.replace(tzinfo=UTC),
    )
