"""Plain folders: one PEFT folder per adapter, registered where it lies.

The folder is the truth, the database follows it. A stamp, the times and sizes of an adapter's files, tells
whether to look at it again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from sqlalchemy.orm import Session

from loraretriever.errors import AdmissionError, InvalidInputError, LoraRetrieverError, PoolError
from loraretriever.pool import records
from loraretriever.pool.admission import Admission, admit
from loraretriever.pool.database import Database
from loraretriever.pool.files import discard, locked, rename, write_file
from loraretriever.pool.layout import Layout, adapter_folders, check_name
from loraretriever.pool.peft_config import CONFIG_FILE, read_config
from loraretriever.pool.samples import SAMPLES_FILE, ModelCard, derived_samples, read_card, read_samples, write_samples
from loraretriever.pool.schema import AdapterRow
from loraretriever.pool.weights import CARD_FILE, WEIGHTS_FILE, optional_file
from loraretriever.types import BaseModelSpec, Sample

Stamp = dict[str, list[int]]
_REPLACED = "replaced"  # adapters out of their place while a new revision takes it
_REMOVED = "removed"  # removed adapters: a plain folder is the user's, so they are kept


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
    with locked(layout.state), database.write() as session:
        _put_back_replaced(layout)
        folders = adapter_folders(layout.root)
        pool = records.pool_row(session) or records.create_pool_row(session, _common_base(layout.root, folders), False)
        spec = records.stored_spec(pool)
        rows = {row.name: row for row in records.current_rows(session)}
        problems = []
        for name, folder in folders.items():
            row = rows.pop(name, None)
            if row is not None and row.stamp == stamp_of(folder):
                continue
            try:
                _register(session, folder, row, pool.base_model, spec)
            except (LoraRetrieverError, OSError) as error:
                problems.append(f"adapter folder {name!r} was left out: {error}")
                if row is not None:
                    rows[name] = row
        for name in rows:
            records.delete_adapter(session, name)
            records.count_change(session)
        return problems


def place(layout: Layout, staged: Path, name: str, samples: list[Sample]) -> None:
    """Put a staged adapter into its place in the folder; one that was there leaves it. Call it under the lock."""
    write_file(staged / SAMPLES_FILE, write_samples(samples))
    target = layout.root / name
    replaced = layout.state / _REPLACED / name
    if target.exists():
        replaced.parent.mkdir(exist_ok=True)
        rename(target, replaced)
    rename(staged, target)
    if replaced.exists():
        discard(replaced, layout.state)


def take_out(layout: Layout, name: str) -> None:
    """Move an adapter's folder out of the pool, to `.loraretriever/removed`. Call it under the lock."""
    folder, removed = layout.root / name, layout.state / _REMOVED
    removed.mkdir(exist_ok=True)
    target = next(path for n in range(1, 1 << 30) if not (path := removed / f"{name}.{n}").exists())
    if folder.exists():
        rename(folder, target)


def _is_registered(layout: Layout, database: Database) -> bool:
    with database.read() as session:
        if records.pool_row(session) is None:
            return False
        known = {row.name: row.stamp for row in records.current_rows(session)}
    return known == {name: stamp_of(folder) for name, folder in adapter_folders(layout.root).items()}


def _put_back_replaced(layout: Layout) -> None:
    """Undo replacements that were cut short before the new revision was in its place."""
    for folder in (layout.state / _REPLACED).glob("*"):
        if (layout.root / folder.name).exists():
            discard(folder, layout.state)
        else:
            rename(folder, layout.root / folder.name)


def _common_base(root: Path, folders: Mapping[str, Path]) -> str:
    """The base model that most adapters name."""
    names: Counter[str] = Counter()
    problems = []
    for folder in folders.values():
        try:
            names[read_config(folder / CONFIG_FILE).base_model] += 1
        except (AdmissionError, OSError) as error:
            problems.append(str(error))
    del names[""]
    if not names:
        found = "; ".join(problems) or "no adapter names its base model"
        raise PoolError(f"no adapter in {root} can be used: {found}.")
    return names.most_common(1)[0][0]


def _register(
    session: Session, folder: Path, row: AdapterRow | None, base_model: str, spec: BaseModelSpec | None
) -> None:
    name = check_name(folder.name)
    if folder.is_symlink():
        raise InvalidInputError(f"{folder} is a link; expected a folder. Move the adapter there.")
    stamp = stamp_of(folder)
    # An adapter that was accepted for another base model stays so.
    mismatch = row is not None and row.base_mismatch
    admission = admit(folder, base_model, spec, allow_base_mismatch=mismatch)
    card = read_card(optional_file(folder / CARD_FILE))
    description = card.paragraphs[0] if card.paragraphs else row.description if row else ""
    samples = _samples(folder, name, card, description)
    if row is None or row.digest != admission.digest:
        records.insert_revision(
            session,
            name,
            admission,
            samples,
            base_model=base_model,
            base_mismatch=mismatch,
            folder=name,
            source=str(folder),
            description=description,
            tags=row.tags if row else (),
            stamp=stamp,
        )
    else:
        _update(session, row, admission, samples, stamp)
    records.count_change(session)


def _samples(folder: Path, name: str, card: ModelCard, description: str) -> list[Sample]:
    if file := optional_file(folder / SAMPLES_FILE):
        return read_samples(file)
    return derived_samples(name, card, "" if card.paragraphs else description)


def _update(session: Session, row: AdapterRow, admission: Admission, samples: list[Sample], stamp: Stamp) -> None:
    row.stamp = stamp
    row.checked_shapes = row.checked_shapes or admission.checked_shapes
    if records.samples_of(session, row) != samples:
        records.replace_samples(session, row, samples)
