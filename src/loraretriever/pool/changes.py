"""The log of changes: which adapters each committed change touched, so that readers can follow a large pool."""

from __future__ import annotations

from sqlalchemy import delete, func, insert, select, update
from sqlalchemy.orm import Session

from loraretriever.pool.schema import ChangeRow, PoolRow

KEPT_ROWS = 10_000


def count_change(session: Session, *names: str) -> None:
    """Tell readers, in all processes, that the pool is another one when this session commits, and in which adapters.

    Every change has a row in the log: `changes_since` finds by it that none is missing.
    """
    session.execute(update(PoolRow).values(change=PoolRow.change + 1))
    change = session.scalars(select(PoolRow.change)).one()
    session.execute(insert(ChangeRow), [{"change": change, "adapter": name} for name in names or (None,)])
    last = session.scalars(select(func.max(ChangeRow.id))).one()
    if last > KEPT_ROWS:
        # Ids have no gaps but at the beginning. A change goes as a whole, or it would seem to have touched less.
        too_old = select(ChangeRow.change).where(ChangeRow.id <= last - KEPT_ROWS).order_by(ChangeRow.id.desc())
        session.execute(delete(ChangeRow).where(ChangeRow.change <= too_old.limit(1).scalar_subquery()))


def changes_since(session: Session, change: int) -> frozenset[str] | None:
    """Names that the changes after this one touched; None when they are not all in the log."""
    now = session.scalars(select(PoolRow.change)).one()
    if change > now:
        return None
    rows = session.execute(select(ChangeRow.change, ChangeRow.adapter).where(ChangeRow.change > change)).all()
    # A version before the log may have the pool open, and raises the number without a row.
    if len({row.change for row in rows}) != now - change:
        return None
    return frozenset(row.adapter for row in rows if row.adapter is not None)
