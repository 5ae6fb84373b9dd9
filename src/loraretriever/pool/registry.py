"""The pool: a registry of adapters with their samples and embeddings, safe to use from many processes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Self

from loraretriever.errors import InvalidInputError, ModelLoadError, PoolError
from loraretriever.pool import adding, content, editing, plain, records, revisions, verify
from loraretriever.pool.adding import AddResult, Candidate
from loraretriever.pool.changes import count_change
from loraretriever.pool.database import Database
from loraretriever.pool.files import file_errors, locked
from loraretriever.pool.hub import locate
from loraretriever.pool.layout import (
    DEFAULT_DISK_BYTES,
    absolute_model,
    check_owner,
    created_layout,
    find_layout,
    shown_location,
)
from loraretriever.pool.names import check_name, own_name
from loraretriever.pool.prompts import PromptMethods
from loraretriever.pool.samples import given_samples, printable, read_samples
from loraretriever.pool.storage import Storage
from loraretriever.pool.weights import DEFAULT_MAX_BYTES
from loraretriever.types import Adapter, AdapterWeights, BaseModelSpec

Problems = list[str]  # inside the class, `list` is its method


class Pool(PromptMethods):
    """The adapters of one base model. Threads may share a pool; processes each open it.

    `base_model` is the name of the base model. `problems` tells, for a plain folder, which of its folders were left
    out, and why. `keys` and `jobs` are for servers. `grace_seconds`: how long what this process removes can still be
    loaded, by requests of any process that came before.
    """

    @classmethod
    def create(
        cls,
        location: str | Path,
        base_model: str,
        *,
        storage: str | None = None,
        spec: BaseModelSpec | None = None,
        check_base: bool = True,
    ) -> Self:
        """Make a new pool.

        Args:
            location: its folder, made when it is missing; or the URL of a PostgreSQL database that there is, for a
                pool that several hosts share.
            base_model: the model that all its adapters are for: a hub id or a folder (whose absolute path is kept).
            storage: for a shared pool, where its adapters' files go: a URL that fsspec knows, such as
                `s3://bucket/prefix`. Credentials come from the environment.
            spec: the base model's linear modules, where the caller knows them; else they are looked up when the
                first adapter is added.
            check_base: False adds adapters even where the base model cannot be loaded to compare shapes with.

        Raises:
            InvalidInputError: a name or a URL cannot be used.
            PoolError: there is a pool already, or the folder, the database or the storage cannot be written.
        """
        base_model = absolute_model(base_model, "base model")
        with file_errors(f"make a pool at {shown_location(location)}"):
            layout = created_layout(location, storage)
            layout.prepare()
            if layout.storage is not None:
                Storage(layout.storage).probe()
            with locked(layout.state), _closed_on_error(Database(layout.database)) as database:
                database.migrate()
                with database.write() as session:
                    if records.pool_row(session) is not None:
                        raise PoolError(f"there is a pool at {layout.name} already; open it, or choose another place.")
                    records.create_pool_row(session, base_model, check_base, spec, layout.storage)
        return cls(layout, database, base_model)

    @classmethod
    def open(cls, location: str | Path, *, disk_bytes: int = DEFAULT_DISK_BYTES) -> Self:
        """Open a pool made by `create`, by its folder or its URL, or a plain folder with one PEFT folder per adapter.

        A plain folder's adapters are registered where they lie, and changes to them are found on each opening.

        Args:
            location: the folder, or the URL of the database.
            disk_bytes: of a shared pool, how much of its adapters' files this host keeps in the cache folder.

        Raises:
            PoolError: there is no pool at that place, or its database cannot be used.
        """
        with file_errors(f"open the pool at {shown_location(location)}"):
            layout = replace(find_layout(location), disk_bytes=disk_bytes)
            layout.prepare()
            with _closed_on_error(Database(layout.database)) as database:
                if not database.is_current:
                    with locked(layout.state):
                        database.migrate()
                if layout.url is not None:
                    with database.read() as session:
                        row = records.pool_row(session)
                    layout = replace(layout, storage=row.storage if row else None)
                pool = cls(layout, database)
                pool.refresh()
        return pool

    def refresh(self) -> None:
        """Register what changed in a plain folder; other pools need no refreshing."""
        if self._layout.plain:
            with file_errors(f"read the pool at {self._layout.name}"):
                self.problems = tuple(plain.refresh(self._layout, self._database))
        with self._database.read() as session:
            self.base_model = self._row(session).base_model

    def add(
        self,
        source: str | Path,
        *,
        name: str | None = None,
        samples: Sequence[str] | None = None,
        samples_file: str | Path | None = None,
        description: str = "",
        tags: Iterable[str] = (),
        tenant: str | None = None,
        revision: str | None = None,
        label: str | None = None,
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
            tenant: whom it belongs to. None: as before; the empty string: nobody. A plain folder has no tenants.
            revision: a branch, tag or commit on the hub.
            label: what is recorded as its source; None: where it was read from.
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
        folder, found_at, default_name = locate(source, revision, max_bytes)
        name = name if name is not None else default_name
        candidate = Candidate(
            name=check_name(name, self._owner(name) if tenant is None else tenant),
            folder=folder,
            source=printable(label or found_at),
            samples=given,
            description=printable(description).strip(),
            tags=tuple(dict.fromkeys(map(printable, tags))),
            tenant=check_owner(tenant, self._layout),
            allow_base_mismatch=allow_base_mismatch,
            max_bytes=max_bytes,
        )
        with file_errors(f"add {label or found_at}"):
            return adding.add(self._layout, self._database, self.base_model, self._spec(), candidate)

    def remove(self, name: str) -> None:
        """Remove an adapter with all its revisions.

        Its content stays for `grace_seconds`, and is deleted by an `add` or a `remove` after them. A plain folder
        keeps its files in `.loraretriever/removed`.
        """
        self._check_takes_adapters()
        with file_errors(f"remove {name!r}"), locked(self._layout.state):
            with self._database.write() as session:
                records.find_row(session, name)
                count_change(session, name)
                if self._layout.plain:
                    plain.take_out(self._layout, name)
                else:
                    content.retire(session, name, self.grace_seconds)
                records.delete_adapter(session, name)
                unused = content.expired(session) if self._layout.storage is None else set()
            content.delete_content(self._layout, unused)
            if self._layout.storage is not None:
                content.sweep(self._layout, self._database)

    def update(self, name: str, *, description: str | None = None, tags: Iterable[str] | None = None) -> Adapter:
        """Describe an adapter anew; what is None stays. Samples that came from its description change with it.

        Raises:
            AdapterNotFoundError: there is none of that name.
            InvalidInputError: the description cannot be used.
            PoolError: the pool cannot be written.
        """
        new = None if description is None else printable(description).strip()
        words = None if tags is None else tuple(dict.fromkeys(map(printable, tags)))
        with self._editing(f"change {name!r}") as session:
            row = editing.update_details(session, self._layout, name, new, words)
            session.flush()
            return records.to_adapters(session, [row], self._layout.root)[0]

    def set_enabled(self, name: str, enabled: bool) -> None:
        """Let an adapter be retrieved, or not."""
        with self._database.write() as session:
            row = records.find_row(session, name)
            if row.enabled != enabled:
                row.enabled = enabled
                count_change(session, name)

    def weights(self, name: str, digest: str | None = None) -> AdapterWeights:
        """An adapter's weights: CPU tensors mapped from its file, in the dtype they are stored in.

        Args:
            name: the adapter.
            digest: the revision to load, by its content; it need not be the current one, and the adapter may have
                been removed less than `grace_seconds` ago. None: the current one.

        Raises:
            AdapterNotFoundError: there is none of that name, or that revision's files are no longer there.
            PoolError: the files cannot be read.
        """
        if digest is None:
            return content.load_current(self._layout, self._database, name)
        return content.load_revision(self._layout, self._database, name, digest)

    def find_digest(self, name: str, beginning: str) -> str:
        """The digest of the last revision of an adapter whose digest begins so; also of one that was just removed.

        Raises:
            AdapterNotFoundError: no revision of that name has it.
        """
        return revisions.find_digest(self._database, name, beginning)

    def content_folder(self, digest: str) -> Path | None:
        """The PEFT folder with this content, where its files never change; None: load it with `weights`."""
        return revisions.content_folder(self._layout, digest)

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
        with file_errors(f"verify the pool at {self._layout.name}"):
            problems += verify.find_problems(self._layout, self._database, self.base_model, spec)
        return problems

    def check_shapes(self, spec: BaseModelSpec) -> Problems:
        """Compare the enabled adapters with a base model, now that it is known; returns what is wrong, by adapter.

        With the pool's own base model (by name), those are compared that were admitted without it, and what is found
        well is remembered. With another one, all are, and nothing is stored.
        """
        return verify.check_shapes(self._layout, self._database, spec)

    def _owner(self, name: str) -> str | None:
        """Whom an adapter belongs to that there is already."""
        if own_name(name) == name:
            return None
        with self._database.read() as session:
            row = records.current_row(session, name)
            return row.tenant if row else None

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
