"""`loraretriever keys`: who may send requests to a server over a pool."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Annotated

import typer

from loraretriever import console
from loraretriever.cli.options import JsonOption, PoolOption
from loraretriever.errors import InvalidInputError

if TYPE_CHECKING:
    from loraretriever.pool import Key

keys_app = typer.Typer(help="Manage the API keys of a pool, for `serve`.", no_args_is_help=True)
DEFAULT_SCOPES = ("generate", "route", "pool:read")
_UNITS = {"m": timedelta(minutes=1), "h": timedelta(hours=1), "d": timedelta(days=1), "w": timedelta(weeks=1)}


@keys_app.command("create")
def keys_create(
    label: Annotated[str, typer.Argument(help="What you call it.")],
    pool: PoolOption,
    scope: Annotated[
        list[str] | None,
        typer.Option(
            help="What it may do: generate, route, pool:read, pool:write or admin (repeatable).",
            show_default=", ".join(DEFAULT_SCOPES),
        ),
    ] = None,
    tenant: Annotated[
        str | None,
        typer.Option(help="Whose adapters it sees beside those of nobody.", show_default="nobody's; with admin, all"),
    ] = None,
    expires: Annotated[
        str | None, typer.Option(help="When it ends: 30m, 12h, 90d or 4w from now.", show_default="never")
    ] = None,
    requests_per_minute: Annotated[int | None, typer.Option(help="Requests.", show_default="no limit")] = None,
    tokens_per_minute: Annotated[
        int | None, typer.Option(help="Tokens of prompts and answers.", show_default="no limit")
    ] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Tokens of one answer.", show_default="no limit")] = None,
    as_json: JsonOption = False,
) -> None:
    """Make a key and print its secret, which is not shown again. The first key closes the server to all without one."""
    from loraretriever.pool import Pool

    with Pool.open(pool) as opened:
        secret, key = opened.keys.create(
            label, scope or DEFAULT_SCOPES, tenant, expires=_time_in(expires), requests_per_minute=requests_per_minute,
            tokens_per_minute=tokens_per_minute, max_tokens=max_tokens,
        )  # fmt: skip
    if as_json:
        console.print_json({"secret": secret, **console.key_json(key)})
    else:
        console.print_note(f"key {key.id}: {_described(key)}. Keep its secret: it is not shown again.")
        console.print_plain(secret)


@keys_app.command("list")
def keys_list(pool: PoolOption, as_json: JsonOption = False) -> None:
    """List the keys, oldest first."""
    from loraretriever.pool import Pool

    with Pool.open(pool) as opened:
        keys = opened.keys.list()
    if as_json:
        for key in keys:
            console.print_json(console.key_json(key))
        return
    console.print_rows(
        ("id", "state", "label", "tenant", "expires", "may"),
        [
            (key.id, key.state, key.label, key.tenant or "-",
             f"{key.expires:%Y-%m-%d %H:%M} UTC" if key.expires else "-", _described(key))
            for key in keys
        ],
    )  # fmt: skip


@keys_app.command("revoke")
def keys_revoke(
    key: Annotated[str, typer.Argument(metavar="ID_OR_LABEL", help="As `keys list` shows them.")],
    pool: PoolOption,
    as_json: JsonOption = False,
) -> None:
    """Refuse a key from now on; running servers do within a second."""
    from loraretriever.pool import Pool

    with Pool.open(pool) as opened:
        revoked = opened.keys.revoke(key)
    if as_json:
        console.print_json(console.key_json(revoked))
    else:
        console.print_plain(f"revoked: {revoked.id} {revoked.label}")


def _time_in(duration: str | None) -> datetime | None:
    if duration is None:
        return None
    match = re.fullmatch(r"([1-9][0-9]{0,3})([mhdw])", duration)
    if match is None:
        raise InvalidInputError(f"--expires is {duration!r}; expected up to 9999 with m, h, d or w, such as 90d.")
    return datetime.now(UTC) + int(match[1]) * _UNITS[match[2]]


def _described(key: Key) -> str:
    """Scopes and limits in words."""
    limits = {
        "requests/min": key.requests_per_minute,
        "tokens/min": key.tokens_per_minute,
        "tokens/answer": key.max_tokens,
    }
    return ", ".join([*sorted(key.scopes), *(f"{limit} {unit}" for unit, limit in limits.items() if limit is not None)])
