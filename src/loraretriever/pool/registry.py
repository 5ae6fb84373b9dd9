"""The pool: a registry of adapters with their samples and embeddings, safe to use from many processes."""

from __future__ import annotations

import difflib
import os
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

from sqlalchemy import select
from sqlalchemy.orm import Session

from loraretriever.errors import AdapterNotFoundError, InvalidInputError, ModelLoadError, PoolError
from loraretriever.pool import adding, embeddings, plain, records, verify
from loraretriever.pool.adding import AddResult, Candidate
from loraretriever.pool.database import Database
from loraretriever.pool.embeddings import SampleIds, Vectors
from loraretriever.pool.files import file_errors, locked
from loraretriever.pool.hub import locate
from loraretriever.pool.layout import Layout, check_name, created_layout, find_layout
from loraretriever.pool.samples import given_samples, printable, read_samples
from loraretriever.pool.schema import AdapterRow, PoolRow
from loraretriever.pool.weights import DEFAULT_MAX_BYTES, WEIGHTS_FILE, load_weights
from loraretriever.types import Adapter, AdapterWeights, BaseModelSpec, Sample

Samples = list[Sample]  # inside the class, `list` is its method
Problems = list[str]


class Pool:
    """The adapters of one base model. Threads may share a pool; processes each open it.

    `base_model` is the name of the base model. `problems` tells, for a plain folder, which of its folders were left
    out, and why.
    """

    def __init__(self, layout: Layout, database: Database, base_model: str = "") -> None:
        """Use `create` or `open`."""
        self._layout = layout
        self._database = database
        self._asked = threading.local()  # what `missing_embeddings` told this thread
        self.problems: tuple[str, ...] = ()
        self.base_model = base_model

    @classmethod
    def create(
        cls, location: str | Path, base_model: str, *, spec: BaseModelSpec | None = None, check_base: bool = True
    ) -> Self:
        """Make a new pool.

        Args:
            location: its folder; made when it is missing.
            base_model: the model that all its adapters are for: a hub id or a folder (whose absolute path is kept).
            spec: the base model's linear modules, where the caller knows them; else they are looked up when the
                first adapter is added.
            check_base: False adds adapters even where the base model cannot be loaded to compare shapes with.

        Raises:
            PoolError: there is a pool already, or the folder cannot be written.
        """
        if not base_model.strip():
            raise InvalidInputError("the base model's name is empty; expected a hub id or a folder.")
        if os.path.isdir(os.path.expanduser(base_model)):
            base_model = os.path.realpath(os.path.expanduser(base_model))
        with file_errors(f"make a pool at {location}"):
            layout = created_layout(location)
            layout.prepare()
            with locked(layout.state), _closed_on_error(Database(layout.database)) as database:
                database.migrate()
                with database.write() as session:
                    if records.pool_row(session) is not None:
                        raise PoolError(f"there is a pool at {layout.root} already; open it, or choose another folder.")
                    records.create_pool_row(session, base_model, check_base, spec)
        return cls(layout, database, base_model)

    @classmethod
    def open(cls, location: str | Path) -> Self:
        """Open a pool made by `create`, or a plain folder with one PEFT folder per adapter.

        A plain folder's adapters are registered where they lie, and changes to them are found on each opening.

        Raises:
            PoolError: there is no pool at that place, or its database cannot be used.
        """
        with file_errors(f"open the pool at {location}"):
            layout = find_layout(location)
            layout.prepare()
            with _closed_on_error(Database(layout.database)) as database:
                if not database.is_current:
                    with locked(layout.state):
                        database.migrate()
                pool = cls(layout, database)
                pool.refresh()
        return pool

    def refresh(self) -> None:
        """Register what changed in a plain folder; other pools need no refreshing."""
        if self._layout.plain:
            with file_errors(f"read the pool at {self._layout.root}"):
                self.problems = tuple(plain.refresh(self._layout, self._database))
        with self._database.read() as session:
            self.base_model = self._row(session).base_model

    @property
    def location(self) -> Path:
        """The pool's folder."""
        return self._layout.root

    @property
    def change(self) -> int:
        """A number that grows with each committed change to adapters or samples, by any process."""
        with self._database.read() as session:
            return session.scalars(select(PoolRow.change)).one()

    def add(
        self,
        source: str | Path,
        *,
        name: str | None = None,
        samples: Sequence[str] | None = None,
        samples_file: str | Path | None = None,
        description: str = "",
        tags: Iterable[str] = (),
        revision: str | None = None,
        allow_base_mismatch: bool = False,
        max_bytes: int = DEFAULT_MAX_BYTES,
    ) -> AddResult:
        """Add an adapter, or a new revision of one. All of it is in the pool afterwards, or nothing.

        Args:
            source: a PEFT folder, or a hub id `owner/name[@revision]`.
            name: its name in the pool; by default that of the folder or repository.
            samples: prompts that it is meant for. Without them and without `samples_file` they come from the
                folder's `samples.jsonl` (of a hub repository only configuration, weights and model card are
                downloaded), or else from the model card, the description, at last the name.
            samples_file: a JSONL file with samples: objects with `inputs`, `text` or `prompt`.
            description: what it does, in a sentence.
            tags: words to group adapters by.
            revision: a branch, tag or commit on the hub.
            allow_base_mismatch: accept an adapter that names another base model.
            max_bytes: the largest weights file to accept.

        Raises:
            AdmissionError: the adapter is refused.
            InvalidInputError: the source, the name or the samples cannot be used.
            ModelLoadError: the base model is needed to check the adapter and cannot be loaded.
            PoolError: the pool, or the hub, cannot be used.
        """
        self._check_takes_adapters()
        if samples is not None and samples_file is not None:
            raise InvalidInputError(
                "samples are given as strings (samples, --sample) and as a file (samples_file, --samples); "
                "expected one of them."
            )
        given = given_samples(samples) if samples is not None else None
        if samples_file is not None:
            given = read_samples(Path(samples_file))
        folder, label, default_name = locate(source, revision, max_bytes)
        candidate = Candidate(
            name=check_name(name if name is not None else default_name),
            folder=folder,
            source=printable(label),
            samples=given,
            description=printable(description).strip(),
            tags=tuple(dict.fromkeys(map(printable, tags))),
            allow_base_mismatch=allow_base_mismatch,
            max_bytes=max_bytes,
        )
        with file_errors(f"add {label}"):
            return adding.add(self._layout, self._database, self.base_model, self._spec(), candidate)

    def remove(self, name: str) -> None:
        """Remove an adapter with all its revisions. A plain folder keeps its files in `.loraretriever/removed`."""
        self._check_takes_adapters()
        with file_errors(f"remove {name!r}"), locked(self._layout.state):
            with self._database.write() as session:
                self._find(session, name)
                if self._layout.plain:
                    plain.take_out(self._layout, name)
                records.delete_adapter(session, name)
                records.count_change(session)
            if not self._layout.plain:
                adding.sweep_content(self._layout, self._database)

    def set_enabled(self, name: str, enabled: bool) -> None:
        """Let an adapter be retrieved, or not."""
        with self._database.write() as session:
            row = self._find(session, name)
            if row.enabled != enabled:
                row.enabled = enabled
                records.count_change(session)

    def list(self, enabled_only: bool = False) -> list[Adapter]:
        """All adapters, by name."""
        with self._database.read() as session:
            rows = [row for row in records.current_rows(session) if row.enabled or not enabled_only]
            return records.to_adapters(session, rows, self._layout.root)

    def get(self, name: str) -> Adapter:
        """One adapter.

        Raises:
            AdapterNotFoundError: there is none of that name; the message gives names like it.
        """
        with self._database.read() as session:
            return records.to_adapters(session, [self._find(session, name)], self._layout.root)[0]

    def samples(self, name: str) -> Samples:
        """An adapter's samples, in order."""
        with self._database.read() as session:
            return records.samples_of(session, self._find(session, name))

    def weights(self, name: str, digest: str | None = None) -> AdapterWeights:
        """An adapter's weights: CPU tensors mapped from its file, in the dtype they are stored in.

        Args:
            name: the adapter.
            digest: the revision to load, by its content; it need not be the current one. None: the current one.

        Raises:
            AdapterNotFoundError: there is none of that name, or that revision's files are no longer there.
            PoolError: the files cannot be read.
        """
        with self._database.read() as session:
            row = self._find(session, name) if digest is None else records.revision_row(session, name, digest)
            session.expunge_all()
        gone = AdapterNotFoundError(
            f"adapter {name!r} was revised or removed meanwhile: its content {digest} is no longer in the pool. "
            "Ask again, for the pool as it is now."
        )
        if row is None:
            raise gone
        folder = self._layout.root / row.folder
        if digest is not None and not (folder / WEIGHTS_FILE).exists():
            raise gone
        if row.stamp is not None and plain.changed_weights(row.stamp, folder):
            if digest is not None:
                raise gone
            raise PoolError(f"the files of adapter {name!r} in {folder} have changed. Open the pool again.")
        return load_weights(folder, name, row.digest)

    def verify(self) -> Problems:
        """Look at everything in the pool; returns what is wrong, in words, or nothing."""
        self.refresh()
        problems = list(self.problems)
        try:
            spec = self._load_spec()
        except ModelLoadError as error:
            spec = None
            with self._database.read() as session:
                unchecked = [row.name for row in records.current_rows(session) if not row.checked_shapes]
            if unchecked:
                problems.append(f"the shapes of {', '.join(unchecked)} cannot be checked: {error}")
        with file_errors(f"verify the pool at {self._layout.root}"):
            problems += verify.find_problems(self._layout, self._database, self.base_model, spec)
        return problems

    def check_shapes(self, spec: BaseModelSpec) -> Problems:
        """Compare the enabled adapters with a base model, now that it is known; returns what is wrong, by adapter.

        With the pool's own base model (by name), those are compared that were admitted without it, and what is found
        well is remembered. With another one, all are, and nothing is stored.
        """
        return verify.check_shapes(self._layout, self._database, spec)

    def embeddings(self, encoder_tag: str) -> dict[str, Vectors]:
        """For each enabled adapter that is wholly embedded: its samples' vectors, shape (samples, dimension)."""
        with self._database.read() as session:
            return embeddings.load(session, encoder_tag)

    def missing_embeddings(self, encoder_tag: str) -> dict[str, Samples]:
        """For each enabled adapter that is not wholly embedded by this encoder: its samples."""
        with self._database.read() as session:
            found = embeddings.missing(session, encoder_tag)
        self._asked.ids = {name: ids for name, (ids, _) in found.items()}
        return {name: samples for name, (_, samples) in found.items()}

    def store_embeddings(self, encoder_tag: str, vectors: Mapping[str, Vectors]) -> None:
        """Store vectors for what `missing_embeddings` gave this thread, one per sample, in order.

        Adapters whose samples have changed since then are passed over. Vectors of a few encoders are kept.
        """
        asked: dict[str, SampleIds] = getattr(self._asked, "ids", {})
        with self._database.write() as session:
            embeddings.store(session, encoder_tag, vectors, asked)

    def close(self) -> None:
        """Close the connections to the database."""
        self._database.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _check_takes_adapters(self) -> None:
        if not self._layout.takes_adapters:
            raise PoolError(f"the folder {self._layout.root} is read-only. Copy the pool to a folder of your own.")

    def _row(self, session: Session) -> PoolRow:
        row = records.pool_row(session)
        if row is None:
            raise PoolError(
                f"the pool at {self._layout.root} was never finished. Make it with: "
                f"loraretriever pool init --pool {self._layout.root}"
            )
        return row

    def _find(self, session: Session, name: str) -> AdapterRow:
        row = records.current_row(session, name)
        if row is None:
            names = [each.name for each in records.current_rows(session)]
            close = difflib.get_close_matches(name, names, n=3)
            hint = f"did you mean {' or '.join(map(repr, close))}?" if close else f"the pool has {len(names)} adapters."
            raise AdapterNotFoundError(f"no adapter {name!r} in the pool: {hint} See all with: loraretriever pool list")
        return row

    def _spec(self) -> BaseModelSpec | None:
        """The base model's modules; None where they cannot be had and the pool does without."""
        try:
            return self._load_spec()
        except ModelLoadError:
            with self._database.read() as session:
                if self._row(session).check_base:
                    raise
            return None

    def _load_spec(self) -> BaseModelSpec:
        with self._database.read() as session:
            stored = records.stored_spec(self._row(session))
        if stored is not None:
            return stored
        from loraretriever.models import base_model_spec

        spec = base_model_spec(self.base_model)
        with self._database.write() as session:
            self._row(session).spec = records.spec_json(spec)
        return spec


@contextmanager
def _closed_on_error(database: Database) -> Iterator[Database]:
    try:
        yield database
    except BaseException:
        database.close()
        raise
