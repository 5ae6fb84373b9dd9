"""The samples' embeddings in the database, each marked with the encoder that made it."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import groupby

import numpy as np
import numpy.typing as npt
from sqlalchemy import ColumnElement, delete, func, literal_column, select
from sqlalchemy.orm import Session

from loraretriever.errors import InvalidInputError
from loraretriever.pool.schema import AdapterRow, EmbeddingRow, SampleRow
from loraretriever.types import Sample

Vectors = npt.NDArray[np.float32]
SampleIds = tuple[int, ...]
_STORED = np.dtype("<f4")
MAX_ENCODERS = 4  # whose vectors are kept at once


def load(session: Session, encoder: str) -> dict[str, Vectors]:
    """For each enabled adapter that is wholly embedded: its samples' vectors, shape (samples, dimension)."""
    whole: dict[str, Vectors] = {}
    for name, samples in _enabled_samples(session, encoder).items():
        blobs = [vector for _, vector in samples if vector is not None]
        if len(blobs) == len(samples):
            whole[name] = np.stack([np.frombuffer(blob, _STORED) for blob in blobs]).astype(np.float32)
    return whole


def missing(session: Session, encoder: str) -> dict[str, tuple[SampleIds, list[Sample]]]:
    """For each enabled adapter that is not wholly embedded: the ids of its samples, and the samples."""
    return {
        name: (tuple(row.id for row, _ in samples), [Sample(row.text, row.source) for row, _ in samples])
        for name, samples in _enabled_samples(session, encoder).items()
        if any(vector is None for _, vector in samples)
    }


def store(session: Session, encoder: str, vectors: Mapping[str, Vectors], asked: Mapping[str, SampleIds]) -> None:
    """Store vectors of whole adapters. Of encoders, those that stored last are kept.

    An adapter whose samples are no longer those of `asked` is passed over, as is one that is gone.
    """
    for name, rows in vectors.items():
        _check_vectors(name, rows)
        ids = _sample_ids(session, name)
        if name in asked and asked[name] != ids or not ids:
            continue
        if len(rows) != len(ids):
            raise InvalidInputError(f"{len(rows)} vectors for adapter {name!r}; expected one per sample: {len(ids)}.")
        session.execute(delete(EmbeddingRow).where(EmbeddingRow.sample_id.in_(ids), EmbeddingRow.encoder == encoder))
        session.add_all(
            EmbeddingRow(sample_id=sample, encoder=encoder, vector=vector.astype(_STORED).tobytes())
            for sample, vector in zip(ids, rows, strict=True)
        )
    session.flush()
    _drop_old_encoders(session)


def _drop_old_encoders(session: Session) -> None:
    # SQLite numbers the rows in the order they were inserted.
    last: ColumnElement[int] = func.max(literal_column("embeddings.rowid"))
    tags = session.scalars(select(EmbeddingRow.encoder).group_by(EmbeddingRow.encoder).order_by(last.desc())).all()
    session.execute(delete(EmbeddingRow).where(EmbeddingRow.encoder.in_(tags[MAX_ENCODERS:])))


def _enabled_samples(session: Session, encoder: str) -> dict[str, list[tuple[SampleRow, bytes | None]]]:
    rows = session.execute(
        select(AdapterRow.name, SampleRow, EmbeddingRow.vector)
        .join(SampleRow, SampleRow.adapter_id == AdapterRow.id)
        .outerjoin(EmbeddingRow, (EmbeddingRow.sample_id == SampleRow.id) & (EmbeddingRow.encoder == encoder))
        .where(AdapterRow.current, AdapterRow.enabled)
        .order_by(AdapterRow.name, SampleRow.position)
    )
    groups = groupby(rows, lambda row: row[0])
    return {name: [(sample, vector) for _, sample, vector in group] for name, group in groups}


def _sample_ids(session: Session, name: str) -> SampleIds:
    return tuple(
        session.scalars(
            select(SampleRow.id)
            .join(AdapterRow, SampleRow.adapter_id == AdapterRow.id)
            .where(AdapterRow.name == name, AdapterRow.current)
            .order_by(SampleRow.position)
        )
    )


def _check_vectors(name: str, rows: Vectors) -> None:
    if rows.ndim != 2 or not np.isfinite(rows).all():
        raise InvalidInputError(
            f"vectors for adapter {name!r} have shape {rows.shape}; expected finite numbers, (samples, dimension)."
        )
