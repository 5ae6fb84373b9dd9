"""The folder of a training that is not finished: who works in it, what it was started with, where it goes on."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from loraretriever.errors import InvalidInputError, LoraRetrieverError

_START = "start.json"
_LOCK = "lock"
_STATE = "trainer_state.json"  # the last file that the trainer writes into a checkpoint
_CHECKPOINT = "checkpoint-"


@contextmanager
def unfinished_folder(part: Path, start: dict[str, Any], restart: bool) -> Iterator[None]:
    """Hold the folder while the block runs. It is made, or must have been started with `start` too.

    Raises:
        InvalidInputError: it was started otherwise, or is no folder of a training.
        LoraRetrieverError: another process works in it, or it cannot be written.
    """
    try:
        if part.is_dir() and any(part.iterdir()) and not (part / _LOCK).is_file():
            raise InvalidInputError(f"{part} is there, but no unfinished training. Move it, or choose another output.")
        part.mkdir(parents=True, exist_ok=True)
        with (part / _LOCK).open("a") as handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise LoraRetrieverError(f"another process is training in {part}. Wait for it, or stop it.") from error
            if restart:
                _empty(part)
            _compare(part / _START, start)
            _drop_incomplete(part)
            yield
    except OSError as error:
        raise LoraRetrieverError(f"cannot train in {part}: {error}. Look at permissions and the space left.") from error


def _empty(part: Path) -> None:
    for entry in part.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        elif entry.name != _LOCK:
            entry.unlink()


def _compare(file: Path, start: dict[str, Any]) -> None:
    if not file.exists():
        unfinished = file.with_suffix(".tmp")
        unfinished.write_text(json.dumps(start, indent=1), encoding="utf-8")
        os.replace(unfinished, file)
        return
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        found = {}
    known = json.loads(json.dumps(start))  # as it is after reading: tuples are lists
    names = [name for name in {**found, **known} if found.get(name) != known.get(name)]
    if names:
        told = "; ".join(f"{name} is {known.get(name)!r}, was {found.get(name)!r}" for name in names)
        raise InvalidInputError(
            f"the unfinished training in {file.parent} was started otherwise: {told}. Expected the same settings and "
            f"samples; give those, or begin anew with --restart (restart=True)."
        )


def _drop_incomplete(part: Path) -> None:
    """Delete the checkpoint in whose writing, and the model in whose assembling, the training was killed."""
    for folder in part.glob(f"{_CHECKPOINT}*"):
        if _read_state(folder) is None:
            shutil.rmtree(folder)
    shutil.rmtree(part / "model", ignore_errors=True)


def last_checkpoint(part: Path) -> Path | None:
    """The checkpoint with the most steps."""
    found = {int(folder.name.removeprefix(_CHECKPOINT)): folder for folder in part.glob(f"{_CHECKPOINT}*")}
    return found[max(found)] if found else None


def read_log(checkpoint: Path) -> list[dict[str, Any]]:
    """What the trainer logged until then."""
    state = _read_state(checkpoint)
    return list(state["log_history"]) if state else []


def _read_state(checkpoint: Path) -> dict[str, Any] | None:
    try:
        state = json.loads((checkpoint / _STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return state if isinstance(state, dict) else None
