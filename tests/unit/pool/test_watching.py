"""A shared pool is followed without asking its database, and its server may go away for a while."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from sqlalchemy import event, text

from loraretriever.errors import AdapterNotFoundError, PoolAwayError, PoolError
from loraretriever.pool import Pool, keys
from loraretriever.pool.watching import Memory
from places import make_place
from postgres_server import PostgresServer
from tiny import write_peft_folder

pytestmark = pytest.mark.postgres


@pytest.fixture
def pool(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Pool]:
    with make_place(request, tmp_path, "postgres").create() as pool:
        pool.add(write_peft_folder(tmp_path / "a"), samples=["x"])
        yield pool


@pytest.fixture
def watching(pool: Pool) -> Iterator[Pool]:
    """The same pool, followed by notifications."""
    with Pool.open(pool.location) as watching:
        watching.watch()
        yield watching


@pytest.fixture
def stopped(postgres: PostgresServer) -> Iterator[PostgresServer]:
    """The server, which the test stops; it is started again at the end."""
    yield postgres
    if not postgres.is_running:
        postgres.start()


def until(found: Callable[[], bool]) -> None:
    pause = threading.Event()
    for _ in range(3000):
        if found():
            return
        pause.wait(0.01)
    raise AssertionError("it did not happen within 30 s")


def count_queries(pool: Pool) -> list[str]:
    """A list to which each command to the database is added."""
    seen: list[str] = []
    engine = pool._database._backend.reading
    event.listen(engine, "before_cursor_execute", lambda *args: seen.append(args[2]))
    return seen


def test_a_change_of_another_process_arrives(pool: Pool, watching: Pool, tmp_path: Path) -> None:
    write_peft_folder(tmp_path / "b", seed=1)
    script = "import sys; from loraretriever.pool import Pool\nPool.open(sys.argv[1]).add(sys.argv[2], samples=['y'])"
    before = watching.change
    assert before == pool.change
    subprocess.run([sys.executable, "-c", script, str(pool.location), str(tmp_path / "b")], check=True)
    until(lambda: watching.change == before + 1)
    assert watching.changes_since(before) == {"b"}
    assert watching.get("b") == pool.get("b")


def test_an_own_change_is_known_at_once(watching: Pool) -> None:
    for number in range(20):
        before = watching.change
        watching.set_enabled("a", number % 2 == 1)
        assert watching.change == before + 1
        assert watching.get("a").enabled == (number % 2 == 1)


def test_what_is_known_is_not_asked_for_again(pool: Pool, watching: Pool) -> None:
    first = watching.get("a")
    assert watching.view("").find("a") == first
    assert watching.encoder is None
    seen = count_queries(watching)
    for _ in range(3):
        assert watching.get("a") == watching.view("").find("a") == first
        assert (watching.change, watching.encoder) == (1, None)
    assert seen == []
    pool.set_encoder("some/encoder")
    until(lambda: watching.encoder == "some/encoder")
    assert seen
    pool.remove("a")
    until(lambda: watching.change == 3)
    with pytest.raises(AdapterNotFoundError):
        watching.get("a")


def test_without_watching_each_read_is_a_new_one(pool: Pool) -> None:
    with Pool.open(pool.location) as other:
        for number in range(10):
            pool.set_enabled("a", number % 2 == 1)
            assert (other.change, other.get("a").enabled) == (number + 2, number % 2 == 1)


def test_notifications_that_do_not_come(pool: Pool, watching: Pool) -> None:
    """A look now and then finds what nobody told."""
    with pool._database.write() as session:
        session.execute(text("DROP TRIGGER loraretriever_notify ON pool"))
    before = watching.change
    pool.set_enabled("a", False)
    until(lambda: watching.change == before + 1)


def test_a_database_restored_from_a_copy(pool: Pool, watching: Pool) -> None:
    pool.set_enabled("a", False)
    until(lambda: watching.change == 2)
    with pool._database.write() as session:
        session.execute(text("UPDATE pool SET change = 1"))
    until(lambda: watching.change == 1)


def test_what_is_read_is_remembered_until_the_next_change() -> None:
    memory = Memory()
    assert memory.recall("key", 1, lambda: "old") == "old"
    assert memory.recall("key", 1, lambda: "new") == "old"
    assert memory.recall("other", 1, lambda: "new") == "new"
    assert memory.recall("key", 2, lambda: "new") == "new"


def test_a_server_that_restarts(
    pool: Pool, watching: Pool, stopped: PostgresServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret, key = watching.keys.create("ci", ["route"])
    assert watching.keys.find(secret) == key
    digest = watching.get("a").digest
    stopped.stop()
    assert (watching.change, watching.get("a").digest) == (1, digest)
    assert watching.weights("a", digest).digest == digest
    monkeypatch.setattr(keys, "CACHE_SECONDS", 0.0)
    assert watching.keys.exist()
    assert watching.keys.find(secret) == key, "it was good when the server was last there"
    for call in (pool.list, lambda: pool.change, lambda: pool.set_enabled("a", False), lambda: pool.get("a")):
        with pytest.raises(PoolAwayError, match="postgresql://tests@127.0.0.1.*cannot be used"):
            call()
    with pytest.raises(PoolAwayError):
        pool.add(write_peft_folder(tmp_path / "b", seed=1))
    stopped.start()
    assert pool.get("a").enabled
    assert [adapter.name for adapter in pool.list()] == ["a"]
    pool.add(tmp_path / "b")
    until(lambda: watching.change == 2)
    assert watching.get("b").name == "b"


def test_a_write_that_the_server_ends_changes_nothing(pool: Pool) -> None:
    with pytest.raises(PoolError), pool._database.write() as session:
        session.execute(text("UPDATE adapters SET enabled = false"))
        session.execute(text("UPDATE pool SET change = change + 1"))
        number = session.execute(text("SELECT pg_backend_pid()")).scalar()
        with Pool.open(pool.location) as other, other._database.read() as killer:
            killer.execute(text(f"SELECT pg_terminate_backend({number})"))
        session.execute(text("SELECT 1"))
    assert (pool.change, pool.get("a").enabled) == (1, True)
