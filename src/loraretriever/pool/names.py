"""Names of adapters: in the pool they are unique, and a tenant knows its own by what follows its name and a colon."""

from __future__ import annotations

import re

from loraretriever.errors import InvalidInputError

MAX_TENANT = 128
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_QUALIFIER = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


def qualified_name(tenant: str, name: str) -> str:
    """The name in the pool of a tenant's own adapter: "acme:sql" for acme's "sql".

    Raises:
        InvalidInputError: the adapter cannot have that name, or the tenant's cannot stand before a colon.
    """
    if not _QUALIFIER.fullmatch(tenant):
        raise InvalidInputError(
            f"the tenant {tenant!r:.200} cannot have adapters with names of their own; expected 1 to 64 letters, "
            "digits, '.', '_' or '-', the first one a letter or digit. Give another tenant."
        )
    return f"{tenant}:{check_name(name)}"


def public_name(pool_name: str, tenant: str | None) -> str:
    """The name by which the tenant that an adapter belongs to knows it: "sql" for acme's "acme:sql"."""
    return pool_name if tenant is None else pool_name.removeprefix(f"{tenant}:")


def own_name(pool_name: str) -> str:
    """A name in the pool without the tenant that may stand before it."""
    return pool_name.rpartition(":")[2]


def check_name(name: str, tenant: str | None = None) -> str:
    """The name in the pool, when an adapter of this tenant may have it; only its own name may stand before a colon.

    Raises:
        InvalidInputError: it may not.
    """
    own = public_name(name, tenant) if tenant and _QUALIFIER.fullmatch(tenant) else name
    if not _NAME.fullmatch(own) or ".." in own:
        raise InvalidInputError(
            f"the adapter name {name!r:.200} cannot be used; expected 1 to 128 letters, digits, '.', '_' or '-', the "
            "first one a letter or digit, and no '..'; before them its tenant's name and ':' if it has one. Give "
            "another name."
        )
    return name


def check_tenant(tenant: str) -> str:
    """The name of a tenant, when it may be one.

    Raises:
        InvalidInputError: it may not.
    """
    if not tenant or len(tenant) > MAX_TENANT or not tenant.isprintable() or tenant != tenant.strip():
        raise InvalidInputError(
            f"tenant is {tenant!r:.200}; expected at most {MAX_TENANT} printable characters, no space at an end."
        )
    return tenant
