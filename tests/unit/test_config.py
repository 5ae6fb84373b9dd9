from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from loraretriever.config import (
    ServerSettings,
    Settings,
    SettingsFile,
    cache_folder,
    load_server_settings,
    load_settings,
    read_settings_file,
)
from loraretriever.errors import InvalidInputError


def test_overrides_come_before_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORARETRIEVER_K", "5")
    monkeypatch.setenv("LORARETRIEVER_STRATEGY", "fusion")
    settings = load_settings(k=None, strategy="selection")
    assert (settings.k, settings.strategy) == (5, "selection")
    assert load_settings(k=2).k == 2


def test_defaults() -> None:
    assert load_settings() == Settings()
    settings = load_settings()
    assert settings.retriever == "hybrid"
    assert settings.threshold is settings.encoder is settings.instruction is None
    assert settings.coverage == 0.95


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("k", 0),
        ("weighting_temperature", -1),
        ("threshold", float("nan")),
        ("slots", "many"),
        ("colour", "red"),
        ("coverage", 0),
        ("coverage", 1.01),
        ("false_fallback", 1),
        ("drift", -0.1),
        ("precision", "int4"),
        ("max_tokens", 7),
    ],
)
def test_wrong_settings_are_named(name: str, value: object) -> None:
    with pytest.raises(InvalidInputError, match=f"setting {name}"):
        load_settings(**{name: value})


def test_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("LORARETRIEVER_CACHE", raising=False)
    assert cache_folder() == tmp_path / "loraretriever"
    monkeypatch.setenv("LORARETRIEVER_CACHE", str(tmp_path / "other"))
    assert cache_folder() == tmp_path / "other"


def test_an_unknown_variable_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORARETRIEVER_THRESHHOLD", "0.7")
    with pytest.raises(InvalidInputError, match="LORARETRIEVER_THRESHHOLD='0.7'"):
        load_settings()


def write(file: Path, text: str) -> SettingsFile:
    file.write_text(text, encoding="utf-8")
    return read_settings_file(file)


def test_arguments_come_before_the_environment_and_the_environment_before_the_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = write(tmp_path / "a.toml", "k = 1\nslots = 2\nbatch_size = 3\n[server]\nport = 1\nworkers = 2\n")
    monkeypatch.setenv("LORARETRIEVER_K", "4")
    monkeypatch.setenv("LORARETRIEVER_SLOTS", "5")
    monkeypatch.setenv("LORARETRIEVER_WORKERS", "6")
    settings = load_settings(file, k=7, slots=None)
    assert (settings.k, settings.slots, settings.batch_size, settings.queue) == (7, 5, 3, Settings().queue)
    server = load_server_settings(file, host="::1")
    assert (server.host, server.port, server.workers) == ("::1", 1, 6)


def test_server_defaults() -> None:
    assert load_server_settings() == ServerSettings()
    assert ServerSettings().host == "127.0.0.1", "nothing is open to other machines unless asked for"
    assert not ServerSettings().log_prompts


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("port", 65536),
        ("port", "http"),
        ("host", ""),
        ("workers", 0),
        ("request_timeout", 0),
        ("request_timeout", float("inf")),
        ("shutdown_seconds", -1),
        ("max_body_mib", 0),
        ("log_level", "loud"),
        ("log_format", "xml"),
        ("otlp_endpoint", "collector:4318"),
        ("cors_origins", "https://a.example/path"),
        ("cors_origins", ["a.example"]),
        ("root_path", "models"),
        ("root_path", "/models/"),
        ("colour", "red"),
    ],
)
def test_wrong_server_settings_are_named(name: str, value: object) -> None:
    with pytest.raises(InvalidInputError, match=f"setting {name}"):
        load_server_settings(**{name: value})


def test_lists_and_switches_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORARETRIEVER_CORS_ORIGINS", "https://a.example, http://localhost:3000")
    monkeypatch.setenv("LORARETRIEVER_ALLOW_HUB", "false")
    server = load_server_settings()
    assert server.cors_origins == ("https://a.example", "http://localhost:3000")
    assert server.allow_hub is False


def test_routers_are_folders_of_the_one_who_runs_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert load_settings().routers == ()
    file = write(tmp_path / "a.toml", 'routers = ["moe", "/else/ramole"]\n')
    assert load_settings(file).routers == (tmp_path / "moe", Path("/else/ramole"))
    assert load_settings(write(tmp_path / "b.toml", 'routers = "moe"\n')).routers == (tmp_path / "moe",)
    with pytest.raises(InvalidInputError, match=r"setting routers in .*c\.toml is 5"):
        load_settings(write(tmp_path / "c.toml", "routers = 5\n"))
    monkeypatch.setenv("LORARETRIEVER_ROUTERS", "a, b/c")
    assert load_settings(file).routers == (Path("a"), Path("b/c"))


def test_the_two_kinds_of_settings_share_no_name() -> None:
    names = [field.name for kind in (Settings, ServerSettings) for field in dataclasses.fields(kind)]
    assert len(names) == len(set(names)), "one variable of the environment would mean both"


def test_paths_of_a_file_are_relative_to_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir("/")
    (tmp_path / "base").mkdir()
    text = 'pool = "pool"\nbase_model = "base"\nencoder = "owner/name"\n[server]\nadapter_root = "../adapters"\n'
    file = write(tmp_path / "a.toml", text)
    assert file.pool == str(tmp_path / "pool")
    assert load_settings(file).base_model == str(tmp_path / "base")
    assert load_settings(file).encoder == "owner/name", "no folder there: a model of the hub"
    assert load_server_settings(file).adapter_root == tmp_path / "../adapters"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("treshold = 0.5", "treshold is no setting"),
        ("[server]\nprot = 80", "server.prot is no setting"),
        ("port = 80", r"port is no setting; .*\[server\]"),
        ("[serve]\nport = 80", "serve is no setting"),
        ("server = 5", "server is 5; expected a table"),
        ("pool = 5", "pool is 5"),
        ("k = ", "not TOML"),
        ("k = 1\nk = 2", "not TOML"),
    ],
)
def test_what_is_wrong_in_a_file_is_named_with_the_file(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(InvalidInputError, match=rf"a\.toml.*{message}"):
        write(tmp_path / "a.toml", text)


def test_a_wrong_value_is_named_with_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write(tmp_path / "a.toml", "k = 0\n[server]\nport = -1\n")
    with pytest.raises(InvalidInputError, match=r"setting k in .*a\.toml is 0"):
        load_settings(file)
    with pytest.raises(InvalidInputError, match=r"setting port of \[server\] in .*a\.toml is -1"):
        load_server_settings(file)
    monkeypatch.setenv("LORARETRIEVER_PORT", "many")
    with pytest.raises(InvalidInputError, match=r"setting port in the environment \(LORARETRIEVER_PORT\) is 'many'"):
        load_server_settings(file)
    with pytest.raises(InvalidInputError, match="setting port is -2"):
        load_server_settings(file, port=-2)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match=r"missing\.toml: No such file"):
        read_settings_file(tmp_path / "missing.toml")
    (tmp_path / "latin.toml").write_bytes(b'pool = "caf\xe9"')
    with pytest.raises(InvalidInputError, match=r"latin\.toml is not TOML in UTF-8"):
        read_settings_file(tmp_path / "latin.toml")
