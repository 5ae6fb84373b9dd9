"""Where a pool is: a folder made by `Pool.create`, a plain folder of PEFT folders, or the URL of a database."""

from __future__ import annotations

import hashlib
import os
import stat
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from sqlalchemy import URL

from loraretriever.config import cache_folder
from loraretriever.errors import InvalidInputError, PoolError
from loraretriever.pool.database import DATABASE_FILE
from loraretriever.pool.files import STAGING_FOLDER
from loraretriever.pool.names import check_tenant
from loraretriever.pool.peft_config import CONFIG_FILE
from loraretriever.pool.postgres import parse_url, shown_url
from loraretriever.pool.storage import check_url
from loraretriever.pool.weights import WEIGHTS_FILE

STATE_FOLDER = ".loraretriever"
CONTENT_FOLDER = "adapters"
DEFAULT_DISK_BYTES = 16 << 30
VIEW_PREFIX = "view-"  # of folders in the state folder, with what is derived from what a tenant may see


@dataclass(frozen=True, slots=True)
class Layout:
    """The places of one pool. `state` holds the database, the lock and what is unfinished.

    A shared pool has a database at `url` and its adapters' files in the storage at that URL. Its `root` and `state`
    are a folder of this host, with up to `disk_bytes` of those files.
    """

    root: Path
    state: Path
    plain: bool
    url: URL | None = None
    storage: str | None = None
    disk_bytes: int = DEFAULT_DISK_BYTES

    @property
    def name(self) -> str:
        """What the pool is called in messages: its folder, or its URL without the password."""
        return shown_url(self.url) if self.url is not None else str(self.root)

    @property
    def database(self) -> Path | URL:
        """The SQLite file, or the URL of a PostgreSQL database."""
        return self.url if self.url is not None else self.state / DATABASE_FILE

    @property
    def content(self) -> Path:
        """The folder of the content-addressed adapters; a plain folder has none."""
        return self.root / CONTENT_FOLDER

    @property
    def takes_adapters(self) -> bool:
        """Whether adapters can be added and removed: not in a plain folder that is read-only."""
        return not self.plain or self.state.parent == self.root

    def prepare(self) -> None:
        """Make the state folder.

        Raises:
            PoolError: a link or a device is in the place of a file that is written to.
        """
        if self.plain:
            _check_is_real(self.state)
        self.state.mkdir(parents=True, exist_ok=True)
        if self.plain:
            # A plain folder may come from anywhere: nothing in it may make this process write to another place.
            for file in (*self.state.iterdir(), *self.state.glob(f"{VIEW_PREFIX}*/*")):
                _check_is_real(file)
        if self.plain and self.takes_adapters:
            with suppress(FileExistsError), (self.state / ".gitignore").open("x") as handle:
                handle.write("*\n")


def _check_is_real(file: Path) -> None:
    try:
        mode = file.lstat().st_mode
    except FileNotFoundError:
        return
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise PoolError(f"{file} is a link or a device; expected a file or folder of the pool's own. Delete it.")


def created_layout(location: str | Path, storage: str | None = None) -> Layout:
    """The layout of a new pool.

    Raises:
        InvalidInputError: a pool with a URL is given no storage, or a folder is given one, or a URL cannot be used.
        PoolError: the folder is a plain one, with adapters in it, or has folders that the pool would take for its own.
    """
    if is_url(location):
        if storage is None:
            raise InvalidInputError(
                f"the pool {shown_location(location)} has no storage; expected the URL of a place for its adapters' "
                "files that all hosts can read, such as s3://BUCKET/PREFIX. Give one with: --storage"
            )
        return replace(_shared_layout(location), storage=check_url(storage))
    if storage is not None:
        raise InvalidInputError(
            f"storage is given, but the pool {location} is a folder and keeps its adapters there; leave it out, or "
            "give the URL of a database: postgresql://USER@HOST/DATABASE."
        )
    root = local_path(location)
    if root.is_dir() and adapter_folders(root):
        raise PoolError(f"{root} holds adapters and is a pool as it is: open it, or choose another folder.")
    for own in (root / CONTENT_FOLDER, root / STAGING_FOLDER):
        if not (root / DATABASE_FILE).is_file() and own.is_dir() and any(own.iterdir()):
            raise PoolError(
                f"{own} holds files already, and the pool would keep its own there. Choose another folder, such as "
                f"{root / 'pool'}."
            )
    return Layout(root, root, plain=False)


