"""Plain folders: one PEFT folder per adapter, registered where it lies.

The folder is the truth, the database follows it. A stamp, the times and sizes of an adapter's files, tells
whether to look at it again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from sqlalchemy.orm import Session

from loraretriever.errors import AdmissionError, InvalidInputError, LoraRetrieverError, PoolError
from loraretriever.pool import records
from loraretriever.pool.admission import Admission, admit
from loraretriever.pool.changes import count_change
from loraretriever.pool.database import Database
from loraretriever.pool.files import locked, rename, write_file
from loraretriever.pool.layout import Layout, adapter_folders
from loraretriever.pool.names import check_name
from loraretriever.pool.peft_config import CONFIG_FILE, read_config
from loraretriever.pool.samples import (
    SAMPLES_FILE,
    derived_samples,
    printable,
    read_card,
    read_samples,
    write_samples,
)
from loraretriever.pool.schema import AdapterRow
from loraretriever.pool.weights import CARD_FILE, WEIGHTS_FILE, digest_in, optional_file, real_file
from loraretriever.types import BaseModelSpec, Sample

Stamp = dict[str, list[int]]
_REPLACED = "replaced"  # adapters out of their place while a new revision takes it
_REMOVED = "removed"  # removed adapters: a plain folder is the user's, so they are kept


@dataclass(frozen=True, slots=True)
class _Found:
    """An adapter's folder that is new or has changed, and was admitted."""

    folder: Path
    stamp: Stamp
    admission: Admission
    base_mismatch: bool
    description: str
    samples: list[Sample]


def stamp_of(folder: Path) -> Stamp:
    """Time of change (ns) and size of each file of an adapter."""
    stamp = {}
    for file in (CONFIG_FILE, WEIGHTS_FILE, CARD_FILE, SAMPLES_FILE):
        try:
            status = (folder / file).stat()
        except OSError:
            continue
        stamp[file] = [status.st_mtime_ns, status.st_size]
    return stamp


def changed_weights(stamp: Stamp, folder: Path) -> bool:
    """Whether the configuration or the weights are no longer those of the stamp."""
    now = stamp_of(folder)
    return any(now.get(file) != stamp.get(file) for file in (CONFIG_FILE, WEIGHTS_FILE))


def refresh(layout: Layout, database: Database) -> list[str]:
    """Register what changed in a plain folder since it was last opened.

    Returns: what is wrong with folders that are not registered for it.

    Raises:
        PoolError: no adapter in the folder can be used.
    """
    if _is_registered(layout, database):
        return []
    with locked(layout.state):
        put_back_replaced(layout)
        folders = adapter_folders(layout.root)
        with database.read() as session:
            pool = records.pool_row(session)
            base_model = pool.base_model if pool else _common_base(layout.root, folders)
            spec = records.stored_spec(pool) if pool else None
            rows = {row.name: row for row in records.current_rows(session)}
            session.expunge_all()
        found, problems = _look(folders, rows, base_model, spec)  # may take long: outside of any transaction
        with database.write() as session:
            if pool is None:
                records.create_pool_row(session, base_model, check_base=False)
            for each in found:
                _register(session, each, base_model)
                count_change(session, each.folder.name)
            for name in rows.keys() - folders.keys() | problems.keys() & rows.keys():
                records.delete_adapter(session, name)
                count_change(session, name)
    return list(problems.values())


def place(layout: Layout, staged: Path, name: str, samples: list[Sample]) -> None:
    """Put a staged adapter into its place in the folder; one that was there is kept as a removed one.

    Call it under the lock, and after `put_back_replaced`.
    """
    write_file(staged / SAMPLES_FILE, write_samples(samples))
    target = layout.root / name
    replaced = layout.state / _REPLACED / name
    if target.exists():
        replaced.parent.mkdir(exist_ok=True)
        rename(target, replaced)
    rename(staged, target)
    if replaced.exists():
        _keep(layout, replaced)


def take_out(layout: Layout, name: str) -> None:
    """Move an adapter's folder out of the pool, to `.loraretriever/removed`. Call it under the lock."""
    put_back_replaced(layout)
    if (layout.root / name).exists():
        _keep(layout, layout.root / name)


