"""Feedback: which adapter is right for a prompt, and which is wrong. Approved, it becomes samples of those adapters."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime

from sqlalchemy import select
from sqlalchemy.orm import Session

from loraretriever.errors import AdapterNotFoundError, InvalidInputError
from loraretriever.pool import records
from loraretriever.pool.changes import count_change
from loraretriever.pool.editing import current_samples, store_samples
from loraretriever.pool.layout import Layout
from loraretriever.pool.samples import check_prompt, with_added
from loraretriever.pool.schema import FeedbackRow
from loraretriever.types import Feedback, Sample

STATES = ("pending", "approved", "rejected")


def give(session: Session, prompt: str, right: str | None, wrong: str | None) -> Feedback:
    """Keep what a user says of a prompt, until it is approved or rejected."""
    check_prompt(prompt)
    if right is None and wrong is None:
        raise InvalidInputError("the feedback names no adapter; expected the right one, the wrong one, or both.")
    if right == wrong:
        raise InvalidInputError(f"adapter {right!r} is given as right and as wrong; expected two adapters, or one.")
    for name in (right, wrong):
        if name is not None:
            records.find_row(session, name)
    created = datetime.now(UTC).replace(tzinfo=None)
    row = FeedbackRow(prompt=prompt, right=right, wrong=wrong, state="pending", created=created)
    session.add(row)
    session.flush()
    return _to_feedback(row)


def of_state(session: Session, state: str | None) -> list[Feedback]:
    """Feedback in this state, or all of it, in the order it was given."""
    if state is not None and state not in STATES:
        raise InvalidInputError(f"state is {state!r}; expected one of {', '.join(STATES)}.")
    query = select(FeedbackRow).order_by(FeedbackRow.id)
    rows = session.scalars(query if state is None else query.where(FeedbackRow.state == state))
    return [_to_feedback(row) for row in rows]


def approve(session: Session, layout: Layout, ids: Iterable[int]) -> list[Feedback]:
    """Make the prompts samples of the right adapters and counter samples of the wrong ones: of all ids, or of none.

    In a plain folder the files are written one after the other. Killed between two, the feedback is still pending,
    and approving it again adds what is not there yet.
    """
    rows = _pending_rows(session, ids)
    old: dict[str, list[Sample]] = {}
    samples: dict[str, list[Sample]] = {}
    for row in rows:
        for name, counter in ((row.right, False), (row.wrong, True)):
            if name is None:
                continue
            with _named(row, name):
                if name not in old:
                    old[name] = current_samples(session, layout, records.find_row(session, name))
                new = [Sample(row.prompt, "feedback", counter)]
                samples[name] = with_added(samples.get(name, old[name]), new, name)
        row.state = "approved"
    changed = [name for name in samples if samples[name] != old[name]]
    for name in changed:
        store_samples(session, layout, records.find_row(session, name), samples[name])
    if changed:
        count_change(session, *changed)
    return [_to_feedback(row) for row in rows]


def reject(session: Session, ids: Iterable[int]) -> list[Feedback]:
    """Put feedback aside."""
    rows = _pending_rows(session, ids)
    for row in rows:
        row.state = "rejected"
    return [_to_feedback(row) for row in rows]


def _pending_rows(session: Session, ids: Iterable[int]) -> list[FeedbackRow]:
    rows = []
    for number in dict.fromkeys(ids):
        row = session.get(FeedbackRow, number)
        if row is None:
            raise InvalidInputError(f"there is no feedback {number}. See all with: loraretriever feedback list")
        if row.state != "pending":
            raise InvalidInputError(f"feedback {number} is {row.state} already; expected a pending one.")
        rows.append(row)
    return rows


@contextmanager
def _named(row: FeedbackRow, name: str) -> Iterator[None]:
    """Name the feedback in errors about its adapter."""
    remedy = f"Nothing was approved. Put it aside with: loraretriever feedback reject {row.id}"
    try:
        yield
    except AdapterNotFoundError as error:
        raise AdapterNotFoundError(f"feedback {row.id} names {name!r}, which was removed: {error} {remedy}") from error
    except InvalidInputError as error:
        raise InvalidInputError(f"feedback {row.id}: {error} {remedy}") from error


def _to_feedback(row: FeedbackRow) -> Feedback:
    return Feedback(row.id, row.prompt, row.right, row.wrong, row.state, row.created.replace(tzinfo=UTC))
