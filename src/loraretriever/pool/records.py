"""Reading and writing the rows of a pool, inside a session of the caller."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import TypeVar

from sqlalchemy import ColumnElement, delete, func, insert, select, update
from sqlalchemy.orm import Session, aliased

from loraretriever.errors import AdapterNotFoundError
from loraretriever.pool.admission import Admission
from loraretriever.pool.names import own_name, public_name
from loraretriever.pool.schema import AdapterRow, PoolRow, SampleRow
from loraretriever.types import Adapter, BaseModelSpec, Sample

T = TypeVar("T")
_BATCH = 500  # names or ids in one query
_LONGEST_NAME = 256  # that is compared with others


def batches(items: Iterable[T], size: int = _BATCH) -> Iterator[list[T]]:
    """The items in lists that fit into a query."""
    rest = iter(items)
    while batch := list(islice(rest, size)):
        yield batch


def pool_row(session: Session) -> PoolRow | None:
    """The row of the pool itself; None in a database whose creation was cut short."""
    return session.get(PoolRow, 1)


def create_pool_row(
    session: Session,
    base_model: str,
    check_base: bool,
    spec: BaseModelSpec | None = None,
    storage: str | None = None,
) -> PoolRow:
    """Add the row of the pool itself."""
    modules = spec and spec_json(spec)
    row = PoolRow(id=1, base_model=base_model, check_base=check_base, spec=modules, change=0, storage=storage)
    session.add(row)
    session.flush()
    return row


def spec_json(spec: BaseModelSpec) -> dict[str, list[int]]:
    """A base model's linear modules as the database holds them."""
    return {module: list(shape) for module, shape in spec.linear.items()}


def stored_spec(row: PoolRow) -> BaseModelSpec | None:
    """The base model's linear modules, if they have been looked up."""
    if row.spec is None:
        return None
    return BaseModelSpec(row.base_model, {module: (shape[0], shape[1]) for module, shape in row.spec.items()})


def current_row(session: Session, name: str) -> AdapterRow | None:
    """The current revision of an adapter."""
    return session.scalar(select(AdapterRow).where(AdapterRow.name == name, AdapterRow.current))


def visible(view: str | None) -> ColumnElement[bool]:
    """Which rows are current revisions that a view has: see `PoolView`."""
    if view is None:
        return AdapterRow.current.is_(True)
    # Not by the index of tenants: where a query gives names too, it should find them by the names' index.
    owner = func.coalesce(AdapterRow.tenant, "")
    if not view:
        return AdapterRow.current & (owner == "")
    own = aliased(AdapterRow)
    start = len(view) + 1
    is_qualified = (own.tenant == view) & (func.substr(own.name, 1, start) == f"{view}:")
    hidden = select(func.substr(own.name, start + 1)).where(own.current, is_qualified)
    return AdapterRow.current & owner.in_(["", view]) & AdapterRow.name.not_in(hidden)


def find_row(session: Session, name: str, view: str | None = None) -> AdapterRow:
    """The current revision of an adapter that must be there, by its name in the pool.

    Raises:
        AdapterNotFoundError: the view has none of that name; the message gives names like it that it has.
    """
    row = _row_for(session, name, view)
    if row is None or row.name != name:
        raise _not_found(name, _visible_names(session, view), view)
    return row


def find_public_row(session: Session, public: str, view: str | None) -> AdapterRow:
    """The current revision of the adapter that a view knows by this name; see `PoolReader.find`.

    Raises:
        AdapterNotFoundError: there is none; the message gives names like it that the view knows.
    """
    if view is None:
        return find_row(session, public)
    row = _row_for(session, public, view) if own_name(public) == public else None
    if row is None:
        raise _not_found(public, [public_name(each, view) for each in _visible_names(session, view)], view)
    return row


def _row_for(session: Session, name: str, view: str | None) -> AdapterRow | None:
    """The current revision of this name, or of the view's tenant's own adapter that hides it."""
    names = [f"{view}:{name}", name] if view else [name]
    found = session.scalars(select(AdapterRow).where(AdapterRow.name.in_(names), AdapterRow.current))
    rows = {row.name: row for row in found if view is None or row.tenant in (None, view or None)}
    return next((rows[each] for each in names if each in rows), None)


def _visible_names(session: Session, view: str | None) -> Sequence[str]:
    return session.scalars(select(AdapterRow.name).where(visible(view))).all()


def _not_found(name: str, names: Sequence[str], view: str | None) -> AdapterNotFoundError:
    close = difflib.get_close_matches(name, names, n=3) if len(name) <= _LONGEST_NAME else []
    if view is None:
        hint = f"did you mean {' or '.join(map(repr, close))}?" if close else f"the pool has {len(names)} adapters."
        hint += " See all with: loraretriever pool list"
    else:
        hint = f"did you mean {' or '.join(map(repr, close))}?" if close else f"there are {len(names)} to choose from."
    return AdapterNotFoundError(f"no adapter {name!r:.300} in the pool: {hint}")


def revision_row(session: Session, name: str, digest: str) -> AdapterRow | None:
    """The last revision of an adapter that has this content."""
    query = select(AdapterRow).where(AdapterRow.name == name, AdapterRow.digest == digest)
    return session.scalars(query.order_by(AdapterRow.revision.desc())).first()


