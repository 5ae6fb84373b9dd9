"""How the process keeps its memory. For programs to call: a library does not change its host's allocator."""

from __future__ import annotations

import ctypes
from contextlib import suppress


def keep_freed_memory() -> None:
    """Tell glibc to keep large freed blocks instead of giving them back to the system; elsewhere it does nothing.

    By default each decoding step's cache is mapped anew and its pages cleared, which takes a large and varying share
    of a step of a small model on a CPU.
    """
    with suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
        libc.mallopt(-3, 2**30)  # M_MMAP_THRESHOLD
        libc.mallopt(-8, 2)  # M_ARENA_MAX: what one thread has freed, another can use
