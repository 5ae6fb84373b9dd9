"""What the tests of the command line share: tiny models, and a call that returns what a process would."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from loraretriever import cli
from tiny_text import write_base_model, write_encoder

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `base`, a base model, and `encoder`, a sentence encoder."""
    folder = tmp_path_factory.mktemp("models")
    write_base_model(folder / "base")
    write_encoder(folder)
    return folder


@pytest.fixture
def cli_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs the command line with these arguments: exit code, standard output, standard error."""
    monkeypatch.setenv("LORARETRIEVER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(cli, "_quiet_libraries", lambda: None)

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["loraretriever", *map(str, arguments)])
        capsys.readouterr()
        code = 0
        try:
            cli.main()
        except SystemExit as exit_:
            code = int(exit_.code or 0)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call
