"""Changes to the samples and the description of an adapter that is in the pool already.

In a plain folder the adapter's `samples.jsonl` is the truth: it is written first, and the database follows it. Killed
between the two, the next opening finds the file changed.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

from sqlalchemy.orm import Session

from loraretriever.errors import InvalidInputError, PoolError
from loraretriever.pool import content, plain, records
from loraretriever.pool.changes import count_change
from loraretriever.pool.files import write_file
from loraretriever.pool.layout import Layout
from loraretriever.pool.names import own_name
from loraretriever.pool.samples import (
    SAMPLES_FILE,
    derived_samples,
    is_given,
    read_card,
    read_samples,
    rewrite_samples,
    with_added,
    write_samples,
)
from loraretriever.pool.schema import AdapterRow
from loraretriever.pool.weights import CARD_FILE, optional_file
from loraretriever.types import Sample


def add_samples(session: Session, layout: Layout, name: str, new: Sequence[Sample]) -> list[Sample]:
    """Add samples to an adapter; returns those that it did not have."""
    row = records.find_row(session, name)
    old = current_samples(session, layout, row)
    samples = with_added(old, new, name)
    known = set(old)
    added = [sample for sample in samples if sample not in known]
    if added:
        store_samples(session, layout, row, samples)
        count_change(session, name)
    return added


def remove_samples(session: Session, layout: Layout, name: str, positions: Collection[int]) -> None:
    """Remove samples by their places among the adapter's samples and, after them, its counter samples, from 0."""
    row = records.find_row(session, name)
    old = records.samples_of(session, row)
    if old != current_samples(session, layout, row):
        raise PoolError(f"{layout.root / row.folder / SAMPLES_FILE} has changed meanwhile. Open the pool again.")
    wrong = [position for position in positions if not 0 <= position < len(old)]
    if wrong or not positions:
        found = f"there is none at {', '.join(map(str, wrong))}" if wrong else "no position is given"
        raise InvalidInputError(f"adapter {name!r} has {len(old)} samples: {found}; expected 0 to {len(old) - 1}.")
    samples = [sample for position, sample in enumerate(old) if position not in positions]
    if all(sample.counter for sample in samples):
        raise InvalidInputError(
            f"without these, adapter {name!r} has no sample left; expected at least one, or nothing could find it. "
            "Add others first, or disable the adapter."
        )
    store_samples(session, layout, row, samples)
    count_change(session, name)


def replace_samples(
    session: Session, layout: Layout, name: str, texts: Iterable[str], counter_texts: Iterable[str] | None
) -> list[Sample]:
    """Give an adapter these samples, and these counter samples or those that it has; returns all that it has now."""
    row = records.find_row(session, name)
    old = current_samples(session, layout, row)
    new = [Sample(text) for text in texts]
    if counter_texts is None:
        new += [sample for sample in old if sample.counter]
    else:
        new += [Sample(text, counter=True) for text in counter_texts]
    samples = _in_place_of(old, new, name)
    if samples != old:
        store_samples(session, layout, row, samples)
        count_change(session, name)
    return samples


def update_details(
    session: Session, layout: Layout, name: str, description: str | None, tags: Sequence[str] | None
) -> AdapterRow:
    """Describe an adapter anew. Samples that were derived from what described it before are derived again."""
    row = records.find_row(session, name)
    before = row.description, row.tags
    row.description = row.description if description is None else description
    row.tags = row.tags if tags is None else list(tags)
    if (row.description, row.tags) == before:
        return row
    old = current_samples(session, layout, row)
    has_given = any(is_given(sample) and not sample.counter for sample in old)
    if description and description != before[0] and not has_given:
        with content.files(layout, row.folder) as folder:
            card = read_card(optional_file(folder / CARD_FILE))
        counters = [sample for sample in old if sample.counter]
        samples = _in_place_of(old, [*derived_samples(own_name(name), card, description), *counters], name)
        if samples != old:
            store_samples(session, layout, row, samples)
    count_change(session, name)
    return row


def _in_place_of(old: Sequence[Sample], new: Sequence[Sample], name: str) -> list[Sample]:
    """Samples that replace others: those that were there as they were, then the rest. A file keeps the same order."""
    wanted = {(sample.text, sample.counter) for sample in new}
    return with_added([sample for sample in old if (sample.text, sample.counter) in wanted], new, name)


def current_samples(session: Session, layout: Layout, row: AdapterRow) -> list[Sample]:
    """An adapter's samples, and its counter samples, as they are now: in a plain folder by its file, if it has one."""
    if layout.plain and (file := optional_file(layout.root / row.folder / SAMPLES_FILE)):
        return read_samples(file)
    return records.samples_of(session, row)


def store_samples(session: Session, layout: Layout, row: AdapterRow, samples: Sequence[Sample]) -> None:
    """Give an adapter these samples; in a plain folder its file first. Call it under the lock there."""
    if layout.plain:
        folder = layout.root / row.folder
        file = optional_file(folder / SAMPLES_FILE)
        write_file(folder / SAMPLES_FILE, rewrite_samples(file, samples) if file else write_samples(samples))
        row.stamp = {**(row.stamp or {}), SAMPLES_FILE: plain.stamp_of(folder)[SAMPLES_FILE]}
    records.replace_samples(session, row, samples)