def find_removed(layout: Layout, name: str, digest: str) -> Path | None:
    """Where an adapter's folder with this content lies, if it was replaced or removed."""
    removed = {folder.name: folder for folder in (layout.state / _REMOVED).glob(f"{name}.*")}
    numbers = [int(number) for each in removed if (number := each.removeprefix(f"{name}.")).isdecimal()]
    folders = [removed[f"{name}.{number}"] for number in sorted(numbers, reverse=True)]
    return next((folder for folder in folders if digest_in(folder) == digest), None)


def put_back_replaced(layout: Layout) -> None:
    """Undo replacements that were cut short before the new revision was in its place. Call it under the lock."""
    for folder in (layout.state / _REPLACED).glob("*"):
        if (layout.root / folder.name).exists():
            _keep(layout, folder)
        else:
            rename(folder, layout.root / folder.name)


def _keep(layout: Layout, folder: Path) -> None:
    """Move an adapter's folder to the removed ones: it may hold files that are only there."""
    removed = layout.state / _REMOVED
    removed.mkdir(exist_ok=True)
    numbered = (removed / f"{folder.name}.{number}" for number in count(1))
    rename(folder, next(path for path in numbered if not path.exists()))


def _is_registered(layout: Layout, database: Database) -> bool:
    with database.read() as session:
        if records.pool_row(session) is None:
            return False
        known = {row.name: row.stamp for row in records.current_rows(session)}
    return known == {name: stamp_of(folder) for name, folder in adapter_folders(layout.root).items()}


def _common_base(root: Path, folders: Mapping[str, Path]) -> str:
    """The base model that most adapters name."""
    names: Counter[str] = Counter()
    problems = []
    for folder in folders.values():
        try:
            names[read_config(real_file(folder / CONFIG_FILE)).base_model] += 1
        except (AdmissionError, OSError) as error:
            problems.append(str(error))
    del names[""]
    if not names:
        found = "; ".join(problems) or "no adapter names its base model"
        raise PoolError(f"no adapter in {root} can be used: {found}.")
    return names.most_common(1)[0][0]


def _look(
    folders: Mapping[str, Path], rows: Mapping[str, AdapterRow], base_model: str, spec: BaseModelSpec | None
) -> tuple[list[_Found], dict[str, str]]:
    """What is in the folders that changed, and by name, what is wrong with those that cannot be used."""
    found, problems = [], {}
    for name, folder in folders.items():
        row = rows.get(name)
        if row is not None and row.stamp == stamp_of(folder):
            continue
        try:
            found.append(_look_at(folder, row, base_model, spec))
        except (LoraRetrieverError, OSError) as error:
            problems[name] = f"adapter folder {name!r} was left out: {error}"
    return found, problems


def _look_at(folder: Path, row: AdapterRow | None, base_model: str, spec: BaseModelSpec | None) -> _Found:
    name = check_name(folder.name)
    if folder.is_symlink():
        raise InvalidInputError(f"{folder} is a link; expected a folder. Move the adapter there.")
    stamp = stamp_of(folder)
    # An adapter that was accepted for another base model stays so.
    mismatch = row is not None and row.base_mismatch
    admission = admit(folder, base_model, spec, allow_base_mismatch=mismatch)
    card = read_card(optional_file(folder / CARD_FILE))
    description = row.description if row else ""
    if card.paragraphs and (row is None or (row.stamp or {}).get(CARD_FILE) != stamp.get(CARD_FILE)):
        description = card.paragraphs[0]
    if file := optional_file(folder / SAMPLES_FILE):
        samples = read_samples(file)
    else:
        samples = derived_samples(name, card, "" if card.paragraphs else description)
    return _Found(folder, stamp, admission, mismatch, description, samples)


def _register(session: Session, found: _Found, base_model: str) -> None:
    name = found.folder.name
    row = records.current_row(session, name)
    if row is None or row.digest != found.admission.digest:
        records.insert_revision(
            session,
            name,
            found.admission,
            found.samples,
            base_model=base_model,
            base_mismatch=found.base_mismatch,
            folder=name,
            source=printable(str(found.folder)),
            description=found.description,
            tags=row.tags if row else (),
            stamp=found.stamp,
        )
        return
    row.stamp = found.stamp
    row.description = found.description
    row.checked_shapes = row.checked_shapes or found.admission.checked_shapes
    if records.samples_of(session, row) != found.samples:
        records.replace_samples(session, row, found.samples)
