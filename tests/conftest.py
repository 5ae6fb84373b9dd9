"""Settings for all tests, and PostgreSQL for those that need it."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

# Before any library of Hugging Face is imported: tests read standard error, and need no network.
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
# The models are tiny: a second thread gains nothing, and costs much where others use the machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def postgres() -> Iterator["PostgresServer"]:  # noqa: F821
    """A server that the tests share; one that stops it starts it again."""
    from postgres_server import PostgresServer

    server = PostgresServer()
    yield server
    server.close()


@pytest.fixture(params=["sqlite", pytest.param("postgres", marks=pytest.mark.postgres)])
def new_place(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[], "Place"]:  # noqa: F821
    """Makes places for pools, of each kind in its turn."""
    from places import folder_place, shared_place

    def make() -> "Place":  # noqa: F821
        folder = tmp_path / f"place{len(list(tmp_path.glob('place*')))}"
        folder.mkdir()
        if request.param == "sqlite":
            return folder_place(folder)
        return shared_place(request.getfixturevalue("postgres").new_database(), folder)

    return make


@pytest.fixture
def place(new_place: Callable[[], "Place"]) -> "Place":  # noqa: F821
    """A place for a pool."""
    return new_place()
