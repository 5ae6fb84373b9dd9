"""Revisions of adapters by the beginning of their digests, and where their content lies."""

from __future__ import annotations

from pathlib import Path

from sqlalchemy import select
from sqlalchemy.orm import Session

from loraretriever.errors import AdapterNotFoundError
from loraretriever.pool.database import Database
from loraretriever.pool.layout import Layout
from loraretriever.pool.schema import AdapterRow, RemovedRow


def find_digest(database: Database, name: str, beginning: str) -> str:
    """The digest of the last revision of an adapter whose digest begins so; also of one that was just removed.

    Raises:
        AdapterNotFoundError: no revision of that name has it.
    """
    ages = ((AdapterRow, AdapterRow.revision), (RemovedRow, RemovedRow.expires))

    def read(session: Session) -> str:
        for row, age in ages:
            query = select(row.digest).where(row.name == name, row.digest.startswith(beginning, autoescape=True))
            if digest := session.scalars(query.order_by(age.desc())).first():
                return digest
        raise AdapterNotFoundError(
            f"no revision of an adapter {name!r:.300} has a digest that begins with {beginning!r:.70}: it was revised "
            "or removed meanwhile, or is in another pool. Ask again, for the pool as it is now."
        )

    return database.remembered(("digest", name, beginning), read)


def content_folder(layout: Layout, digest: str) -> Path | None:
    """The folder of an adapter's content, when nobody ever changes the files in it.

    None in a plain folder, and in a shared pool, whose files here are a cache.
    """
    folder = layout.content / digest
    return folder if not layout.plain and layout.storage is None and folder.is_dir() else None
