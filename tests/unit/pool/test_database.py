from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import URL, create_engine, inspect, text

from loraretriever.errors import PoolError
from loraretriever.pool import Pool
from loraretriever.pool import database as database_module
from loraretriever.pool.database import HEAD_REVISION, Database
from loraretriever.pool.postgres import parse_url
from loraretriever.pool.schema import Base
from places import KINDS, Place
from postgres_server import PostgresServer
from tiny import TINY_BASE, TINY_SPEC


@pytest.fixture(params=KINDS)
def empty(request: pytest.FixtureRequest, tmp_path: Path) -> Path | URL:
    """A database without tables."""
    if request.param == "sqlite":
        return tmp_path / "pool.db"
    return parse_url(request.getfixturevalue("postgres").new_database(migrated=False))


@pytest.fixture
def database(empty: Path | URL) -> Iterator[Database]:
    database = Database(empty)
    yield database
    database.close()


def test_the_newest_revision_is_the_one_known_here() -> None:
    from alembic.script import ScriptDirectory

    import loraretriever.pool.migrations as migrations

    assert ScriptDirectory(str(Path(migrations.__file__).parent)).get_heads() == [HEAD_REVISION]


def test_migrations_make_the_tables_of_the_schema(database: Database, empty: Path | URL) -> None:
    from alembic.autogenerate import compare_metadata
    from alembic.migration import MigrationContext

    assert not database.is_current
    database.migrate()
    database.migrate()
    assert database.is_current
    engine = create_engine(empty if isinstance(empty, URL) else f"sqlite:///{empty}")
    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_server_default": True})
        assert compare_metadata(context, Base.metadata) == []
        names = {str(index["name"]) for index in inspect(connection).get_indexes("adapters")}
        assert names - {"one_row_per_revision"} == {"adapters_by_digest", "adapters_by_tenant", "one_current_revision"}
        if isinstance(empty, Path):
            assert connection.execute(text("PRAGMA journal_mode")).scalar() == "wal"
    engine.dispose()


@pytest.mark.postgres
def test_the_way_back_in_postgres(postgres: PostgresServer) -> None:
    from alembic import command
    from alembic.config import Config

    url = parse_url(postgres.new_database())
    config = Config()
    config.set_main_option("script_location", str(Path(database_module.__file__).parent / "migrations"))
    engine = create_engine(url)
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        command.downgrade(config, "base")
        assert inspect(connection).get_table_names() == ["alembic_version"]
        assert connection.execute(text("SELECT count(*) FROM pg_proc WHERE proname ~ 'loraretriever'")).scalar() == 0
    engine.dispose()
    database = Database(url)
    database.migrate()
    assert database.is_current
    database.close()


def test_a_database_of_a_newer_version_is_refused(place: Place) -> None:
    with place.create() as pool, pool._database.write() as session:
        session.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(PoolError, match="upgrade the package"):
        Pool.open(place.location)


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


def test_processes_that_create_and_open_at_once(empty: Path | URL, tmp_path: Path) -> None:
    """Of several that create the same pool one succeeds; several that open a plain folder first all do."""
    from tiny import write_peft_folder

    script = """
import sys
from loraretriever.errors import PoolError
from loraretriever.pool import Pool
print("ready", flush=True)
sys.stdin.readline()
location, plain, storage = sys.argv[1:]
made = 0
try:
    Pool.create(location, "m", storage=storage or None).close()
    made = 1
except PoolError as error:
    assert "already" in str(error), error
with Pool.open(location) as pool:
    assert pool.base_model == "m"
with Pool.open(plain) as pool:
    print(made, len(pool.list()), pool.change, *pool.problems)
"""
    for name in ("a", "b"):
        write_peft_folder(tmp_path / "plain" / name)
    location, storage = str(tmp_path / "pool"), ""
    if isinstance(empty, URL):
        location, storage = empty.render_as_string().replace("+psycopg", ""), f"file://{tmp_path}/storage"
    command = [sys.executable, "-c", script, location, str(tmp_path / "plain"), storage]
    workers = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    for worker in workers:
        assert worker.stdout and worker.stdout.readline() == "ready\n"
    answers = [worker.communicate("\n", timeout=120)[0].split() for worker in workers]
    assert [worker.returncode for worker in workers] == [0] * 4
    assert sorted(answers) == [["0", "2", "2"]] * 3 + [["1", "2", "2"]]
