"""The adapters' files of a shared pool: objects below a URL that fsspec knows, such as s3://bucket/prefix.

An adapter's files are at adapters/<digest>/ and never change. Whose credentials are used is fsspec's affair: those of
the environment, or of the host.
"""

from __future__ import annotations

import errno
import random
import secrets
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from loraretriever.errors import InvalidInputError, MissingExtraError, PoolAwayError, PoolError, require_extra
from loraretriever.pool.peft_config import CONFIG_FILE
from loraretriever.pool.weights import CARD_FILE, WEIGHTS_FILE, digest_in

FOLDER = "adapters"
_FILES = (CARD_FILE, CONFIG_FILE, WEIGHTS_FILE)
PAUSES = (0.2, 0.5, 1.0)  # seconds between tries, up to twice as long; the file system may try again by itself too
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
_FINAL = (PermissionError, NotImplementedError)  # which another try does not change
_LOCAL = ("file", "local")
_S3 = ("s3", "s3a")
T = TypeVar("T")


class NotStoredError(PoolError):
    """A storage does not have an adapter's files."""


def check_url(url: str) -> str:
    """A storage's URL, when it can be one.

    Raises:
        InvalidInputError: it holds a password, or fsspec knows no such file system.
        MissingExtraError: its file system is not installed.
    """
    parts = urlsplit(url)
    if parts.password is not None or "://" not in url:
        found = "holds a password, which would be kept in the database" if parts.password is not None else "is no URL"
        raise InvalidInputError(
            f"the storage {url.replace(parts.password or ' ', '***')!r:.300} {found}; expected a URL such as "
            "s3://BUCKET/PREFIX, and credentials in the environment."
        )
    _file_system(url)
    return url.rstrip("/")


def _file_system(url: str) -> tuple[Any, str]:
    with require_extra("storage"):
        import fsspec
    scheme = urlsplit(url).scheme
    options = {"auto_mkdir": True} if scheme in _LOCAL else {}
    try:
        fs, path = fsspec.url_to_fs(url, use_listings_cache=False, **options)
    except ValueError as error:
        raise InvalidInputError(
            f"the storage {url!r:.300} cannot be used: {error}. Expected a URL such as s3://BUCKET/PREFIX."
        ) from error
    except ImportError as error:
        package = getattr(error.__cause__, "name", None) or error.name
        known = "'loraretriever[storage-s3]'" if scheme in _S3 else package
        raise MissingExtraError(
            f"the storage {url!r:.300} needs the package {package!r}, which is not installed; install it with: "
            f"pip install {known}"
        ) from error
    return fs, str(path)


class Storage:
    """The objects below a URL. Threads may share it. What fails for a while is tried again."""

    def __init__(self, url: str) -> None:
        """Nothing is read yet."""
        self.url = url
        self._fs, self._path = _file_system(url)

    def probe(self) -> None:
        """Store something small, read it and delete it.

        Raises:
            PoolError: that cannot be done.
        """
        path, content = self._folder(f"probe-{secrets.token_hex(8)}"), secrets.token_bytes(16)
        try:
            self._tried(partial(self._fs.pipe_file, path, content))
            found = self._tried(partial(self._fs.cat_file, path))
            self._tried(partial(self._fs.rm_file, path))
        except (FileNotFoundError, OSError) as error:
            raise PoolError(
                f"the storage {self.url} cannot be written to: {error}. Make the bucket or folder."
            ) from error
        if found != content:
            raise PoolError(f"the storage {self.url} does not give back what is stored there.")

    def upload(self, digest: str, folder: Path) -> None:
        """Store an adapter's files, and look whether all of them are there.

        Raises:
            PoolError: they cannot be stored.
        """
        try:
            for file in _present(folder):
                self._tried(partial(self._fs.put_file, str(file), f"{self._folder(digest)}/{file.name}"))
        except OSError as error:
            raise PoolError(f"{digest} cannot be stored in {self.url}: {error}.") from error
        if not self.holds(digest, folder):
            raise PoolError(f"{self.url} does not hold what was stored there: {digest}. Try again.")

    def holds(self, digest: str, folder: Path) -> bool:
        """Whether the files of a folder are there, by their sizes."""
        return all(
            self._size(f"{self._folder(digest)}/{each.name}") == each.stat().st_size for each in _present(folder)
        )

    def download(self, digest: str, folder: Path) -> None:
        """Bring an adapter's files into an existing folder, with the content that they must have.

        Raises:
            NotStoredError: there are none.
            PoolError: what is there is something else.
            PoolAwayError: the storage cannot be reached.
            OSError: the folder cannot be written to.
        """
        for _ in range(2):  # bytes that are lost or wrong on their way may come whole the next time
            for file in _FILES:
                source = f"{self._folder(digest)}/{file}"
                try:
                    self._tried(partial(self._fs.get_file, source, str(folder / file)))
                except FileNotFoundError as error:
                    if file != CARD_FILE:
                        raise NotStoredError(
                            f"{self.url} has no {FOLDER}/{digest}/{file}. Add the adapter again."
                        ) from error
            if digest_in(folder) == digest:
                return
        raise PoolError(
            f"the files in {self.url}/{FOLDER}/{digest} have another content than their name says, which is their "
            "SHA-256. They were changed: remove the adapter and add it again."
        )

    def delete(self, digests: Iterable[str]) -> None:
        """Delete the files of adapters, where there are any.

        Raises:
            PoolError: some are still there.
        """
        for digest in digests:
            try:
                self._tried(partial(self._fs.rm, self._folder(digest), recursive=True), ())
            except FileNotFoundError:
                continue
            except OSError as error:
                raise PoolError(f"{digest} cannot be deleted in {self.url}: {error}.") from error

    def _folder(self, digest: str) -> str:
        return f"{self._path}/{FOLDER}/{digest}"

    def _size(self, path: str) -> int | None:
        try:
            return int(self._tried(partial(self._fs.info, path))["size"])
        except FileNotFoundError:
            return None

    def _tried(self, call: Callable[[], T], pauses: tuple[float, ...] = PAUSES) -> T:
        """What a call returns, in the end.

        Raises:
            FileNotFoundError: there is no such object.
            PoolError, PoolAwayError: the storage refuses it, or cannot be reached.
            OSError: a disk of this host is full.
        """
        for pause in (*pauses, None):
            try:
                return call()
            except FileNotFoundError:
                raise
            except Exception as error:  # each file system has errors of its own
                if isinstance(error, OSError) and error.errno in DISK_FULL:
                    raise
                if isinstance(error, _FINAL):
                    raise PoolError(
                        f"the storage {self.url} refuses this: {error}. Look at the permissions."
                    ) from error
                if pause is None:
                    raise PoolAwayError(
                        f"the storage {self.url} cannot be used: {type(error).__name__}: {error}. Expected one that "
                        "answers. Try again when it does."
                    ) from error
                time.sleep(pause * random.uniform(1, 2))
        raise AssertionError("unreachable")


def _present(folder: Path) -> Iterator[Path]:
    return (folder / file for file in _FILES if (folder / file).exists())
