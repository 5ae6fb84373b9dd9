"""Work that goes on after its request was answered, such as adding an adapter; and the endpoints below /v1/jobs.

Jobs are rows of the pool's database, so that any worker process can tell of them. They run in the process that took
them, a few at a time.
"""

from __future__ import annotations

import concurrent.futures
import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Query
from pydantic import BaseModel

from loraretriever.errors import LoraRetrieverError, OverloadedError
from loraretriever.pool import Job, JobError, Pool, public_name
from loraretriever.server.auth import Caller, require
from loraretriever.server.errors import STOPPING, ApiError, to_api_error
from loraretriever.server.metrics import JobState
from loraretriever.server.state import State

_log = logging.getLogger(__name__)
Progress = Callable[[float, str], None]  # how much is done, from 0 to 1, and what is being done now
Result = dict[str, Any]
MAX_UNFINISHED = 16  # jobs of one tenant: what one sends leaves room for the others

router = APIRouter(tags=["jobs"])
Reading = Annotated[Caller, Depends(require("pool:read"))]


@dataclass(slots=True)
class _Task:
    job: Job
    work: Callable[[Progress], Result]
    cleanup: Callable[[], None]
    has_begun: bool = False
    outcome: Future[Result] = field(default_factory=Future)


class JobRunner:
    """Runs jobs in threads. What they tell of themselves is in `pool.jobs`."""

    def __init__(
        self, pool: Pool, threads: int = 2, on_state: Callable[[str, JobState], None] = lambda kind, state: None
    ) -> None:
        """`pool` is closed by the caller, after this; `on_state` hears of each job's kind and its new state."""
        self._store = pool.jobs
        self._executor = ThreadPoolExecutor(threads, thread_name_prefix="jobs")
        self._lock = threading.Lock()
        self._tasks: dict[str, _Task] = {}  # those that are not done
        self._on_state = on_state
        self._is_closed = False

    def check_takes(self, tenant: str | None) -> None:
        """Look whether a job of this tenant would be taken now.

        Raises:
            ApiError: the server is stopping.
            OverloadedError: too many of its jobs are not done yet.
        """
        if self._is_closed:
            raise ApiError(503, STOPPING, code="stopping", retry_after=5.0)
        if sum(task.job.tenant == tenant for task in list(self._tasks.values())) >= MAX_UNFINISHED:
            raise OverloadedError(f"{MAX_UNFINISHED} jobs are not done yet; send this again when some are.")

    def start(
        self,
        kind: str,
        tenant: str | None,
        subject: str,
        work: Callable[[Progress], Result],
        cleanup: Callable[[], None] = lambda: None,
    ) -> tuple[Job, Future[Result]]:
        """Start work; gives the job, and what to wait for: the result, or the ApiError that it ended with.

        Args:
            kind: what is done, in a word.
            tenant: whose job it is; None: nobody's.
            subject: the pool's name of the adapter that it is about.
            work: tells its progress by calling its argument; what it returns becomes the job's result.
            cleanup: is called at the end, however that comes, unless an error is raised here.

        Raises:
            ApiError: the server is stopping.
            OverloadedError: too many jobs of this tenant are not done yet.
        """
        with self._lock:
            self.check_takes(tenant)
            task = _Task(self._store.create(kind, tenant, subject), work, cleanup)
            self._tasks[task.job.id] = task
            self._on_state(kind, "queued")
            self._executor.submit(self._run, task)
        return task.job, task.outcome

    def close(self, timeout: float) -> None:
        """Take no more jobs. Those that run have `timeout` seconds to end, and have failed after it."""
        with self._lock:
            self._is_closed = True
            running = [task for task in self._tasks.values() if task.has_begun]
            waiting = [task for task in self._tasks.values() if not task.has_begun]
        for task in waiting:
            self._end(task, ApiError(503, STOPPING, code="stopping"))
            task.cleanup()
        concurrent.futures.wait([task.outcome for task in running], timeout)
        for task in running:
            self._end(task, ApiError(503, "the server stopped before this was done; send it again.", code="stopping"))
        self._executor.shutdown(wait=False, cancel_futures=True)

    def _run(self, task: _Task) -> None:
        with self._lock:
            if task.job.id not in self._tasks:  # `close` has ended it
                return
            task.has_begun = True
        self._on_state(task.job.kind, "running")

        def tell(progress: float, message: str) -> None:
            if task.job.id in self._tasks:
                self._store.update(task.job.id, progress, message)

        outcome: Result | ApiError
        try:
            tell(0.0, "started")
            outcome = task.work(tell)
        except Exception as error:
            outcome = to_api_error(error)
        try:
            task.cleanup()
        except Exception:
            _log.exception("what job %s has left cannot be cleared away", task.job.id)
        self._end(task, outcome)

    def _end(self, task: _Task, outcome: Result | ApiError) -> None:
        """Note how a job ended, unless that was done."""
        with self._lock:
            if self._tasks.pop(task.job.id, None) is None:
                return
        self._on_state(task.job.kind, "failed" if isinstance(outcome, ApiError) else "succeeded")
        try:
            if isinstance(outcome, ApiError):
                _log.warning("job %s (%s %s) failed: %s", task.job.id, task.job.kind, task.job.subject, outcome.message)
                self._store.fail(task.job.id, outcome.message, outcome.body()["error"]["code"] or "server_error")
            else:
                self._store.finish(task.job.id, outcome)
        except LoraRetrieverError as error:
            _log.error("job %s has ended, but that cannot be noted: %s", task.job.id, error)
        finally:
            if isinstance(outcome, ApiError):
                task.outcome.set_exception(outcome)
            else:
                task.outcome.set_result(outcome)


class JobObject(BaseModel):
    """A job as clients see it."""

    id: str
    object: Literal["job"] = "job"
    kind: str
    adapter: str
    state: JobState
    progress: float
    message: str
    result: dict[str, Any] | None
    error: JobError | None
    created: int
    updated: int


class JobList(BaseModel):
    """Jobs, newest first."""

    object: Literal["list"] = "list"
    data: list[JobObject]


def job_object(job: Job, caller: Caller) -> JobObject:
    """A job in the words of its caller."""
    return JobObject(
        id=job.id,
        kind=job.kind,
        adapter=public_name(job.subject, caller.tenant),
        state=job.state,
        progress=job.progress,
        message="done" if job.state == "succeeded" else job.message,
        result=None if job.result is None else dict(job.result),
        error=job.error,
        created=int(job.created.timestamp()),
        updated=int(job.updated.timestamp()),
    )


@router.get("/v1/jobs")
async def list_jobs(state: State, caller: Reading, limit: Annotated[int, Query(ge=1, le=1000)] = 100) -> JobList:
    """The jobs of the caller's tenant, newest first."""
    jobs = await state.run(state.retriever.pool.jobs.list, caller.view, limit)
    return JobList(data=[job_object(job, caller) for job in jobs])


@router.get("/v1/jobs/{id}")
async def get_job(id: str, state: State, caller: Reading) -> JobObject:
    """How far a job is, and what became of it."""
    job = await state.run(state.retriever.pool.jobs.get, id, caller.view)
    if job is None:
        raise ApiError(404, f"there is no job {id!r:.80}; see all with: GET /v1/jobs", code="job_not_found")
    return job_object(job, caller)
