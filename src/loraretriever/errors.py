"""Errors that a user can cause. Each message gives the value found, what was expected, and the remedy."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class LoraRetrieverError(Exception):
    """Base of all errors raised on purpose; the command line prints it without a traceback."""


class InvalidInputError(LoraRetrieverError):
    """A value given by the caller cannot be used."""


class AdmissionError(LoraRetrieverError):
    """An adapter was refused: its files are unsafe, damaged, unsupported or do not fit the base model."""


class AdapterNotFoundError(LoraRetrieverError):
    """No adapter of that name is in the pool."""


class PoolError(LoraRetrieverError):
    """The pool itself cannot be opened, read or written."""


class PoolAwayError(PoolError):
    """The pool's database or storage cannot be reached now; the same may succeed soon."""


class ModelLoadError(LoraRetrieverError):
    """A base model or an encoder cannot be found or loaded."""


class EngineError(LoraRetrieverError):
    """The engine failed while it ran a request; the same request may succeed when it is sent again."""


class EngineEndedError(EngineError):
    """The engine has ended and runs nothing any more; another one may run the request."""


class OverloadedError(LoraRetrieverError):
    """The engine's queue is full; the same request may be sent again later."""


class MissingExtraError(LoraRetrieverError):
    """A feature needs packages that are not installed."""


@contextmanager
def require_extra(extra: str) -> Iterator[None]:
    """Turn a failed import inside the block into an error that names the extra to install."""
    try:
        yield
    except ImportError as error:
        raise MissingExtraError(
            f"this needs the package {error.name!r}, which is not installed; "
            f"install it with: pip install 'loraretriever[{extra}]'"
        ) from error
