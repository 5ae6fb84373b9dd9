"""Adapters' files in a storage: S3, a folder, memory; and what a host keeps of them."""

from __future__ import annotations

import errno
import os
import shutil
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

import fsspec
import pytest
import s3fs
from fsspec.registry import _registry as registered

from loraretriever.errors import InvalidInputError, MissingExtraError, PoolAwayError, PoolError
from loraretriever.pool import cache, storage
from loraretriever.pool.cache import StorageCache
from loraretriever.pool.storage import NotStoredError, Storage
from loraretriever.pool.weights import digest_in
from s3_server import BUCKET, S3Server
from tiny import write_peft_folder

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few tries, soon after each other."""
    monkeypatch.setattr(storage, "PAUSES", (0.01,))
    monkeypatch.setattr(s3fs.S3FileSystem, "retries", 1)


@pytest.fixture
def s3_storage(s3: S3Server, tmp_path: Path) -> Storage:
    return Storage(f"s3://{BUCKET}/{tmp_path.name}")


@pytest.fixture(params=["s3", "file", "memory"])
def any_storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    if request.param == "s3":
        found: Storage = request.getfixturevalue("s3_storage")
        return found
    return Storage(f"file://{tmp_path}/storage" if request.param == "file" else f"memory://{tmp_path.name}")


def adapter(folder: Path, seed: int = 0, **options: Any) -> tuple[str, Path]:
    """An adapter's digest and folder."""
    made = write_peft_folder(folder / f"adapter{seed}", seed=seed, **options)
    digest = digest_in(made)
    assert digest is not None
    return digest, made


def cached(found: Storage, folder: Path, max_bytes: int = 1 << 30) -> StorageCache:
    folder.mkdir(exist_ok=True)
    return StorageCache(found, folder, max_bytes)


def read(kept: StorageCache, digest: str) -> str | None:
    with kept.files(digest) as folder:
        return digest_in(folder)


def test_what_is_stored_can_be_fetched(any_storage: Storage, tmp_path: Path) -> None:
    digest, folder = adapter(tmp_path, card="A card.")
    any_storage.probe()
    assert not any_storage.holds(digest, folder)
    any_storage.upload(digest, folder)
    any_storage.upload(digest, folder)
    assert any_storage.holds(digest, folder)
    target = tmp_path / "target"
    target.mkdir()
    any_storage.download(digest, target)
    assert {file.name: file.read_bytes() for file in target.iterdir()} == {
        file.name: file.read_bytes() for file in folder.iterdir()
    }
    any_storage.delete([digest, "0" * 64])
    for _ in range(2):
        with pytest.raises(NotStoredError, match="Add the adapter again"):
            any_storage.download(digest, target)


def test_the_cache_keeps_what_was_fetched(any_storage: Storage, tmp_path: Path) -> None:
    digest, folder = adapter(tmp_path)
    any_storage.upload(digest, folder)
    kept = cached(any_storage, tmp_path / "host")
    assert read(kept, digest) == digest
    any_storage.delete([digest])
    assert read(cached(any_storage, tmp_path / "host"), digest) == digest
    with pytest.raises(NotStoredError), kept.fresh(digest):
        pass
    with pytest.raises(NotStoredError):
        read(kept, "0" * 64)
    assert list((tmp_path / "host/staging").iterdir()) == []


