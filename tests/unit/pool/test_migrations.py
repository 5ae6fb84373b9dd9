"""Databases of earlier revisions are upgraded without loss."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import numpy as np
import pytest
from alembic import command
from alembic.config import Config
from sqlalchemy import create_engine

import loraretriever.pool.migrations as migrations
from loraretriever.pool import Pool
from loraretriever.types import Sample
from tiny import TINY_BASE, TINY_SPEC, write_peft_folder


def migrate(file: Path, revision: str, way: str = "upgrade") -> None:
    config = Config()
    config.set_main_option("script_location", str(Path(migrations.__file__).parent))
    engine = create_engine(f"sqlite:///{file}")
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        getattr(command, way)(config, revision)
    engine.dispose()


def rows(file: Path, query: str) -> list[tuple[object, ...]]:
    connection = sqlite3.connect(file)
    found = connection.execute(query).fetchall()
    connection.close()
    return found


TABLES = {
    "pool": "id, base_model, check_base, spec, change",
    "adapters": "id, name, revision, current, digest, folder, base_model, base_mismatch, checked_shapes, enabled, "
    "description, tags, source, created, ranks, targets, size, stamp",
    "samples": "id, adapter_id, position, text, source",
    "embeddings": "rowid, sample_id, encoder, vector",
}


@pytest.fixture
def first(tmp_path: Path) -> Path:
    """The folder of a pool with a database of revision 0001, with two adapters, one of them revised."""
    with Pool.create(tmp_path / "pool", TINY_BASE, spec=TINY_SPEC) as pool:
        pool.add(write_peft_folder(tmp_path / "a"), samples=["one", "two"], tags=["t"])
        pool.add(write_peft_folder(tmp_path / "b", seed=1), description="Does b.")
        pool.add(write_peft_folder(tmp_path / "a", seed=2))
        pool.set_enabled("b", False)
        for tag in ("old", "new"):
            pool.store_embeddings(tag, {"a": np.array([[1, 2], [3, 4]], np.float32)})
    file = tmp_path / "pool/pool.db"
    new = sqlite3.connect(file)
    old = {table: new.execute(f"SELECT {columns} FROM {table}").fetchall() for table, columns in TABLES.items()}
    new.close()
    for each in (tmp_path / "pool").glob("pool.db*"):
        each.unlink()
    migrate(file, "0001")
    connection = sqlite3.connect(file)
    connection.execute("PRAGMA journal_mode = WAL")
    for table, found in old.items():
        places = ", ".join("?" * len(found[0]))
        connection.executemany(f"INSERT INTO {table} ({TABLES[table]}) VALUES ({places})", found)
    connection.commit()
    connection.close()
    return tmp_path / "pool"


def test_a_pool_of_the_first_revision_is_upgraded(first: Path) -> None:
    file = first / "pool.db"
    before = {table: rows(file, f"SELECT {columns} FROM {table}") for table, columns in TABLES.items()}
    assert [len(found) for found in before.values()] == [1, 3, 5, 4]
    with Pool.open(first) as pool:
        assert {table: rows(file, f"SELECT {columns} FROM {table}") for table, columns in TABLES.items()} == before
        assert [(a.name, a.revision, a.enabled, a.samples, a.tenant) for a in pool.list()] == [
            ("a", 2, True, 2, None),
            ("b", 1, False, 1, None),
        ]
        assert pool.samples("a") == [Sample("one"), Sample("two")]
        assert (pool.counter_samples("a"), pool.feedback(None), pool.encoder) == ([], [], None)
        assert pool.embeddings("old")["a"].tolist() == pool.embeddings("new")["a"].tolist() == [[1, 2], [3, 4]]
        assert (pool.change, pool.changes_since(4), pool.changes_since(3)) == (4, frozenset(), None)
        assert pool.verify() == []
        assert rows(file, "SELECT tag FROM encoders ORDER BY stored") == [("old",), ("new",)]
        pool.add_samples("a", ["never"], counter=True)
        assert pool.changes_since(4) == {"a"}


def test_the_way_back(first: Path) -> None:
    with Pool.open(first) as pool:
        pool.add_samples("a", ["never"], counter=True)
    file = first / "pool.db"
    migrate(file, "0001", "downgrade")
    assert rows(file, "SELECT text FROM samples WHERE text = 'never'") == []
    with Pool.open(first) as pool:
        assert pool.samples("a") == [Sample("one"), Sample("two")]


@pytest.fixture
def second(first: Path) -> Path:
    """The same pool with a database of revision 0002: a tenant, a counter sample, feedback, and ids that were used."""
    with Pool.open(first) as pool:
        pool.add(pool.get("a").folder, name="gone", samples=["x"])
        pool.remove("gone")
        pool.add(pool.get("b").folder, name="b", tenant="acme")
        pool.add_samples("a", ["never"], counter=True)
        pool.give_feedback("maybe", right="a", wrong="b")
    migrate(first / "pool.db", "0002", "downgrade")
    return first


def everything(file: Path) -> dict[str, list[tuple[object, ...]]]:
    """The rows of all tables, the ids that come next, and the indexes, but what later revisions add."""
    tables = ("adapters", "samples", "embeddings", "encoders", "feedback")
    found = {table: rows(file, f"SELECT rowid, * FROM {table}") for table in tables}
    found["pool"] = rows(file, "SELECT id, base_model, check_base, spec, change, encoder FROM pool")
    found["changes"] = rows(file, "SELECT id, change, adapter FROM changes")
    found["sequences"] = sorted(rows(file, "SELECT * FROM sqlite_sequence"))
    indexes = rows(file, "SELECT name, tbl_name, sql FROM sqlite_master WHERE type = 'index' ORDER BY name")
    found["indexes"] = [each for each in indexes if each[1] in found and each[0] != "adapters_by_tenant"]
    return found


def test_a_pool_of_the_second_revision_is_upgraded(second: Path) -> None:
    file = second / "pool.db"
    before = everything(file)
    assert [len(before[table]) for table in ("adapters", "samples", "embeddings", "feedback")] == [3, 6, 4, 1]
    assert ("adapters", 4) in before["sequences"], "one id more than there are adapters was used"
    with Pool.open(second) as pool:
        assert everything(file) == before
        where = "SELECT sql FROM sqlite_master WHERE name = 'one_current_revision'"
        assert "WHERE current" in str(rows(file, where))
        assert "VARCHAR(256)" in str(rows(file, "SELECT sql FROM sqlite_master WHERE name = 'adapters'"))
        assert pool.view("").list() == [pool.get("a")]
        assert pool.counter_samples("a") == [Sample("never", counter=True)]
        assert (pool.keys.exist(), pool.jobs.list(None)) == (False, [])
        since = pool.change
        pool.set_enabled("b", True)
        assert pool.view("").changes_since(since) == frozenset()
        pool.remove("a")
        assert [row[3] for row in rows(file, "SELECT * FROM samples")] == ["Does b."], "samples go with their adapter"
        assert pool.verify() == []
    migrate(file, "0002", "downgrade")
    with Pool.open(second) as pool:
        assert pool.get("b").tenant == "acme"


def test_an_upgrade_that_fails_changes_nothing(first: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    connection = sqlite3.connect(first / "pool.db")
    connection.execute("CREATE TABLE feedback (id INTEGER)")  # in the way of the last step but one
    connection.commit()
    connection.close()
    with pytest.raises(Exception, match="feedback"):
        Pool.open(first)
    file = first / "pool.db"
    assert rows(file, "SELECT version_num FROM alembic_version") == [("0001",)]
    assert "tenant" not in str(rows(file, "SELECT sql FROM sqlite_master WHERE name = 'adapters'"))
