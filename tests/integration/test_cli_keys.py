"""The command line's keys: what is printed, and how it ends."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from loraretriever.pool import Pool
from tiny import TINY_BASE, TINY_SPEC

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(cli_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setenv("LORARETRIEVER_POOL", str(tmp_path / "pool"))
    Pool.create(tmp_path / "pool", TINY_BASE, spec=TINY_SPEC).close()
    return cli_run


def test_a_key_is_made_listed_and_revoked(run: Run, tmp_path: Path) -> None:
    code, secret, note = run("keys", "create", "ci", "--scope", "route", "--scope", "generate", "--tenant", "acme",
                             "--requests-per-minute", "60", "--max-tokens", "100")  # fmt: skip
    assert code == 0
    with Pool.open(tmp_path / "pool") as pool:
        key = pool.keys.find(secret.strip())
    assert key is not None
    assert (key.label, key.tenant, key.requests_per_minute, key.max_tokens) == ("ci", "acme", 60, 100)
    may = "generate, route, 60 requests/min, 100 tokens/answer"
    assert note == f"key {key.id}: {may}. Keep its secret: it is not shown again.\n"
    assert run("keys", "list")[1] == f"{key.id}\tactive\tci\tacme\t-\t{may}\n"
    assert run("keys", "revoke", "ci")[:2] == (0, f"revoked: {key.id} ci\n")
    assert run("keys", "list")[1] == f"{key.id}\trevoked\tci\tacme\t-\t{may}\n"


def test_json(run: Run, tmp_path: Path) -> None:
    code, out, note = run("keys", "create", "ops", "--scope", "admin", "--expires", "90d", "--json")
    made = json.loads(out)
    assert (code, note) == (0, "")
    secret = made.pop("secret")
    assert secret.startswith(f"lr-{made['id']}-")
    left = datetime.fromisoformat(made["expires"]) - datetime.now(UTC)
    assert timedelta(days=89) < left < timedelta(days=90)
    assert (made["label"], made["scopes"], made["tenant"], made["state"]) == ("ops", ["admin"], None, "active")
    assert json.loads(run("keys", "list", "--json")[1]) == made
    assert json.loads(run("keys", "revoke", made["id"], "--json")[1])["state"] == "revoked"
    default = json.loads(run("keys", "create", "plain", "--json")[1])
    assert default["scopes"] == ["generate", "pool:read", "route"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["create", "x", "--expires", "tomorrow"], "--expires is 'tomorrow'; expected up to 9999 with m, h, d or w"),
        (["create", "x", "--expires", "0d"], "--expires is '0d'"),
        (["create", "x", "--expires", "999999w"], "--expires is '999999w'"),
        (["create", "x", "--scope", "root"], "scopes: 'root'; expected one or more of generate"),
        (["create", "x", "--requests-per-minute", "0"], "requests_per_minute is 0"),
        (["revoke", "nobody"], "there is no key 'nobody'"),
    ],
)
def test_usage_errors(run: Run, arguments: list[str], message: str) -> None:
    code, out, error = run("keys", *arguments)
    assert (code, out) == (2, "")
    assert message in error
    assert run("keys", "list")[1] == ""
