"""The figures of all worker processes of a server, by files in a folder that they share."""

from __future__ import annotations

import json
import logging
import os
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from loraretriever.server.series import Family, Figures, merge

_log = logging.getLogger(__name__)
WRITE_SECONDS = 1.0
SILENT_SECONDS = 15.0  # a process that has not written for so long is taken for dead


class SharedFigures:
    """Writes this process's figures, and reads those of the others.

    Each process has a file, which it replaces as a whole. What a dead process counted stays, so that counters never
    fall; its gauges count no more.
    """

    def __init__(self, folder: Path, figures: Callable[[], Figures]) -> None:
        """`figures` gives this process's; once started, a thread of its own calls it."""
        self._folder = folder
        self._file = folder / f"{os.getpid()}-{secrets.token_hex(4)}.json"
        self._figures = figures
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Write at once, and then every second."""
        self._folder.mkdir(parents=True, exist_ok=True)
        self._try_to_write(runs=True)
        self._thread = threading.Thread(target=self._keep_writing, name="metrics", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Write for the last time."""
        if self._thread is None:
            return
        self._stop.set()
        self._thread.join()
        self._thread = None
        self._try_to_write(runs=False)

    def write(self, runs: bool = True) -> None:
        """Write now. With `runs` false the gauges count no more."""
        written = {"written": time.time() if runs else 0.0, "figures": _to_json(self._figures())}
        partial = self._file.with_suffix(".partial")
        partial.write_text(json.dumps(written, separators=(",", ":")), encoding="utf-8")
        partial.replace(self._file)

    def merge(self, own: Figures, families: Sequence[Family]) -> Figures:
        """This process's figures as given, together with what the others wrote last."""
        others = [self._read(file) for file in sorted(self._folder.glob("*.json")) if file != self._file]
        return merge([(own, True), *(each for each in others if each is not None)], families)

    def _keep_writing(self) -> None:
        while not self._stop.wait(WRITE_SECONDS):
            self._try_to_write(runs=True)

    def _try_to_write(self, runs: bool) -> None:
        try:
            self.write(runs)
        except Exception:  # a full disk, say: the server goes on
            _log.warning("this process's metrics cannot be written to %s", self._file, exc_info=True)

    def _read(self, file: Path) -> tuple[Figures, bool] | None:
        try:
            read = json.loads(file.read_text(encoding="utf-8"))
            return _from_json(read["figures"]), time.time() - read["written"] < SILENT_SECONDS
        except (OSError, ValueError, KeyError, TypeError) as error:
            _log.warning("metrics of another process cannot be read from %s: %s", file, error)
            return None


def _to_json(figures: Figures) -> dict[str, Any]:
    return {
        "values": {name: list(series.items()) for name, series in figures.values.items()},
        "recent": {
            name: [(labels, list(slices.items())) for labels, slices in series.items()]
            for name, series in figures.recent.items()
        },
    }


def _from_json(written: dict[str, Any]) -> Figures:
    return Figures(
        {name: {tuple(labels): numbers for labels, numbers in series} for name, series in written["values"].items()},
        {
            name: {tuple(labels): dict(slices) for labels, slices in series}
            for name, series in written["recent"].items()
        },
    )
