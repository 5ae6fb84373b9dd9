"""Adding an adapter: stage its files, admit them, put them in place, and commit, so that a kill leaves all or nothing.

Order: copy to a staging folder and to the disk; check the copy; then, under the pool's lock, rename it into its
place and commit the row. A kill before the commit leaves files that no row names; the next add sweeps them. In a shared
pool the copy goes to the storage before the row is made, and the lock is the database's.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from sqlalchemy.orm import Session

from loraretriever.errors import PoolError
from loraretriever.pool import content, plain, records
from loraretriever.pool.admission import Admission, admit, same_base
from loraretriever.pool.changes import count_change
from loraretriever.pool.database import Database
from loraretriever.pool.files import copy_adapter, discard, locked, rename, staging_folder, write_file
from loraretriever.pool.layout import CONTENT_FOLDER, Layout
from loraretriever.pool.names import own_name
from loraretriever.pool.samples import (
    SAMPLES_FILE,
    derived_samples,
    is_given,
    read_card,
    read_samples,
    with_added,
    write_samples,
)
from loraretriever.pool.schema import AdapterRow
from loraretriever.pool.weights import CARD_FILE, digest_in, optional_file
from loraretriever.types import Adapter, BaseModelSpec, Sample

_DIGEST = re.compile("[0-9a-f]{64}")


class AddChange(StrEnum):
    """What an `add` changed in the pool."""

    ADDED = "added"
    REVISED = "revised"
    SAMPLES_UPDATED = "samples updated"
    DETAILS_UPDATED = "details updated"
    REPAIRED = "repaired"
    UNCHANGED = "unchanged"


@dataclass(frozen=True, slots=True)
class AddResult:
    """The adapter as it is now in the pool, and what the call changed."""

    adapter: Adapter
    change: AddChange


@dataclass(frozen=True, slots=True)
class Candidate:
    """An adapter about to be added. `samples` None: take them from its folder. `tenant` None: as it is, "": nobody."""

    name: str
    folder: Path
    source: str
    samples: list[Sample] | None
    description: str
    tags: tuple[str, ...]
    tenant: str | None
    allow_base_mismatch: bool
    max_bytes: int


@dataclass(frozen=True, slots=True)
class _Staged:
    folder: Path
    admission: Admission
    samples: list[Sample]
    explicit: (
        bool  # the samples are given or from a file; they do not come from a model card, a description or the name
    )
    given: bool  # the samples are given by the caller, or derived from a description that is
    description: str
    published: content.Published | None  # to the storage, if the pool has one
    stamp: plain.Stamp  # of the candidate's folder, before it was copied
    in_place: bool  # the candidate is a folder of the pool, a plain one, and stays where it is


def add(
    layout: Layout, database: Database, base_model: str, spec: BaseModelSpec | None, candidate: Candidate
) -> AddResult:
    """Add a candidate to the pool, or change what the pool has of that name."""
    if not layout.plain:
        with locked(layout.state):
            content.sweep(layout, database)
    with staging_folder(layout.state) as staging:
        staged = _stage(layout, database, candidate, staging / "adapter", base_model, spec)
        with locked(layout.state), database.write() as session:
            if layout.plain:
                plain.put_back_replaced(layout)
            if staged.published is not None:
                content.redeem(session, staged.published)
            row = records.current_row(session, candidate.name)
            before = row.tenant if row else ""
            if row is not None and row.digest == staged.admission.digest:
                change = _update(session, layout, row, candidate, staged)
            else:
                change = AddChange.REVISED if row else AddChange.ADDED
                row = _insert(session, layout, row, candidate, staged, base_model)
            if change is not AddChange.UNCHANGED:
                count_change(session, candidate.name, before=before)
            session.flush()
            return AddResult(records.to_adapters(session, [row], layout.root)[0], change)


def _stage(
    layout: Layout,
    database: Database,
    candidate: Candidate,
    folder: Path,
    base_model: str,
    spec: BaseModelSpec | None,
) -> _Staged:
    """Copy the candidate's files and check the copy: nobody can change it between the check and the use."""
    stamp = plain.stamp_of(candidate.folder)
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
        samples=samples or derived_samples(own_name(candidate.name), card, candidate.description),
        explicit=samples is not None,
        given=candidate.samples is not None or (samples is None and bool(candidate.description)),
        description=candidate.description or (card.paragraphs[0] if card.paragraphs else ""),
        published=content.publish(layout, database, admission.digest, folder),
        stamp=stamp,
        in_place=layout.plain and candidate.folder == layout.root / candidate.name,
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
    keeps_old = not staged.explicit and any(is_given(sample) and not sample.counter for sample in old)
    samples = old if keeps_old else _with_counters(old, candidate, staged)
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
        tenant=_tenant(candidate, before),
    )
    if layout.plain and not staged.in_place and before is None and (layout.root / row.folder).exists():
        raise PoolError(
            f"{layout.root / row.folder} exists but is not an adapter of the pool. Move it away, or give another name."
        )
    _place(layout, row, staged, samples)
    return row


