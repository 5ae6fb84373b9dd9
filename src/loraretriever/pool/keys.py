"""API keys: who may send requests to a server over a pool, what they may do, and how much of it."""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from datetime import UTC, datetime

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from loraretriever.errors import InvalidInputError, PoolAwayError
from loraretriever.pool.database import Database
from loraretriever.pool.names import check_tenant
from loraretriever.pool.schema import KeyRow

SCOPES = ("generate", "route", "pool:read", "pool:write", "admin")  # the last one implies all others
CACHE_SECONDS = 1.0  # for which a process goes on with what it knows of a key
_SECRET = re.compile(r"lr-([0-9a-f]{12})-[A-Za-z0-9_-]{43}")
_MAX_LABEL = 128


@dataclass(frozen=True, slots=True)
class Key:
    """An API key without its secret. None as a limit means: no limit."""

    id: str
    label: str
    scopes: frozenset[str]
    tenant: str | None
    created: datetime
    expires: datetime | None
    revoked: datetime | None
    requests_per_minute: int | None
    tokens_per_minute: int | None  # of prompts and answers
    max_tokens: int | None  # of one answer

    @property
    def state(self) -> str:
        """Whether the key is "active", "expired" or "revoked" now."""
        if self.revoked is not None:
            return "revoked"
        return "expired" if self.expires is not None and self.expires <= datetime.now(UTC) else "active"


@dataclass(frozen=True, slots=True)
class _Known:
    key: Key
    secret: str  # SHA-256 of the secret, in hexadecimal
    since: float


class KeyStore:
    """The keys of a pool. Threads may share it.

    It is asked at each request of a server, and reads each key's row once a second: a key that another process
    revoked is refused within a second, as is a request without a key after the first one was made. While the database
    of a shared pool is away, what is known of keys stays in force.
    """

    def __init__(self, database: Database) -> None:
        """Use `Pool.keys`."""
        self._database = database
        self._known: dict[str, _Known] = {}  # by id
        self._exist = False
        self._looked = float("-inf")  # when `exist` last looked

    def create(
        self,
        label: str,
        scopes: Iterable[str],
        tenant: str | None = None,
        *,
        expires: datetime | None = None,
        requests_per_minute: int | None = None,
        tokens_per_minute: int | None = None,
        max_tokens: int | None = None,
    ) -> tuple[str, Key]:
        """Make a key; returns its secret, which cannot be had again, and the key.

        Args:
            label: what people call it; no two keys that are not revoked have the same.
            scopes: what it may do: some of `SCOPES`.
            tenant: whose adapters it may see beside those that belong to nobody; None: no tenant's, or with the scope
                "admin" everybody's.
            expires: from when on it is refused.
            requests_per_minute, tokens_per_minute: its limits.
            max_tokens: how long an answer may be.

        Raises:
            InvalidInputError: an argument cannot be used, or a key has that label.
        """
        found = _check_scopes(scopes)
        if tenant is not None:
            check_tenant(tenant)
        limits = {
            "requests_per_minute": requests_per_minute,
            "tokens_per_minute": tokens_per_minute,
            "max_tokens": max_tokens,
        }
        for name, limit in limits.items():
            if limit is not None and not 1 <= limit < 1 << 31:
                raise InvalidInputError(f"{name} is {limit}; expected a whole number of at least 1, or none.")
        now = datetime.now(UTC)
        if expires is not None and (expires.tzinfo is None or expires <= now):
            raise InvalidInputError(f"expires is {expires}; expected a time to come, with its time zone.")
        identity = secrets.token_hex(6)
        secret = f"lr-{identity}-{secrets.token_urlsafe(32)}"
        with self._database.write() as session:
            _check_label(session, label)
            row = KeyRow(
                id=identity,
                label=label,
                secret=_hashed(secret),
                scopes=sorted(found, key=SCOPES.index),
                tenant=tenant,
                created=_stored(now),
                expires=expires and _stored(expires),
                **limits,
            )
            session.add(row)
            session.flush()
            key = _to_key(row)
        self._exist = True
        return secret, key

    def find(self, secret: str) -> Key | None:
        """The key with this secret; None when there is none, or it is revoked or expired."""
        match = _SECRET.fullmatch(secret)
        known = match and self._find(match[1])
        if not known or not hmac.compare_digest(known.secret, _hashed(secret)):
            return None
        return known.key if known.key.state == "active" else None

    def list(self) -> list[Key]:
        """All keys, in the order they were made; expired and revoked ones too."""
        with self._database.read() as session:
            return [_to_key(row) for row in session.scalars(select(KeyRow).order_by(KeyRow.created, KeyRow.id))]

    def revoke(self, id_or_label: str) -> Key:
        """Refuse a key from now on. A label means the key that is not revoked, if one of them is not.

        Raises:
            InvalidInputError: there is no such key.
        """
        with self._database.write() as session:
            row = session.get(KeyRow, id_or_label)
            if row is None:
                labelled = select(KeyRow).where(KeyRow.label == id_or_label)
                row = session.scalars(labelled.order_by(KeyRow.revoked.is_not(None), KeyRow.created.desc())).first()
            if row is None:
                raise InvalidInputError(
                    f"there is no key {id_or_label!r:.200}; expected an id or a label. See all with: "
                    "loraretriever keys list"
                )
            if row.revoked is None:
                row.revoked = _stored(datetime.now(UTC))
            key = _to_key(row)
        self._known.pop(key.id, None)
        return key

    def are_known(self, secret: str | None) -> bool:
        """Whether `exist`, and where keys exist `find` with this secret, answer at once, without the database."""
        now = time.monotonic()
        if not self._exist:
            return now - self._looked < CACHE_SECONDS
        match = None if secret is None else _SECRET.fullmatch(secret)
        known = self._known.get(match[1]) if match is not None else None
        return match is None or (known is not None and now - known.since < CACHE_SECONDS)

    def exist(self) -> bool:
        """Whether a key was ever made: a server over a pool whose keys are all revoked is not open."""
        if not self._exist and time.monotonic() - self._looked >= CACHE_SECONDS:
            looked = time.monotonic()
            try:
                with self._database.read() as session:
                    self._exist = session.scalars(select(func.count()).select_from(KeyRow)).one() > 0
            except PoolAwayError:
                if self._looked == float("-inf"):
                    raise
            self._looked = looked
        return self._exist

    def _find(self, identity: str) -> _Known | None:
        known = self._known.get(identity)
        now = time.monotonic()
        if known is not None and now - known.since < CACHE_SECONDS:
            return known
        try:
            with self._database.read() as session:
                row = session.get(KeyRow, identity)
                known = _Known(_to_key(row), row.secret, now) if row is not None else None
        except PoolAwayError:
            if known is None:
                raise
            known = replace(known, since=now)
        if known is not None:  # what is guessed is not remembered
            self._known[identity] = known
        return known


