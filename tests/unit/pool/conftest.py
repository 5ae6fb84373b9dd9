from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from loraretriever.pool import Pool
from places import Place


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of the test's own."""
    monkeypatch.setenv("LORARETRIEVER_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def pool(place: Place) -> Iterator[Pool]:
    with place.create() as pool:
        yield pool