def _update(session: Session, layout: Layout, row: AdapterRow, candidate: Candidate, staged: _Staged) -> AddChange:
    """Same name, same bytes: other samples, description or tags, lost files, or nothing new."""
    old = records.samples_of(session, row)
    has_given = any(is_given(sample) and not sample.counter for sample in old)
    derived_anew = bool(candidate.description) and not has_given
    samples = _with_counters(old, candidate, staged) if staged.explicit or derived_anew else old
    details = (candidate.description or row.description, list(candidate.tags or row.tags), _tenant(candidate, row))
    if staged.in_place:
        row.stamp = staged.stamp
    row.checked_shapes = row.checked_shapes or staged.admission.checked_shapes
    change = AddChange.UNCHANGED
    if details != (row.description, row.tags, row.tenant):
        row.description, row.tags, row.tenant = details
        change = AddChange.DETAILS_UPDATED
    if samples != old:
        records.replace_samples(session, row, samples)
        change = AddChange.SAMPLES_UPDATED
    if staged.published is not None:
        change = AddChange.REPAIRED if staged.published.is_new else change
    elif not staged.in_place and digest_in(layout.root / row.folder) != row.digest:
        _place(layout, row, staged, samples)
        change = AddChange.REPAIRED
    elif layout.plain and samples != old:
        _write_samples(layout, row, staged, samples)
    return change


def _with_counters(old: list[Sample], candidate: Candidate, staged: _Staged) -> list[Sample]:
    """The candidate's samples, and the counter samples that there were, unless it has some of its own."""
    new = staged.samples
    is_the_truth = staged.in_place and candidate.samples is None
    if is_the_truth or any(sample.counter for sample in new):
        return new
    texts = {sample.text for sample in new}
    return with_added(new, [each for each in old if each.counter and each.text not in texts], candidate.name)


def _tenant(candidate: Candidate, before: AdapterRow | None) -> str | None:
    if candidate.tenant is None:
        return before.tenant if before else None
    return candidate.tenant or None


def _place(layout: Layout, row: AdapterRow, staged: _Staged, samples: list[Sample]) -> None:
    """Put the staged files where the row says that they are."""
    if staged.published is not None:
        return
    target = layout.root / row.folder
    if staged.in_place:
        row.stamp = staged.stamp
        _write_samples(layout, row, staged, samples)
    elif layout.plain:
        plain.place(layout, staged.folder, row.name, samples)
        row.stamp = plain.stamp_of(target)
    elif digest_in(target) != row.digest:
        if target.exists():
            discard(target, layout.state)
        target.parent.mkdir(exist_ok=True)
        rename(staged.folder, target)


def _write_samples(layout: Layout, row: AdapterRow, staged: _Staged, samples: list[Sample]) -> None:
    """Make the adapter's folder in a plain folder hold the samples; a file that they came from stays as it is."""
    if staged.in_place and samples == staged.samples and not staged.given:
        return
    folder = layout.root / row.folder
    write_file(folder / SAMPLES_FILE, write_samples(samples))
    row.stamp = {**(row.stamp or {}), SAMPLES_FILE: plain.stamp_of(folder)[SAMPLES_FILE]}
