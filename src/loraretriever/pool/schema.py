"""The tables of a pool's database."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    CheckConstraint,
    DateTime,
    Float,
    ForeignKey,
    Index,
    LargeBinary,
    String,
    Text,
    UniqueConstraint,
    false,
    text,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

# Names are ordered by their bytes, whatever the language of a PostgreSQL database is.
_Name = String(256).with_variant(String(256, collation="C"), "postgresql")


class Base(DeclarativeBase):
    """Base of all tables."""


class PoolRow(Base):
    """The pool itself: a single row. `change` counts committed changes; `spec` caches the base model's modules."""

    __tablename__ = "pool"
    __table_args__ = (CheckConstraint("id = 1", name="single_pool"),)

    id: Mapped[int] = mapped_column(primary_key=True)
    base_model: Mapped[str] = mapped_column(String(1024))
    check_base: Mapped[bool]
    spec: Mapped[dict[str, list[int]] | None] = mapped_column(JSON(none_as_null=True))
    change: Mapped[int]
    encoder: Mapped[str | None] = mapped_column(String(1024))  # the sentence encoder to read the pool with
    storage: Mapped[str | None] = mapped_column(String(1024))  # the URL of the adapters' files; None: the pool's folder


class ChangeRow(Base):
    """An adapter that a change touched. A change that touched none has one row, without a name.

    `tenant`: the only one that need know of it. An adapter that was given to another tenant has a row for each.
    """

    __tablename__ = "changes"

    id: Mapped[int] = mapped_column(primary_key=True)
    change: Mapped[int] = mapped_column(index=True)
    adapter: Mapped[str | None] = mapped_column(String(256))
    tenant: Mapped[str | None] = mapped_column(String(128))


class AdapterRow(Base):
    """One revision of an adapter; of each name, one row is the current one."""

    __tablename__ = "adapters"
    __table_args__ = (
        UniqueConstraint("name", "revision", name="one_row_per_revision"),
        Index(
            "one_current_revision",
            "name",
            unique=True,
            sqlite_where=text("current"),
            postgresql_where=text("current"),
        ),
        Index("adapters_by_digest", "digest"),
        Index("adapters_by_tenant", "tenant"),
        {"sqlite_autoincrement": True},
    )

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(_Name)
    revision: Mapped[int]
    current: Mapped[bool]
    digest: Mapped[str] = mapped_column(String(64))
    folder: Mapped[str] = mapped_column(Text)  # below the pool's folder
    base_model: Mapped[str] = mapped_column(String(1024))
    base_mismatch: Mapped[bool]  # accepted although it names another base model
    checked_shapes: Mapped[bool]
    enabled: Mapped[bool]
    description: Mapped[str] = mapped_column(Text)
    tags: Mapped[list[str]] = mapped_column(JSON)
    source: Mapped[str] = mapped_column(Text)
    created: Mapped[datetime] = mapped_column(DateTime)  # UTC
    ranks: Mapped[list[int]] = mapped_column(JSON)
    targets: Mapped[list[str]] = mapped_column(JSON)
    size: Mapped[int] = mapped_column(BigInteger)
    stamp: Mapped[dict[str, Any] | None] = mapped_column(JSON(none_as_null=True))  # of plain folders: see plain.py
    tenant: Mapped[str | None] = mapped_column(String(128))


class SampleRow(Base):
    """One sample of one revision; a counter sample is a prompt that the adapter is not meant for.

    Ids are never used again: they tell whether samples are still the same.
    """

    __tablename__ = "samples"
    __table_args__ = (
        UniqueConstraint("adapter_id", "position", name="one_sample_per_position"),
        {"sqlite_autoincrement": True},
    )

    id: Mapped[int] = mapped_column(primary_key=True)
    adapter_id: Mapped[int] = mapped_column(ForeignKey("adapters.id", ondelete="CASCADE"))
    position: Mapped[int]
    text: Mapped[str] = mapped_column(Text)
    source: Mapped[str] = mapped_column(String(32))
    counter: Mapped[bool] = mapped_column(server_default=false())


class EmbeddingRow(Base):
    """A sample's vector by one encoder: little-endian float32."""

    __tablename__ = "embeddings"

    sample_id: Mapped[int] = mapped_column(ForeignKey("samples.id", ondelete="CASCADE"), primary_key=True)
    encoder: Mapped[str] = mapped_column(String(512), primary_key=True)
    vector: Mapped[bytes] = mapped_column(LargeBinary)


class EncoderRow(Base):
    """An encoder with vectors in the pool. `stored` orders the encoders by when they last stored some."""

    __tablename__ = "encoders"

    tag: Mapped[str] = mapped_column(String(512), primary_key=True)
    stored: Mapped[int]


class FeedbackRow(Base):
    """What a user says of a prompt: the adapter that is right for it, the one that is wrong, or both."""

    __tablename__ = "feedback"
    __table_args__ = ({"sqlite_autoincrement": True},)

    id: Mapped[int] = mapped_column(primary_key=True)
    prompt: Mapped[str] = mapped_column(Text)
    right: Mapped[str | None] = mapped_column(String(256))
    wrong: Mapped[str | None] = mapped_column(String(256))
    state: Mapped[str] = mapped_column(String(16), index=True)
    created: Mapped[datetime] = mapped_column(DateTime)  # UTC


class RemovedRow(Base):
    """Content of an adapter that was removed: requests that are under way may still load it until `expires`."""

    __tablename__ = "removed"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(String(256))
    digest: Mapped[str] = mapped_column(String(64), index=True)
    folder: Mapped[str] = mapped_column(Text)  # below the pool's folder
    expires: Mapped[datetime] = mapped_column(DateTime, index=True)  # UTC


class KeyRow(Base):
    """An API key. The secret itself is not kept. Revoked keys stay: they tell that the server is not open."""

    __tablename__ = "keys"

    id: Mapped[str] = mapped_column(String(16), primary_key=True)
    label: Mapped[str] = mapped_column(String(128))
    secret: Mapped[str] = mapped_column(String(64))  # SHA-256, in hexadecimal
    scopes: Mapped[list[str]] = mapped_column(JSON)
    tenant: Mapped[str | None] = mapped_column(String(128))
    created: Mapped[datetime] = mapped_column(DateTime)  # UTC, as are the other times
    expires: Mapped[datetime | None] = mapped_column(DateTime)
    revoked: Mapped[datetime | None] = mapped_column(DateTime)
    requests_per_minute: Mapped[int | None]
    tokens_per_minute: Mapped[int | None]
    max_tokens: Mapped[int | None]


class JobRow(Base):
    """Work that goes on after its request was answered. `heartbeat`: when its process last told that it lives."""

    __tablename__ = "jobs"

    id: Mapped[str] = mapped_column(String(32), primary_key=True)
    kind: Mapped[str] = mapped_column(String(32))
    tenant: Mapped[str | None] = mapped_column(String(128))
    subject: Mapped[str] = mapped_column(String(256))
    state: Mapped[str] = mapped_column(String(16))
    progress: Mapped[float] = mapped_column(Float)
    message: Mapped[str] = mapped_column(Text)
    result: Mapped[dict[str, Any] | None] = mapped_column(JSON(none_as_null=True))
    error: Mapped[str | None] = mapped_column(Text)
    code: Mapped[str | None] = mapped_column(String(64))
    created: Mapped[datetime] = mapped_column(DateTime, index=True)  # UTC, as are the other times
    updated: Mapped[datetime] = mapped_column(DateTime)
    heartbeat: Mapped[datetime] = mapped_column(DateTime)