def current_rows(session: Session, view: str | None = None, enabled_only: bool = False) -> Sequence[AdapterRow]:
    """The current revision of every adapter that a view has, by name."""
    query = select(AdapterRow).where(visible(view)).order_by(AdapterRow.name)
    return session.scalars(query.where(AdapterRow.enabled) if enabled_only else query).all()


def insert_revision(
    session: Session,
    name: str,
    admission: Admission,
    samples: Sequence[Sample],
    *,
    base_model: str,
    base_mismatch: bool,
    folder: str,
    source: str,
    description: str,
    tags: Sequence[str],
    tenant: str | None = None,
    stamp: dict[str, list[int]] | None = None,
) -> AdapterRow:
    """Make a new current revision. It stays enabled or disabled as the one before it was."""
    before = current_row(session, name)
    if before is not None:
        before.current = False
        session.flush()  # two current revisions of one name cannot be, not even for a moment
    row = AdapterRow(
        name=name,
        revision=before.revision + 1 if before else 1,
        current=True,
        digest=admission.digest,
        folder=folder,
        base_model=admission.config.base_model or base_model,
        base_mismatch=base_mismatch,
        checked_shapes=admission.checked_shapes,
        enabled=before.enabled if before else True,
        description=description,
        tags=list(tags),
        source=source,
        created=datetime.now(UTC).replace(tzinfo=None),
        ranks=list(admission.ranks),
        targets=list(admission.targets),
        size=admission.size,
        stamp=stamp,
        tenant=tenant,
    )
    session.add(row)
    session.flush()
    replace_samples(session, row, samples)
    return row


def delete_adapter(session: Session, name: str) -> None:
    """Delete all revisions of an adapter, with samples and embeddings."""
    session.execute(delete(AdapterRow).where(AdapterRow.name == name))


def samples_of(session: Session, row: AdapterRow) -> list[Sample]:
    """A revision's samples, in order, and after them its counter samples."""
    query = select(SampleRow.text, SampleRow.source, SampleRow.counter).where(SampleRow.adapter_id == row.id)
    found = session.execute(query.order_by(SampleRow.counter, SampleRow.position))
    return [Sample(text, source, counter) for text, source, counter in found]


def names_without_samples(session: Session) -> Sequence[str]:
    """The adapters that have no samples, counter samples aside."""
    has_samples = select(SampleRow.id).where(SampleRow.adapter_id == AdapterRow.id, ~SampleRow.counter).exists()
    return session.scalars(
        select(AdapterRow.name).where(AdapterRow.current, ~has_samples).order_by(AdapterRow.name)
    ).all()


def replace_samples(session: Session, row: AdapterRow, samples: Sequence[Sample]) -> None:
    """Give a revision other samples. What is among the old ones and the new keeps its embeddings."""
    query = select(SampleRow.id, SampleRow.position, SampleRow.text, SampleRow.counter, SampleRow.source)
    old = session.execute(query.where(SampleRow.adapter_id == row.id)).all()
    found = {(each.text, each.counter): each for each in old}
    kept = [found.get((sample.text, sample.counter)) for sample in samples]
    for ids in batches({each.id for each in old} - {each.id for each in kept if each}):
        session.execute(delete(SampleRow).where(SampleRow.id.in_(ids)))
    free = max((each.position for each in old), default=-1) + 1
    positions = [each.position if each else free + place for place, each in enumerate(kept)]
    order = [(sample.counter, position) for sample, position in zip(samples, positions, strict=True)]
    if sorted(order) != order:  # all get new ones: two samples cannot share one, not even for a moment
        positions = [free + place for place in range(len(samples))]
    updates, inserts = [], []
    for sample, each, position in zip(samples, kept, positions, strict=True):
        values = {"adapter_id": row.id, "position": position, "source": sample.source}
        if each is None:
            inserts.append({**values, "text": sample.text, "counter": sample.counter})
        elif (each.position, each.source) != (position, sample.source):
            updates.append({**values, "id": each.id})
    if updates:
        session.execute(update(SampleRow), updates)
    if inserts:
        session.execute(insert(SampleRow), inserts)


def to_adapters(session: Session, rows: Sequence[AdapterRow], root: Path) -> list[Adapter]:
    """Rows as what travels outside of this package."""
    query = select(SampleRow.adapter_id, func.count()).where(~SampleRow.counter).group_by(SampleRow.adapter_id)
    counts: Counter[int] = Counter()
    for ids in batches(row.id for row in rows):
        for adapter, count in session.execute(query.where(SampleRow.adapter_id.in_(ids))):
            counts[adapter] = count
    return [
        Adapter(
            name=row.name,
            revision=row.revision,
            digest=row.digest,
            folder=root / row.folder,
            base_model=row.base_model,
            enabled=row.enabled,
            description=row.description,
            tags=tuple(row.tags),
            source=row.source,
            created=row.created.replace(tzinfo=UTC),
            ranks=tuple(row.ranks),
            targets=tuple(row.targets),
            size=row.size,
            samples=counts[row.id],
            tenant=row.tenant,
        )
        for row in rows
    ]
