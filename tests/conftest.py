"""Settings for all tests, and PostgreSQL for those that need it."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from places import KINDS, Place, make_place
from postgres_server import PostgresServer

# Before any library of Hugging Face is imported: tests read standard error, and need no network.
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
# The models are tiny: a second thread gains nothing, and costs much where others use the machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def postgres() -> Iterator[PostgresServer]:
    """A server that the tests share; one that stops it starts it again."""
    server = PostgresServer()
    yield server
    server.close()


@pytest.fixture(params=KINDS)
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    """A place for a pool, of each kind in its turn."""
    return make_place(request, tmp_path, request.param)
