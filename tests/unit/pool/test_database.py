from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from sqlalchemy import create_engine, inspect, text

from loraretriever.errors import PoolError
from loraretriever.pool import Pool
from loraretriever.pool.database import HEAD_REVISION, Database
from loraretriever.pool.schema import Base
from tiny import TINY_BASE, TINY_SPEC


@pytest.fixture
def database(tmp_path: Path) -> Database:
    return Database(tmp_path / "pool.db")


def test_the_newest_revision_is_the_one_known_here() -> None:
    from alembic.script import ScriptDirectory

    import loraretriever.pool.migrations as migrations

    assert ScriptDirectory(str(Path(migrations.__file__).parent)).get_heads() == [HEAD_REVISION]


def test_migrations_make_the_tables_of_the_schema(database: Database, tmp_path: Path) -> None:
    from alembic.autogenerate import compare_metadata
    from alembic.migration import MigrationContext

    assert not database.is_current
    database.migrate()
    database.migrate()
    assert database.is_current
    database.close()
    engine = create_engine(f"sqlite:///{tmp_path / 'pool.db'}")
    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_server_default": True})
        assert compare_metadata(context, Base.metadata) == []
        names = [index["name"] for index in inspect(connection).get_indexes("adapters")]
        assert sorted(map(str, names)) == ["adapters_by_digest", "adapters_by_tenant", "one_current_revision"]
        assert connection.execute(text("PRAGMA journal_mode")).scalar() == "wal"
    engine.dispose()


def test_a_database_of_a_newer_version_is_refused(tmp_path: Path) -> None:
    Pool.create(tmp_path, TINY_BASE).close()
    database = Database(tmp_path / "pool.db")
    with database.write() as session:
        session.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    database.close()
    with pytest.raises(PoolError, match="upgrade the package"):
        Pool.open(tmp_path)


def test_a_creation_that_was_cut_short_can_be_done_again(tmp_path: Path) -> None:
    (tmp_path / "pool.db").touch()
    with pytest.raises(PoolError, match="was never finished"):
        Pool.open(tmp_path)
    with Pool.create(tmp_path, TINY_BASE, spec=TINY_SPEC) as pool:
        assert pool.list() == []


def test_a_failed_write_changes_nothing(database: Database) -> None:
    database.migrate()
    with pytest.raises(PoolError, match="single_pool"), database.write() as session:
        session.execute(text("INSERT INTO pool VALUES (1, 'm', true, NULL, 0, NULL, NULL)"))
        session.execute(text("INSERT INTO pool VALUES (2, 'm', true, NULL, 0, NULL, NULL)"))
    with database.read() as session:
        assert session.execute(text("SELECT count(*) FROM pool")).scalar() == 0
    database.close()


def test_processes_that_create_and_open_at_once(tmp_path: Path) -> None:
    """Of several that create the same pool one succeeds; several that open a plain folder first all do."""
    from tiny import write_peft_folder

    script = """
import sys
from loraretriever.errors import PoolError
from loraretriever.pool import Pool
print("ready", flush=True)
sys.stdin.readline()
made = 0
try:
    Pool.create(sys.argv[1], "m").close()
    made = 1
except PoolError as error:
    assert "already" in str(error), error
with Pool.open(sys.argv[1]) as pool:
    assert pool.base_model == "m"
with Pool.open(sys.argv[2]) as pool:
    print(made, len(pool.list()), pool.change, *pool.problems)
"""
    for name in ("a", "b"):
        write_peft_folder(tmp_path / "plain" / name)
    command = [sys.executable, "-c", script, str(tmp_path / "pool"), str(tmp_path / "plain")]
    workers = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    for worker in workers:
        assert worker.stdout and worker.stdout.readline() == "ready\n"
    answers = [worker.communicate("\n", timeout=120)[0].split() for worker in workers]
    assert [worker.returncode for worker in workers] == [0] * 4
    assert sorted(answers) == [["0", "2", "2"]] * 3 + [["1", "2", "2"]]
