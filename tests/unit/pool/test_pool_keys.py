"""API keys: made once, kept as hashes, refused when they are revoked or their time is over."""

from __future__ import annotations

import re
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text

from loraretriever.errors import InvalidInputError
from loraretriever.pool import SCOPES, Pool, keys


class Clock:
    """Stands in for `time.monotonic`."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(keys.time, "monotonic", clock)
    return clock


@pytest.fixture
def other(pool: Pool) -> Iterator[Pool]:
    """The same pool in what could be another process."""
    with Pool.open(pool.location) as other:
        yield other


def test_a_key_is_found_by_its_secret(pool: Pool, other: Pool) -> None:
    assert not pool.keys.exist()
    soon = datetime.now(UTC) + timedelta(days=1)
    secret, key = pool.keys.create(
        "ci", ["route", "generate"], "acme", expires=soon, requests_per_minute=60, tokens_per_minute=1000, max_tokens=5
    )
    assert re.fullmatch(rf"lr-{key.id}-[A-Za-z0-9_-]{{43}}", secret)
    assert (key.label, key.scopes, key.tenant, key.state) == ("ci", {"generate", "route"}, "acme", "active")
    assert (key.requests_per_minute, key.tokens_per_minute, key.max_tokens) == (60, 1000, 5)
    assert (key.expires, key.revoked) == (soon, None)
    second, unlimited = pool.keys.create("all", SCOPES)
    assert (unlimited.tenant, unlimited.expires, unlimited.max_tokens) == (None, None, None)
    for each in (pool, other):
        assert each.keys.exist()
        assert each.keys.find(secret) == each.keys.find(secret) == key
        assert each.keys.find(second) == unlimited
        assert each.keys.list() == [key, unlimited]


def test_the_secret_is_not_kept(pool: Pool) -> None:
    secret, key = pool.keys.create("ci", ["route"])
    with pool._database.read() as session:
        row = session.execute(text("SELECT * FROM keys")).one()
    assert secret[16:] not in str(row)
    assert key.id in str(row)
    for file in pool.state_folder.glob("pool.db*"):
        assert secret[16:].encode() not in file.read_bytes()


def test_other_secrets_are_refused(pool: Pool) -> None:
    secret, key = pool.keys.create("ci", ["route"])
    last = "A" if secret[-1] != "A" else "B"
    for wrong in (
        "", "lr-", key.id, secret[:-1], secret[:-1] + last, secret + " ", secret.upper(),
        f"lr-{'0' * 12}-{secret[16:]}", "x" * 100_000, "lr-\ud800", f"Bearer {secret}",
    ):  # fmt: skip
        assert pool.keys.find(wrong) is None, wrong[:80]
    assert pool.keys.find(secret) == key


@pytest.mark.parametrize("by", ["id", "label"])
def test_a_revoked_key_is_refused_within_a_second(pool: Pool, other: Pool, clock: Clock, by: str) -> None:
    secret, key = pool.keys.create("ci", ["route"])
    assert pool.keys.find(secret) == other.keys.find(secret) == key
    revoked = pool.keys.revoke(getattr(key, by))
    assert (revoked.id, revoked.state) == (key.id, "revoked")
    assert pool.keys.find(secret) is None, "at once where it is revoked"
    assert other.keys.find(secret) == key, "another process has read it a moment ago"
    clock.now += keys.CACHE_SECONDS
    assert other.keys.find(secret) is None
    assert pool.keys.exist() and other.keys.exist(), "the server does not open again"
    assert pool.keys.revoke(getattr(key, by)) == revoked, "twice is once"
    assert pool.keys.list() == [revoked]


def test_the_database_is_not_read_at_each_request(pool: Pool, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    secret, key = pool.keys.create("ci", ["route"])
    assert pool.keys.find(secret) == key
    assert pool.keys.exist()
    monkeypatch.setattr(pool.keys._database, "read", lambda: pytest.fail("it was read"))
    for _ in range(3):
        assert pool.keys.find(secret) == key
        assert pool.keys.exist()
        clock.now += keys.CACHE_SECONDS / 4
    assert pool.keys.find(secret[:-1] + ("A" if secret[-1] != "A" else "B")) is None


def test_a_server_closes_within_a_second_of_the_first_key(pool: Pool, other: Pool, clock: Clock) -> None:
    assert not other.keys.exist()
    pool.keys.create("ci", ["route"])
    assert pool.keys.exist()
    clock.now += keys.CACHE_SECONDS
    assert other.keys.exist()


def test_what_is_known_without_the_database(pool: Pool, clock: Clock) -> None:
    store = pool.keys
    assert not store.are_known(None)
    assert not store.exist()
    assert store.are_known(None) and store.are_known("lr-anything")
    clock.now += 1
    assert not store.are_known(None)
    secret, key = store.create("ci", ["route"])
    assert store.are_known(None) and store.are_known("no key at all")
    assert not store.are_known(secret)
    assert store.find(secret) == key
    assert store.are_known(secret)
    clock.now += 1
    assert not store.are_known(secret)
    store.find(secret)
    store.revoke("ci")
    assert not store.are_known(secret)


def test_what_is_guessed_is_not_remembered(pool: Pool) -> None:
    pool.keys.create("ci", ["route"])
    for number in range(50):
        assert pool.keys.find(f"lr-{number:012x}-{'a' * 43}") is None
    assert pool.keys._known == {}


def test_an_expired_key_is_refused_at_once(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    secret, key = pool.keys.create("ci", ["route"], expires=datetime.now(UTC) + timedelta(hours=1))
    assert pool.keys.find(secret) == key

    class Later(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> datetime:
            return datetime.now(tz) + timedelta(hours=2)

    monkeypatch.setattr(keys, "datetime", Later)
    assert pool.keys.find(secret) is None, "also while it is remembered"
    assert [each.state for each in pool.keys.list()] == ["expired"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"label": ""}, "the label is ''; expected 1 to 128"),
        ({"label": "a\nb"}, "the label is"),
        ({"label": "x" * 129}, "the label is"),
        ({"label": "taken"}, "is called 'taken' already"),
        ({"scopes": []}, "scopes: empty; expected one or more of generate"),
        ({"scopes": ["route", "root"]}, "scopes: 'root'; expected"),
        ({"tenant": ""}, "tenant is ''; expected"),
        ({"tenant": " a"}, "tenant is ' a'; expected"),
        ({"requests_per_minute": 0}, "requests_per_minute is 0; expected a whole number of at least 1"),
        ({"tokens_per_minute": -1}, "tokens_per_minute is -1"),
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"expires": datetime(2020, 1, 1, tzinfo=UTC)}, "expires is 2020.*expected a time to come"),
        ({"expires": datetime(2999, 1, 1)}, "expires is 2999.*with its time zone"),
    ],
)
def test_bad_keys(pool: Pool, arguments: dict[str, Any], message: str) -> None:
    pool.keys.create("taken", ["route"])
    with pytest.raises(InvalidInputError, match=message):
        pool.keys.create(**{"label": "new", "scopes": ["route"], **arguments})
    assert len(pool.keys.list()) == 1


def test_labels_may_be_used_again(pool: Pool) -> None:
    first_secret, first = pool.keys.create("ci", ["route"])
    pool.keys.revoke("ci")
    secret, second = pool.keys.create("ci", ["route"])
    assert pool.keys.revoke("ci").id == second.id, "the one that is not revoked"
    assert pool.keys.find(secret) is pool.keys.find(first_secret) is None
    with pytest.raises(InvalidInputError, match="is called"):
        pool.keys.create(first.id, ["route"])
    with pytest.raises(InvalidInputError, match="there is no key 'nobody'.*keys list"):
        pool.keys.revoke("nobody")


def test_a_plain_folder_has_keys(tmp_path: Path) -> None:
    from tiny import write_peft_folder

    write_peft_folder(tmp_path / "plain/a")
    with Pool.open(tmp_path / "plain") as pool:
        change = pool.change
        secret, key = pool.keys.create("ci", ["route"])
        assert pool.change == change
    with Pool.open(tmp_path / "plain") as pool:
        assert pool.keys.find(secret) == key