@pytest.mark.parametrize("damage", ["truncated", "flipped", "no weights", "no config", "empty", "a file"])
def test_damage_in_the_cache_is_found_and_repaired(tmp_path: Path, damage: str) -> None:
    digest, folder = adapter(tmp_path)
    found = Storage(f"file://{tmp_path}/storage")
    found.upload(digest, folder)
    kept = cached(found, tmp_path / "host")
    assert read(kept, digest) == digest
    entry = tmp_path / "host/adapters" / digest
    weights = entry / WEIGHTS
    if damage == "truncated":
        os.truncate(weights, weights.stat().st_size // 2)
    elif damage == "flipped":
        weights.write_bytes(weights.read_bytes()[:-1] + b"\x3d")
    elif damage == "empty":
        shutil.rmtree(entry)
        entry.mkdir()
    elif damage == "a file":
        shutil.rmtree(entry)
        entry.touch()
    else:
        (entry / ("adapter_config.json" if damage == "no config" else WEIGHTS)).unlink()
    assert read(kept, digest) == digest
    if damage != "a file":
        assert digest_in(entry) == digest, "it was fetched again"


def test_the_least_recently_used_go(tmp_path: Path) -> None:
    found = Storage(f"file://{tmp_path}/storage")
    digests = []
    for seed in range(4):
        digest, folder = adapter(tmp_path, seed)
        found.upload(digest, folder)
        digests.append(digest)
    size = cache.size_of(tmp_path / "adapter0")
    kept = cached(found, tmp_path / "host", 2 * size + size // 2)

    def held() -> set[str]:
        return {entry.name for entry in (tmp_path / "host/adapters").iterdir()}

    for position, digest in enumerate(digests[:2]):
        read(kept, digest)
        os.utime(tmp_path / "host/adapters" / digest, (position, position))
    read(kept, digests[0])
    read(kept, digests[2])
    assert held() == {digests[0], digests[2]}
    with kept.files(digests[0]) as folder:
        os.utime(folder, (0, 0))
        read(kept, digests[3])
        assert digest_in(folder) == digests[0], "who uses it keeps it"
    assert digests[3] in held()
    assert read(cached(found, tmp_path / "small", 0), digests[0]) == digests[0]


def test_threads_that_want_the_same_fetch_it_once(s3: S3Server, s3_storage: Storage, tmp_path: Path) -> None:
    digest, folder = adapter(tmp_path)
    s3_storage.upload(digest, folder)
    s3.requests.clear()
    answers: list[str | None] = []
    threads = [
        threading.Thread(target=lambda: answers.append(read(cached(s3_storage, tmp_path / "host"), digest)))
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == [digest] * 8
    assert sum(method == "GET" and path.endswith(WEIGHTS) for method, path in s3.requests) == 1


@pytest.mark.parametrize("fault", ["500", "503", "truncated", "broken", "wrong"])
def test_a_fault_that_passes_is_not_noticed(s3: S3Server, s3_storage: Storage, tmp_path: Path, fault: str) -> None:
    digest, folder = adapter(tmp_path)
    failed: list[str] = []

    def once(method: str, path: str) -> str | None:
        is_first = path.endswith(WEIGHTS) and method not in failed and method in ("GET", "PUT")
        if is_first:
            failed.append(method)
        return fault if is_first and (method == "GET" or fault in ("500", "503")) else None

    s3.fault = once
    s3_storage.upload(digest, folder)
    assert read(cached(s3_storage, tmp_path / "host"), digest) == digest
    assert failed[-1] == "GET"


@pytest.mark.parametrize("fault", ["503", "truncated", "broken", "wrong"])
def test_a_fault_that_stays_serves_nothing_wrong(s3: S3Server, s3_storage: Storage, tmp_path: Path, fault: str) -> None:
    digest, folder = adapter(tmp_path)
    s3_storage.upload(digest, folder)
    s3.fault = lambda method, path: fault if method == "GET" and path.endswith(WEIGHTS) else None
    kept = cached(s3_storage, tmp_path / "host")
    for _ in range(2):
        with pytest.raises(PoolError, match="cannot be used|have another content"):
            read(kept, digest)
        assert list((tmp_path / "host/adapters").iterdir()) == []
        assert list((tmp_path / "host/staging").iterdir()) == []
    s3.reset()
    assert read(kept, digest) == digest, "it recovers by itself"


def test_an_upload_that_fails(s3: S3Server, s3_storage: Storage, tmp_path: Path) -> None:
    digest, folder = adapter(tmp_path)
    s3.fault = lambda method, path: "500" if method == "PUT" and path.endswith(WEIGHTS) else None
    with pytest.raises(PoolAwayError, match=f"the storage s3://{BUCKET}/.*Try again"):
        s3_storage.upload(digest, folder)
    s3.reset()
    s3_storage.upload(digest, folder)
    assert s3_storage.holds(digest, folder)


def test_a_bucket_that_is_not_there(s3: S3Server) -> None:
    with pytest.raises(PoolError, match="Make the bucket"):
        Storage("s3://no-such-bucket/x").probe()


def full(*places: Path) -> Any:
    """`get_file` of a file system, on a host where the disks of these folders are full."""
    original = fsspec.get_filesystem_class("file").get_file

    def get_file(self: Any, source: str, target: str, **options: Any) -> None:
        if any(Path(target).is_relative_to(place) for place in places):
            Path(target).write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device", target)
        original(self, source, target, **options)

    return get_file


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = Storage(f"file://{tmp_path}/storage")
    digest, folder = adapter(tmp_path)
    other, other_folder = adapter(tmp_path, 1)
    for each, place in ((digest, folder), (other, other_folder)):
        found.upload(each, place)
    kept = cached(found, tmp_path / "host")
    read(kept, other)
    local = fsspec.get_filesystem_class("file")
    monkeypatch.setattr(local, "get_file", full(tmp_path / "host"))
    with kept.files(digest) as used:
        assert digest_in(used) == digest
        assert used.is_relative_to(tempfile.gettempdir())
    assert not used.exists()
    assert list((tmp_path / "host/adapters").iterdir()) == [], "the cache made room"
    monkeypatch.setattr(local, "get_file", full(tmp_path / "host", Path(tempfile.gettempdir())))
    with kept.files(digest) as used:
        assert used.is_relative_to("/dev/shm")
        assert digest_in(used) == digest
    monkeypatch.setattr(local, "get_file", full(Path("/")))
    with pytest.raises(PoolError, match="No space left on device.*Free some space"):
        read(kept, digest)
    monkeypatch.undo()
    assert read(kept, digest) == digest
    assert digest_in(tmp_path / "host/adapters" / digest) == digest


@pytest.mark.parametrize(
    ("url", "error", "message"),
    [
        ("bucket/prefix", InvalidInputError, "is no URL"),
        ("nosuch://bucket", InvalidInputError, "cannot be used"),
        ("sftp://me:secret@host/x", InvalidInputError, "holds a password"),
    ],
)
def test_bad_urls(url: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message) as caught:
        storage.check_url(url)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "package", "remedy"),
    [
        ("s3://bucket/prefix", "s3fs", r"pip install 'loraretriever\[storage-s3\]'"),
        ("gs://bucket/prefix", "gcsfs", "pip install gcsfs"),
    ],
)
def test_a_file_system_that_is_not_installed(
    monkeypatch: pytest.MonkeyPatch, url: str, package: str, remedy: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(registered, url.partition(":")[0], raising=False)
    with pytest.raises(MissingExtraError, match=f"needs the package '{package}'.*{remedy}"):
        storage.check_url(url)
