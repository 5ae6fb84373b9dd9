"""Who asks, and what they may do."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from starlette.requests import HTTPConnection, Request

from loraretriever.server.errors import ApiError
from loraretriever.server.state import ServerState, server_state

if TYPE_CHECKING:
    from loraretriever.pool import Key

_FORWARDED = frozenset({"forwarded", "x-forwarded-for", "x-forwarded-host", "x-real-ip"})
LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "[::1]", "::1", "testserver"})


@dataclass(frozen=True, slots=True)
class Caller:
    """Who sends a request. Without keys in the pool everybody on this machine may do everything."""

    scopes: frozenset[str]
    tenant: str | None = None
    key: Key | None = None

    @property
    def label(self) -> str:
        """The key's name, for logs."""
        return self.key.label if self.key else "open"

    @property
    def is_operator(self) -> bool:
        """Whether this caller sees all tenants' adapters, and the figures of the whole server."""
        return self.tenant is None and "admin" in self.scopes

    @property
    def view(self) -> str | None:
        """What pool and pipeline are asked for as `tenant`: None everything, "" what is shared, or a tenant."""
        return None if self.is_operator else self.tenant or ""

    def may(self, *scopes: str) -> bool:
        """Whether any of the scopes is held."""
        return "admin" in self.scopes or not self.scopes.isdisjoint(scopes)


EVERYBODY = Caller(frozenset({"admin"}))


def require(*scopes: str) -> Callable[[Request], Awaitable[Caller]]:
    """A FastAPI dependency: the caller, when the key has any of the scopes.

    Raises:
        ApiError: 401 without a valid key, 403 with one that may not do this.
    """

    async def dependency(request: Request) -> Caller:
        caller = await find_caller(request)
        if not caller.may(*scopes):
            raise ApiError(403, f"this key may not do this; it needs the scope {' or '.join(scopes)}.")
        request.scope["loraretriever.caller"] = caller
        return caller

    return dependency


async def require_operator(request: Request) -> Caller:
    """A FastAPI dependency: a caller who may see what concerns all tenants.

    Raises:
        ApiError: as `require`.
    """
    caller = await require("admin")(request)
    if not caller.is_operator:
        raise ApiError(403, "this concerns all tenants; it needs a key of the scope admin without a tenant.")
    return caller


async def find_caller(connection: HTTPConnection) -> Caller:
    """Who sends this request."""
    state = server_state(connection)
    secret = _secret(connection)
    keys = state.retriever.pool.keys

    def look() -> tuple[bool, Key | None]:
        exist = keys.exist()
        return exist, keys.find(secret) if exist and secret is not None else None

    exist, key = look() if keys.are_known(secret) else await state.run(look)
    if exist or not state.may_be_open:
        if secret is None:
            raise ApiError(401, "this server needs an API key; send it as: Authorization: Bearer KEY")
        if key is None:
            raise ApiError(401, "the API key is unknown, expired or revoked.")
        return Caller(key.scopes, key.tenant, key)
    check_local(connection)  # OpenAI's clients always send some key: here it plays no part
    return EVERYBODY


def check_local(connection: HTTPConnection) -> None:
    """Without keys, only programs on this machine may ask, and no pages of other sites in its browser."""
    if not _FORWARDED.isdisjoint(connection.headers):
        raise ApiError(403, "this server has no API keys, and refuses what a proxy passes on; make keys first.")
    host = connection.headers.get("host", "")
    name = host.rsplit(":", 1)[0] if not host.endswith("]") else host
    if name not in LOOPBACK_NAMES:
        raise ApiError(403, f"this server has no API keys and answers to localhost only, not to {host!r:.100}.")
    origin = connection.headers.get("origin")
    if origin is not None and origin not in (f"http://{host}", f"https://{host}"):
        raise ApiError(403, f"this server has no API keys, and refuses requests from pages of {origin!r:.100}.")


def admit(state: ServerState, caller: Caller) -> None:
    """Count a request against its key's limits.

    Raises:
        ApiError: 429, with the seconds to wait.
    """
    if caller.key is None:
        return
    wait = state.limiter.admit(caller.key)
    if wait is not None:
        raise ApiError(429, f"the limit of this key is reached; try again in {wait:.0f} s.", retry_after=wait)


def _secret(connection: HTTPConnection) -> str | None:
    header = connection.headers.get("authorization")
    if header is None:
        return None
    scheme, _, secret = header.partition(" ")
    if scheme.lower() != "bearer" or not secret.strip():
        raise ApiError(401, "the header Authorization cannot be read; expected: Authorization: Bearer KEY")
    return secret.strip()