def find_layout(location: str | Path) -> Layout:
    """Look what kind of pool is at a location.

    Raises:
        PoolError: none is.
    """
    if is_url(location):
        return _shared_layout(location)
    root = local_path(location)
    if not root.is_dir():
        raise PoolError(
            f"there is no pool at {root}; expected a folder. Make one with: loraretriever pool init --pool {root}"
        )
    if (root / DATABASE_FILE).is_file():
        return Layout(root, root, plain=False)
    if (root / CONFIG_FILE).exists():
        raise PoolError(f"{root} is a single adapter; expected a pool. Open the folder above it, or add it to a pool.")
    state = _plain_state(root)
    if not adapter_folders(root) and not (state / DATABASE_FILE).is_file():
        raise PoolError(
            f"there is no pool at {root}; expected {DATABASE_FILE} or folders with {CONFIG_FILE}. "
            f"Make one with: loraretriever pool init --pool {root}"
        )
    return Layout(root, state, plain=True)


def is_url(location: str | Path) -> bool:
    """Whether a pool's place is a database's URL, not a folder."""
    return "://" in str(location)


def shown_location(location: str | Path) -> str:
    """A pool's place for messages: of a URL no password."""
    return shown_url(parse_url(str(location))) if is_url(location) else str(location)


def _shared_layout(location: str | Path) -> Layout:
    url = parse_url(str(location))
    identity = f"{shown_url(url)} {sorted(url.query.items())}"
    folder = cache_folder() / "pools" / hashlib.sha256(identity.encode()).hexdigest()[:32]
    return Layout(folder, folder, plain=False, url=url)


def local_path(location: str | Path) -> Path:
    """The absolute path of a pool's folder.

    Raises:
        PoolError: the location cannot be a path.
    """
    try:
        return Path(location).expanduser().resolve()
    except (OSError, RuntimeError, ValueError) as error:
        raise PoolError(f"{str(location)!r:.200} cannot be a pool's folder: {error}.") from error


def adapter_folders(root: Path) -> dict[str, Path]:
    """The folders in a plain folder that are, or try to be, adapters: by name."""
    return {
        folder.name: folder
        for folder in sorted(root.iterdir())
        # os.path.exists, unlike Path's, is False where the folder may not be read.
        if not folder.name.startswith(".")
        and any(os.path.exists(folder / file) for file in (CONFIG_FILE, WEIGHTS_FILE))
    }


def check_owner(tenant: str | None, layout: Layout) -> str | None:
    """The tenant, when an adapter of this pool may belong to it; the empty string: to nobody.

    Raises:
        InvalidInputError: it may not.
    """
    if tenant and layout.plain:
        raise InvalidInputError(
            f"tenant is {tenant!r:.200}, but {layout.name} is a plain folder, whose adapters belong to no tenant. Make "
            "a pool for them with: loraretriever pool init"
        )
    return check_tenant(tenant) if tenant else tenant


def absolute_model(name: str, what: str) -> str:
    """A model's name: of a folder the absolute path, so that it is found from anywhere.

    Raises:
        InvalidInputError: it is empty, or no text.
    """
    if not name.strip():
        raise InvalidInputError(f"the {what}'s name is empty; expected a hub id or a folder.")
    if not name.isprintable():
        raise InvalidInputError(f"the {what}'s name is {name!r:.200}; expected printable characters.")
    folder = os.path.expanduser(name)
    return os.path.realpath(folder) if os.path.isdir(folder) else name


def is_writable(folder: Path) -> bool:
    """Whether this process may make files in a folder."""
    return os.access(folder, os.W_OK | os.X_OK)


def _plain_state(root: Path) -> Path:
    inside = root / STATE_FOLDER
    if is_writable(inside if inside.exists() else root):
        return inside
    return cache_folder() / "pools" / hashlib.sha256(os.fsencode(root)).hexdigest()[:32]
