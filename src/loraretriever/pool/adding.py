"""Adding an adapter: stage its files, admit them, put them in place, and commit, so that a kill leaves all or nothing.

Order: copy to a staging folder and to the disk; check the copy; then, under the pool's lock, rename it into its
place and commit the row. A kill before the commit leaves files that no row names; the next add sweeps them.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from sqlalchemy import select
from sqlalchemy.orm import Session

from loraretriever.errors import PoolError
from loraretriever.pool import plain, records
from loraretriever.pool.admission import Admission, admit, same_base
from loraretriever.pool.database import Database
from loraretriever.pool.files import copy_adapter, discard, locked, rename, staging_folder, write_file
from loraretriever.pool.layout import CONTENT_FOLDER, Layout
from loraretriever.pool.samples import SAMPLES_FILE, derived_samples, read_card, read_samples, write_samples
from loraretriever.pool.schema import AdapterRow
from loraretriever.pool.weights import CARD_FILE, optional_file
from loraretriever.types import Adapter, BaseModelSpec, Sample


class AddChange(StrEnum):
    """What an `add` changed in the pool."""

    ADDED = "added"
    REVISED = "revised"
    SAMPLES_UPDATED = "samples updated"
    DETAILS_UPDATED = "details updated"
    UNCHANGED = "unchanged"


@dataclass(frozen=True, slots=True)
class AddResult:
    """The adapter as it is now in the pool, and what the call changed."""

    adapter: Adapter
    change: AddChange


@dataclass(frozen=True, slots=True)
class Candidate:
    """An adapter about to be added. `samples` None: take them from its folder."""

    name: str
    folder: Path
    source: str
    samples: list[Sample] | None
    description: str
    tags: tuple[str, ...]
    allow_base_mismatch: bool
    max_bytes: int


@dataclass(frozen=True, slots=True)
class _Staged:
    folder: Path
    admission: Admission
    samples: list[Sample]
    explicit: bool  # the samples were given; they do not come from a model card, a description or the name
    description: str


def add(
    layout: Layout, database: Database, base_model: str, spec: BaseModelSpec | None, candidate: Candidate
) -> AddResult:
    """Add a candidate to the pool, or change what the pool has of that name."""
    if not layout.plain:
        with locked(layout.state):
            sweep_content(layout, database)
    with staging_folder(layout.state) as staging:
        staged = _stage(candidate, staging / "adapter", base_model, spec)
        with locked(layout.state), database.write() as session:
            row = records.current_row(session, candidate.name)
            if row is not None and row.digest == staged.admission.digest:
                change = _update(session, layout, row, candidate, staged)
            else:
                change = AddChange.REVISED if row else AddChange.ADDED
                row = _insert(session, layout, row, candidate, staged, base_model)
            if change is not AddChange.UNCHANGED:
                records.count_change(session)
            session.flush()
            return AddResult(records.to_adapters(session, [row], layout.root)[0], change)


def sweep_content(layout: Layout, database: Database) -> None:
    """Delete content that no revision names: of removed adapters, of adds that were killed.

    Call it under the lock.
    """
    with database.read() as session:
        used = set(session.scalars(select(AdapterRow.digest)))
    for folder in layout.content.glob("*"):
        if folder.name not in used:
            discard(folder, layout.state)


def _stage(candidate: Candidate, folder: Path, base_model: str, spec: BaseModelSpec | None) -> _Staged:
    """Copy the candidate's files and check the copy: nobody can change it between the check and the use."""
    folder.mkdir()
    copy_adapter(candidate.folder, folder, candidate.max_bytes)
    admission = admit(
        folder,
        base_model,
        spec,
        allow_base_mismatch=candidate.allow_base_mismatch,
        max_bytes=candidate.max_bytes,
    )
    card = read_card(folder / CARD_FILE)
    samples = candidate.samples
    if samples is None and (samples_file := optional_file(candidate.folder / SAMPLES_FILE)):
        samples = read_samples(samples_file)
    return _Staged(
        folder=folder,
        admission=admission,
        samples=samples or derived_samples(candidate.name, card, candidate.description),
        explicit=samples is not None,
        description=candidate.description or (card.paragraphs[0] if card.paragraphs else ""),
    )


def _insert(
    session: Session,
    layout: Layout,
    before: AdapterRow | None,
    candidate: Candidate,
    staged: _Staged,
    base_model: str,
) -> AdapterRow:
    # A new revision is for the same prompts, unless others are given.
    old = records.samples_of(session, before) if before else []
    samples = old if not staged.explicit and any(sample.source == "given" for sample in old) else staged.samples
    row = records.insert_revision(
        session,
        candidate.name,
        staged.admission,
        samples,
        base_model=base_model,
        base_mismatch=not same_base(staged.admission.config.base_model, base_model),
        folder=candidate.name if layout.plain else f"{CONTENT_FOLDER}/{staged.admission.digest}",
        source=candidate.source,
        description=candidate.description or (before.description if before else staged.description),
        tags=candidate.tags or (before.tags if before else ()),
    )
    _place(layout, before, row, staged, samples)
    return row


def _place(layout: Layout, before: AdapterRow | None, row: AdapterRow, staged: _Staged, samples: list[Sample]) -> None:
    target = layout.root / row.folder
    if layout.plain:
        if before is None and target.exists():
            raise PoolError(f"{target} exists but is not an adapter of the pool. Move it away, or give another name.")
        plain.place(layout, staged.folder, row.name, samples)
        row.stamp = plain.stamp_of(target)
    elif not target.exists():
        target.parent.mkdir(exist_ok=True)
        rename(staged.folder, target)


def _update(session: Session, layout: Layout, row: AdapterRow, candidate: Candidate, staged: _Staged) -> AddChange:
    """Same name, same bytes: other samples, description or tags, or nothing new."""
    old = records.samples_of(session, row)
    derived_anew = bool(candidate.description) and not any(sample.source == "given" for sample in old)
    samples = staged.samples if staged.explicit or derived_anew else old
    details = (candidate.description or row.description, list(candidate.tags or row.tags))
    change = AddChange.UNCHANGED
    if details != (row.description, row.tags):
        row.description, row.tags = details
        change = AddChange.DETAILS_UPDATED
    if samples != old:
        records.replace_samples(session, row, samples)
        if layout.plain:
            write_file(layout.root / row.folder / SAMPLES_FILE, write_samples(samples))
            row.stamp = plain.stamp_of(layout.root / row.folder)
        change = AddChange.SAMPLES_UPDATED
    return change
