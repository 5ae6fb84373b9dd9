from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from loraretriever.pool import Pool
from tiny import TINY_BASE, TINY_SPEC


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of the test's own."""
    monkeypatch.setenv("LORARETRIEVER_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def pool(tmp_path: Path) -> Iterator[Pool]:
    with Pool.create(tmp_path / "pool", TINY_BASE, spec=TINY_SPEC) as pool:
        yield pool
