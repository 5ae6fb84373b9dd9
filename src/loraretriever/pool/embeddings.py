"""The samples' embeddings in the database, each marked with the encoder that made it."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from itertools import groupby
from operator import itemgetter
from typing import Any

import numpy as np
import numpy.typing as npt
from sqlalchemy import ColumnElement, Row, Select, delete, insert, select
from sqlalchemy.orm import Session

from loraretriever.errors import InvalidInputError
from loraretriever.pool.records import batches, visible
from loraretriever.pool.schema import AdapterRow, EmbeddingRow, EncoderRow, PoolRow, SampleRow
from loraretriever.types import PoolEntry, Sample

Vectors = npt.NDArray[np.float32]
SampleIds = tuple[int, ...]
_STORED = np.dtype("<f4")
MAX_ENCODERS = 4  # whose vectors are kept at once


def load_entries(
    session: Session, encoder: str, names: Collection[str] | None = None, view: str | None = None
) -> tuple[int, dict[str, PoolEntry]]:
    """The change number, and by name what retrieval reads of a view's enabled adapters, or of those of these names."""
    is_wanted = visible(view) & AdapterRow.enabled
    change = session.scalars(select(PoolRow.change)).one()
    columns = select(AdapterRow.id, AdapterRow.name, AdapterRow.tags, AdapterRow.tenant, AdapterRow.base_model)
    adapters = sorted(_select(session, columns, is_wanted, names), key=lambda row: row.name)
    join = (EmbeddingRow.sample_id == SampleRow.id) & (EmbeddingRow.encoder == encoder)
    texts = (
        select(AdapterRow.id, SampleRow.text, SampleRow.source, SampleRow.counter, EmbeddingRow.vector)
        .join(SampleRow, SampleRow.adapter_id == AdapterRow.id)
        .outerjoin(EmbeddingRow, join)
        .order_by(AdapterRow.id, SampleRow.position)
    )
    samples = groupby(_select(session, texts, is_wanted, names), key=itemgetter(0))
    parts = {number: _entry_parts(rows) for number, rows in samples}
    empty = _entry_parts(())
    return change, {
        row.name: PoolEntry(row.name, tuple(row.tags), row.tenant, row.base_model, *parts.get(row.id, empty))
        for row in adapters
    }


def missing(
    session: Session, encoder: str, names: Collection[str] | None = None, view: str | None = None
) -> dict[str, tuple[SampleIds, list[Sample]]]:
    """By enabled adapter of a view: the ids of its samples that this encoder has not embedded, and those samples."""
    has_vector = select(EmbeddingRow.sample_id).where(
        EmbeddingRow.sample_id == SampleRow.id, EmbeddingRow.encoder == encoder
    )
    columns = select(
        AdapterRow.name, SampleRow.position, SampleRow.id, SampleRow.text, SampleRow.source, SampleRow.counter
    ).join(SampleRow, SampleRow.adapter_id == AdapterRow.id)
    is_wanted = visible(view) & AdapterRow.enabled & ~has_vector.exists()
    rows = list(_select(session, columns, is_wanted, names))
    rows.sort(key=lambda row: (row.name, row.counter, row.position))
    found = {name: list(group) for name, group in groupby(rows, key=lambda row: row.name)}
    return {
        name: (tuple(row.id for row in group), [Sample(row.text, row.source, row.counter) for row in group])
        for name, group in found.items()
    }


def store(
    session: Session,
    encoder: str,
    vectors: Mapping[str, Vectors],
    asked: Mapping[str, SampleIds],
    view: str | None = None,
) -> None:
    """Store vectors of the samples of `asked`, or of all samples of an adapter that is not in it.

    Samples that are gone are passed over, as are adapters that the view does not have. Of encoders, those that
    stored last are kept.
    """
    is_stored = False
    for names in batches(vectors):
        ids = _sample_ids(session, names, view)
        rows: dict[int, bytes] = {}
        for name in names:
            _check_vectors(name, vectors[name])
            meant = asked.get(name, ids.get(name, ()))
            there = set(ids.get(name, ()))
            if len(vectors[name]) != len(meant) and there:
                raise InvalidInputError(
                    f"{len(vectors[name])} vectors for adapter {name!r}; expected one per sample: {len(meant)}."
                )
            pairs = zip(meant, vectors[name], strict=False)
            rows |= {sample: vector.astype(_STORED).tobytes() for sample, vector in pairs if sample in there}
        for batch in batches(rows):
            is_own = (EmbeddingRow.encoder == encoder) & EmbeddingRow.sample_id.in_(batch)
            session.execute(delete(EmbeddingRow).where(is_own))
        if rows:
            values = [{"sample_id": sample, "encoder": encoder, "vector": vector} for sample, vector in rows.items()]
            session.execute(insert(EmbeddingRow), values)
            is_stored = True
    if is_stored:
        _keep_encoder(session, encoder)


