"""Pools with a URL: what they need, and what happens when their storage or their database fails."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text

from loraretriever.errors import InvalidInputError, MissingExtraError, PoolAwayError, PoolError
from loraretriever.pool import AddChange, Pool, content, shown_location
from loraretriever.pool.layout import find_layout
from loraretriever.pool.storage import Storage
from places import contents, make_place, stored
from tiny import TINY_BASE, write_peft_folder

URL = "postgresql://me:s3cret@127.0.0.1:1/pool"
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def pool(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Pool]:
    with make_place(request, tmp_path, "postgres").create() as pool:
        yield pool


def test_where_the_files_go_must_be_said(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="has no storage.*--storage") as caught:
        Pool.create(URL, TINY_BASE)
    assert "s3cret" not in str(caught.value)
    with pytest.raises(InvalidInputError, match="is a folder and keeps its adapters there"):
        Pool.create(tmp_path / "pool", TINY_BASE, storage="file:///storage")
    assert not (tmp_path / "pool").exists()


def test_a_server_that_is_not_there(tmp_path: Path) -> None:
    for call in (lambda: Pool.open(URL), lambda: Pool.create(URL, TINY_BASE, storage=f"file://{tmp_path}/storage")):
        with pytest.raises(PoolAwayError, match=r"postgresql://me@127\.0\.0\.1:1/pool cannot be used") as caught:
            call()
        assert "s3cret" not in str(caught.value)


def test_the_driver_is_an_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(MissingExtraError, match=r"'psycopg'.*loraretriever\[postgres\]"):
        Pool.open(URL)


def test_passwords_are_shown_nowhere() -> None:
    other = "postgresql://me@127.0.0.1:1/pool?password=s3cret"
    for url in (URL, other):
        layout = find_layout(url)
        assert shown_location(url) == layout.name == "postgresql://me@127.0.0.1:1/pool"
        assert "s3cret" not in repr(layout)
        assert layout.url is not None and layout.url.password == "s3cret"
    assert find_layout(URL).state == find_layout(other).state, "another password is no other pool"
    assert find_layout(URL).state != find_layout(URL + "2").state


@pytest.mark.postgres
def test_an_add_whose_upload_fails_changes_nothing(pool: Pool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_peft_folder(tmp_path / "a", samples=["x"])

    def half(self: Storage, digest: str, folder: Path) -> None:
        stored(pool, digest).mkdir(parents=True)
        (stored(pool, digest) / WEIGHTS).write_bytes(b"half")
        raise PoolAwayError("the storage is away")

    monkeypatch.setattr(Storage, "upload", half)
    with pytest.raises(PoolAwayError):
        pool.add(source)
    assert (pool.change, pool.list()) == (0, [])
    monkeypatch.undo()
    (digest,) = contents(pool)
    with pool._database.write() as session:
        session.execute(text("UPDATE removed SET expires = '2000-01-01'"))
    pool.add(write_peft_folder(tmp_path / "b", seed=1, samples=["x"]))
    assert contents(pool) == {pool.get("b").digest}, "what was half stored is swept"
    assert pool.add(source).change is AddChange.ADDED
    assert (pool.get("a").digest, pool.verify()) == (digest, [])


@pytest.mark.postgres
def test_nobody_sweeps_what_is_being_added(pool: Pool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the upload and the commit, the same content is removed under another name, and swept."""
    source = write_peft_folder(tmp_path / "a", samples=["x"])
    pool.add(source, name="first")
    publish = content.publish

    def interrupted(*arguments: Any) -> Any:
        published = publish(*arguments)
        with Pool.open(pool.location) as other:
            other.grace_seconds = 0
            other.remove("first")
        return published

    monkeypatch.setattr(content, "publish", interrupted)
    assert pool.add(source, name="second").change is AddChange.ADDED
    assert (contents(pool), pool.verify()) == ({pool.get("second").digest}, [])


@pytest.mark.postgres
def test_an_add_that_took_too_long(pool: Pool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    upload = Storage.upload

    def slow(self: Storage, digest: str, folder: Path) -> None:
        upload(self, digest, folder)
        with pool._database.write() as session:
            session.execute(text("UPDATE removed SET expires = :then"), {"then": datetime(2000, 1, 1)})
        content.sweep(pool._layout, pool._database)

    monkeypatch.setattr(Storage, "upload", slow)
    with pytest.raises(PoolError, match="took more than.*Add it again"):
        pool.add(write_peft_folder(tmp_path / "a", samples=["x"]))
    assert (pool.list(), contents(pool)) == ([], set())


@pytest.mark.postgres
def test_a_sweep_that_the_storage_refuses_is_done_later(
    pool: Pool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool.add(write_peft_folder(tmp_path / "a", samples=["x"]))
    pool.grace_seconds = 0

    def refuse(self: Storage, digests: object) -> None:
        raise PoolAwayError("the storage is away")

    monkeypatch.setattr(Storage, "delete", refuse)
    pool.remove("a")
    assert len(contents(pool)) == 1
    monkeypatch.undo()
    pool.add(write_peft_folder(tmp_path / "b", seed=1, samples=["x"]))
    assert contents(pool) == {pool.get("b").digest}


@pytest.mark.postgres
def test_wrong_bytes_in_the_storage_are_never_loaded(pool: Pool, tmp_path: Path) -> None:
    source = write_peft_folder(tmp_path / "a", samples=["x"])
    digest = pool.add(source).adapter.digest
    file = stored(pool, digest) / WEIGHTS
    file.write_bytes(file.read_bytes()[:-1] + b"\x3d")
    for call in (lambda: pool.weights("a"), lambda: pool.weights("a", digest)):
        with pytest.raises(PoolError, match="another content than their name says"):
            call()
    assert "another content" in pool.verify()[0]
    assert pool.add(source).change is AddChange.REPAIRED
    assert pool.weights("a", digest).digest == digest
    file.write_bytes(b"")
    assert pool.weights("a", digest).digest == digest, "this host has it"
    (pool.get("a").folder / WEIGHTS).write_bytes(b"")
    with pytest.raises(PoolError, match="another content"):
        pool.weights("a", digest)
    assert pool.add(source).change is AddChange.REPAIRED
    assert pool.weights("a", digest).digest == digest
