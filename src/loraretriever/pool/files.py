"""Files of a pool: locks between processes, staging folders, renames that survive a crash."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from loraretriever.errors import PoolError
from loraretriever.pool.peft_config import CONFIG_FILE, read_config
from loraretriever.pool.weights import CARD_FILE, WEIGHTS_FILE, check_size, find_files, optional_file

MAX_CARD_BYTES = 4 << 20
STAGING_FOLDER = "staging"
_PREFIX = "unfinished-"  # of folders in it


@contextmanager
def locked(state: Path) -> Iterator[None]:
    """Hold the pool's lock: one process, and one thread of it, changes files at a time."""
    with (state / "lock").open("a") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


@contextmanager
def staging_folder(state: Path) -> Iterator[Path]:
    """An empty folder on the pool's file system; what is left of it at the end is deleted.

    Its owner keeps it locked, so that `sweep_staging` of another process can tell it from one whose owner died.
    """
    with locked(state):
        sweep_staging(state)
        folder = _make_unfinished(state)
        handle = os.open(folder, os.O_RDONLY)
        fcntl.flock(handle, fcntl.LOCK_EX)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(handle)


def sweep_staging(state: Path) -> None:
    """Delete staging folders whose owners died. Call it under the pool's lock."""
    for folder in (state / STAGING_FOLDER).glob(f"{_PREFIX}*"):
        try:
            handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except OSError:  # its owner has just deleted it, or it is none of ours
            continue
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
        except BlockingIOError:
            pass
        finally:
            os.close(handle)


def discard(folder: Path, state: Path) -> None:
    """Delete a folder: first out of its place, so that a crash leaves no half of it there. Call it under the lock."""
    doomed = _make_unfinished(state)
    rename(folder, doomed / folder.name)
    shutil.rmtree(doomed, ignore_errors=True)


def _make_unfinished(state: Path) -> Path:
    (state / STAGING_FOLDER).mkdir(exist_ok=True)
    return Path(tempfile.mkdtemp(prefix=_PREFIX, dir=state / STAGING_FOLDER))


def copy_adapter(source: Path, target: Path, max_bytes: int) -> None:
    """Copy an adapter's configuration, weights and, if it has one, model card, to an existing folder.

    Raises:
        AdmissionError: a file is missing, too large, or not a file of the folder.
    """
    config, weights = find_files(source)
    read_config(config)  # refuses most of what is refused before gigabytes are copied
    _copy(config, target / CONFIG_FILE)
    check_size(weights.stat().st_size, max_bytes, str(weights))
    _copy(weights, target / WEIGHTS_FILE)
    card = optional_file(source / CARD_FILE)
    if card is not None and card.stat().st_size <= MAX_CARD_BYTES:
        _copy(card, target / CARD_FILE)


def _copy(source: Path, target: Path) -> None:
    with source.open("rb") as reader, target.open("xb") as writer:
        shutil.copyfileobj(reader, writer, 1 << 20)
        writer.flush()
        os.fsync(writer.fileno())


def write_file(file: Path, text: str) -> None:
    """Write a text file whole or not at all, and to the disk."""
    unfinished = file.with_name(f".{file.name}.tmp")
    unfinished.unlink(missing_ok=True)
    with unfinished.open("x", encoding="utf-8") as handle:  # "x" does not follow a link that is there
        handle.write(text)
        handle.flush()
        os.fsync(handle.fileno())
    rename(unfinished, file)


def rename(source: Path, target: Path) -> None:
    """Rename a file or a folder, and write both folders that change to the disk."""
    os.rename(source, target)
    sync_folder(target.parent)
    if source.parent != target.parent:
        sync_folder(source.parent)


def sync_folder(folder: Path) -> None:
    """Write a folder's entries to the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def file_errors(action: str) -> Iterator[None]:
    """Turn the system's errors about files inside the block into a `PoolError`."""
    try:
        yield
    except OSError as error:
        raise PoolError(f"cannot {action}: {error}. Look at permissions and at the space left.") from error