def _keep_encoder(session: Session, encoder: str) -> None:
    """Note that an encoder stored last; drop the vectors of those that did so too long ago."""
    rows = list(session.scalars(select(EncoderRow).order_by(EncoderRow.stored.desc())))
    if rows and rows[0].tag == encoder:
        return
    own = next((row for row in rows if row.tag == encoder), None)
    stored = rows[0].stored + 1 if rows else 1
    if own:
        own.stored = stored
        return
    session.add(EncoderRow(tag=encoder, stored=stored))
    for row in rows[MAX_ENCODERS - 1 :]:
        session.execute(delete(EmbeddingRow).where(EmbeddingRow.encoder == row.tag))
        session.delete(row)


def _select(
    session: Session, columns: Select[*tuple[Any, ...]], condition: ColumnElement[bool], names: Collection[str] | None
) -> Iterator[Row[Any]]:
    """The rows of all adapters, or of those of these names: names come in batches, each found by an index."""
    # Not through the session, which would make this twice as slow. Rows come in portions: they may be a gigabyte.
    connection = session.connection()
    query = columns.where(condition).execution_options(yield_per=1000)
    if names is None:
        yield from connection.execute(query)
    else:
        for batch in batches(sorted(set(names))):
            yield from connection.execute(query.where(AdapterRow.name.in_(batch)))


def _entry_parts(rows: Iterable[Any]) -> tuple[Any, ...]:
    """Texts, sources, counter texts, vectors and counter vectors, from the rows of one adapter's samples."""
    texts: list[str] = []
    sources: list[str] = []
    blobs: list[bytes | None] = []
    counter_texts: list[str] = []
    counter_blobs: list[bytes | None] = []
    for _, text, source, is_counter, blob in rows:
        if is_counter:
            counter_texts.append(text)
            counter_blobs.append(blob)
        else:
            texts.append(text)
            sources.append(source)
            blobs.append(blob)
    vectors, counter_vectors = _stack(blobs), _stack(counter_blobs)
    if not counter_texts and vectors is not None:
        counter_vectors = np.empty((0, vectors.shape[1]), np.float32)
    return tuple(texts), tuple(sources), tuple(counter_texts), vectors, counter_vectors


def _stack(blobs: list[bytes | None]) -> Vectors | None:
    """Shape (blobs, dimension), one blob a row; None when one is missing, or there is none."""
    found = [blob for blob in blobs if blob is not None]
    if not found or len(found) < len(blobs):
        return None
    numbers = np.frombuffer(bytearray().join(found), _STORED)  # a bytearray's array can be written to
    return numbers.reshape(len(found), -1).astype(np.float32, copy=False)


def _sample_ids(session: Session, names: Collection[str], view: str | None) -> dict[str, SampleIds]:
    query = (
        select(AdapterRow.name, SampleRow.id)
        .join(SampleRow, SampleRow.adapter_id == AdapterRow.id)
        .where(visible(view), AdapterRow.name.in_(names))
        .order_by(AdapterRow.name, SampleRow.counter, SampleRow.position)
    )
    groups = groupby(session.execute(query), key=lambda row: row.name)
    return {name: tuple(row.id for row in group) for name, group in groups}


def _check_vectors(name: str, rows: Vectors) -> None:
    if rows.ndim != 2 or not np.isfinite(rows).all():
        raise InvalidInputError(
            f"vectors for adapter {name!r} have shape {rows.shape}; expected finite numbers, (samples, dimension)."
        )
