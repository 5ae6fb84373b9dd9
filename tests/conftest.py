"""Settings for all tests; PostgreSQL and S3 for those that need them."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from places import KINDS, Place, make_place
from postgres_server import PostgresServer
from s3_server import ENVIRONMENT, S3Server

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


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3Server]:
    """An S3 server that the tests share."""
    server = S3Server()
    yield server
    server.close()


@pytest.fixture
def s3(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Server]:
    """The server for one test, which may let it fail; the environment names it."""
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server.url)
    s3_server.reset()
    yield s3_server
    s3_server.reset()


@pytest.fixture(params=KINDS)
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    """A place for a pool, of each kind in its turn."""
    return make_place(request, tmp_path, request.param)