def _check_scopes(scopes: Iterable[str]) -> frozenset[str]:
    found = frozenset([scopes] if isinstance(scopes, str) else scopes)
    if not found or not found <= set(SCOPES):
        wrong = ", ".join(map(repr, sorted(found - set(SCOPES)))) or "empty"
        raise InvalidInputError(f"scopes: {wrong:.200}; expected one or more of {', '.join(SCOPES)}.")
    return found


def _check_label(session: Session, label: str) -> None:
    if not label or len(label) > _MAX_LABEL or not label.isprintable() or label != label.strip():
        raise InvalidInputError(
            f"the label is {label!r:.200}; expected 1 to {_MAX_LABEL} printable characters, no space at an end."
        )
    same = select(KeyRow.id).where((KeyRow.label == label) & KeyRow.revoked.is_(None) | (KeyRow.id == label))
    found = session.scalars(same).first()
    if found is not None:
        raise InvalidInputError(f"the key {found} is called {label!r} already. Revoke it, or choose another label.")


def _hashed(secret: str) -> str:
    # No salt and no slow hash: a secret is 256 random bits, which nobody can guess.
    return hashlib.sha256(secret.encode()).hexdigest()


def _stored(time_: datetime) -> datetime:
    return time_.astimezone(UTC).replace(tzinfo=None)


def _to_key(row: KeyRow) -> Key:
    return Key(
        id=row.id,
        label=row.label,
        scopes=frozenset(row.scopes),
        tenant=row.tenant,
        created=row.created.replace(tzinfo=UTC),
        expires=row.expires and row.expires.replace(tzinfo=UTC),
        revoked=row.revoked and row.revoked.replace(tzinfo=UTC),
        requests_per_minute=row.requests_per_minute,
        tokens_per_minute=row.tokens_per_minute,
        max_tokens=row.max_tokens,
    )
