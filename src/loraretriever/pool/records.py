"""Reading and writing the rows of a pool, inside a session of the caller."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from sqlalchemy import delete, func, select, update
from sqlalchemy.orm import Session

from loraretriever.pool.admission import Admission
from loraretriever.pool.schema import AdapterRow, PoolRow, SampleRow
from loraretriever.types import Adapter, BaseModelSpec, Sample


def pool_row(session: Session) -> PoolRow | None:
    """The row of the pool itself; None in a database whose creation was cut short."""
    return session.get(PoolRow, 1)


def create_pool_row(session: Session, base_model: str, check_base: bool, spec: BaseModelSpec | None = None) -> PoolRow:
    """Add the row of the pool itself."""
    row = PoolRow(id=1, base_model=base_model, check_base=check_base, spec=spec and spec_json(spec), change=0)
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


def count_change(session: Session) -> None:
    """Tell readers, in all processes, that the pool is another one when this session commits."""
    session.execute(update(PoolRow).values(change=PoolRow.change + 1))


def current_row(session: Session, name: str) -> AdapterRow | None:
    """The current revision of an adapter."""
    return session.scalar(select(AdapterRow).where(AdapterRow.name == name, AdapterRow.current))


def revision_row(session: Session, name: str, digest: str) -> AdapterRow | None:
    """The last revision of an adapter that has this content."""
    query = select(AdapterRow).where(AdapterRow.name == name, AdapterRow.digest == digest)
    return session.scalars(query.order_by(AdapterRow.revision.desc())).first()


def current_rows(session: Session) -> Sequence[AdapterRow]:
    """The current revision of every adapter, by name."""
    return session.scalars(select(AdapterRow).where(AdapterRow.current).order_by(AdapterRow.name)).all()


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
    )
    session.add(row)
    session.flush()
    replace_samples(session, row, samples)
    return row


def delete_adapter(session: Session, name: str) -> None:
    """Delete all revisions of an adapter, with their samples and embeddings."""
    session.execute(delete(AdapterRow).where(AdapterRow.name == name))


def samples_of(session: Session, row: AdapterRow) -> list[Sample]:
    """A revision's samples, in order."""
    rows = session.scalars(select(SampleRow).where(SampleRow.adapter_id == row.id).order_by(SampleRow.position))
    return [Sample(sample.text, sample.source) for sample in rows]


def replace_samples(session: Session, row: AdapterRow, samples: Sequence[Sample]) -> None:
    """Give a revision other samples; the embeddings of the old ones go with them."""
    session.execute(delete(SampleRow).where(SampleRow.adapter_id == row.id))
    session.add_all(
        SampleRow(adapter_id=row.id, position=position, text=sample.text, source=sample.source)
        for position, sample in enumerate(samples)
    )
    session.flush()


def to_adapters(session: Session, rows: Sequence[AdapterRow], root: Path) -> list[Adapter]:
    """Rows as what travels outside of this package."""
    query = select(SampleRow.adapter_id, func.count()).group_by(SampleRow.adapter_id)
    if len(rows) < 100:  # a list of thousands would not fit into a query
        query = query.where(SampleRow.adapter_id.in_([row.id for row in rows]))
    counts = {adapter: count for adapter, count in session.execute(query)}
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
            samples=counts.get(row.id, 0),
        )
        for row in rows
    ]
