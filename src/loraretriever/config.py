"""Settings. The environment is read here and nowhere else."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """Folder for what can be made again: converted models, databases of read-only pools.

    `LORARETRIEVER_CACHE`, else `loraretriever` below `XDG_CACHE_HOME` or `~/.cache`.
    """
    chosen = os.environ.get("LORARETRIEVER_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "loraretriever"
