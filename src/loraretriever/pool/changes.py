"""The log of changes: which adapters each committed change touched, so that readers can follow a large pool."""

from __future__ import annotations

from sqlalchemy import delete, func, insert, or_, select, update
from sqlalchemy.orm import Session

from loraretriever.pool.database import CHANGE
from loraretriever.pool.records import batches
from loraretriever.pool.schema import AdapterRow, ChangeRow, PoolRow

KEPT_ROWS = 10_000


def count_change(session: Session, *names: str, before: str | None = "") -> None:
    """Tell readers, in all processes, that the pool is another one when this session commits, and in which adapters.

    Every change has a row in the log: `changes_since` finds by it that none is missing. Call it while the adapters'
    rows are there: a reader for one tenant is not told of another's. `before`: the tenant (None: nobody) that the
    adapters belonged to until now; by default the same as now.
    """
    session.execute(update(PoolRow).values(change=PoolRow.change + 1))
    change = session.scalars(select(PoolRow.change)).one()
    session.info[CHANGE] = change
    tenants: dict[str, str | None] = {}
    for batch in batches(names):
        query = select(AdapterRow.name, AdapterRow.tenant).where(AdapterRow.current, AdapterRow.name.in_(batch))
        tenants |= {name: tenant for name, tenant in session.execute(query)}
    rows: list[tuple[str | None, str | None]] = [(name, tenants.get(name)) for name in names] or [(None, None)]
    if before != "":
        rows += [(name, before) for name in names if tenants.get(name) != before]
    session.execute(insert(ChangeRow), [{"change": change, "adapter": name, "tenant": tenant} for name, tenant in rows])
    last = session.scalars(select(func.max(ChangeRow.id))).one()
    if last > KEPT_ROWS:
        # Ids have no gaps but at the beginning. A change goes as a whole, or it would seem to have touched less.
        too_old = select(ChangeRow.change).where(ChangeRow.id <= last - KEPT_ROWS).order_by(ChangeRow.id.desc())
        session.execute(delete(ChangeRow).where(ChangeRow.change <= too_old.limit(1).scalar_subquery()))


def changes_since(session: Session, change: int, view: str | None = None) -> frozenset[str] | None:
    """Names that the changes after this one touched; None when they are not all in the log.

    With a view only those that concern it: of its tenant's adapters, and of those that belong to nobody.
    """
    now = session.scalars(select(PoolRow.change)).one()
    if change > now:
        return None
    later = ChangeRow.change > change
    # A version before the log may have the pool open, and raises the number without a row.
    if session.scalars(select(func.count(ChangeRow.change.distinct())).where(later)).one() != now - change:
        return None
    query = select(ChangeRow.adapter).where(later, ChangeRow.adapter.is_not(None))
    if view is not None:
        query = query.where(or_(ChangeRow.tenant.is_(None), ChangeRow.tenant == view))
    return frozenset(name for name in session.scalars(query) if name is not None)
