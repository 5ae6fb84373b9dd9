"""Dockerfile, compose.yaml, the examples and docs/server.md say what the code does."""

from __future__ import annotations

import dataclasses
import re
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import yaml

from loraretriever.config import (
    ServerSettings,
    Settings,
    load_server_settings,
    load_settings,
    read_settings_file,
)

ROOT = Path(__file__).parents[2]
STOP_SECONDS = 20  # that closing the models and the pool may take, beside what requests and jobs have


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((ROOT / "compose.yaml").read_text(encoding="utf-8"))
    return loaded


def test_the_example_settings_are_settings() -> None:
    file = read_settings_file(ROOT / "examples" / "loraretriever.toml")
    load_settings(file)
    load_server_settings(file)
    assert file.pool is not None
    assert any(Path(file.pool).glob("*/adapter_config.json"))


def test_the_files_that_compose_names_are_there(compose: dict[str, Any]) -> None:
    for config in compose["configs"].values():
        assert (ROOT / config["file"]).is_file()
    for service in compose["services"].values():
        assert {config["source"] for config in service.get("configs", ())} <= compose["configs"].keys()
        assert set(service.get("secrets", ())) <= compose["secrets"].keys()
        assert {volume.partition(":")[0] for volume in service["volumes"]} <= compose["volumes"].keys()


def test_prometheus_reads_the_key_that_compose_gives_it(compose: dict[str, Any]) -> None:
    scrape = yaml.safe_load((ROOT / "examples" / "prometheus.yml").read_text(encoding="utf-8"))["scrape_configs"][0]
    (secret,) = compose["services"]["prometheus"]["secrets"]
    assert scrape["authorization"]["credentials_file"] == f"/run/secrets/{secret}"
    name, _, port = scrape["static_configs"][0]["targets"][0].partition(":")
    assert name in compose["services"]
    assert int(port) == ServerSettings().port


def test_compose_waits_as_long_as_the_server_needs_to_stop(compose: dict[str, Any]) -> None:
    seconds = load_server_settings(read_settings_file(ROOT / "examples" / "loraretriever.toml")).shutdown_seconds
    grace = int(compose["services"]["server"]["stop_grace_period"].removesuffix("s"))
    assert grace >= 2 * seconds + STOP_SECONDS


def test_the_image_is_made_of_what_is_there() -> None:
    lines = (ROOT / ".dockerignore").read_text(encoding="utf-8").split()
    kept = [line[1:] for line in lines if line.startswith("!")]
    assert lines[0] == "*"
    dockerfile = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    copied = [name for line in re.findall(r"^COPY (?!--from)(.+) \S+$", dockerfile, re.M) for name in line.split()]
    assert copied
    for name in copied:
        assert (ROOT / name).exists()
        assert any(fnmatch(each, f"{name}*") for each in kept), f"{name} is ignored"


def test_the_image_sets_known_variables() -> None:
    names = re.findall(r"LORARETRIEVER_(\w+)=", (ROOT / "Dockerfile").read_text(encoding="utf-8"))
    fields = {field.name.upper() for kind in (Settings, ServerSettings) for field in dataclasses.fields(kind)}
    assert set(names) <= fields | {"POOL", "CACHE"}


@pytest.mark.parametrize("field", dataclasses.fields(ServerSettings), ids=lambda field: field.name)
def test_each_setting_of_the_server_is_explained_with_its_default(field: dataclasses.Field[Any]) -> None:
    text = (ROOT / "docs" / "server.md").read_text(encoding="utf-8")
    default = getattr(ServerSettings(), field.name)
    shown = f"{default}".lower() if isinstance(default, bool) else f"{default or 'none'}".removesuffix(".0")
    row = re.search(rf"^\| `{field.name}` \| `?([^|`]+)`? \|", text, re.M)
    assert row, f"{field.name} is missing in the table"
    assert row[1].strip() == shown
