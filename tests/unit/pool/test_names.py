"""Names of tenants' own adapters: "acme:sql" in the pool is acme's "sql"."""

from __future__ import annotations

from pathlib import Path

import pytest

from loraretriever.errors import InvalidInputError
from loraretriever.pool import Pool, public_name, qualified_name
from loraretriever.pool.names import check_name, own_name
from loraretriever.types import Sample
from tiny import write_peft_folder


def test_there_and_back() -> None:
    assert qualified_name("acme", "sql") == "acme:sql"
    assert public_name("acme:sql", "acme") == "sql"
    assert [public_name("sql", tenant) for tenant in (None, "acme")] == ["sql", "sql"]
    assert public_name("acme:sql", None) == "acme:sql"
    assert (own_name("acme:sql"), own_name("sql")) == ("sql", "sql")
    longest = qualified_name("t" * 64, "n" * 128)
    assert check_name(longest, "t" * 64) == longest


@pytest.mark.parametrize("tenant", ["", "acme & co", "a:b", "-a", "a" * 65, "ä", "a\n"])
def test_tenants_that_cannot_stand_before_a_colon(tenant: str) -> None:
    with pytest.raises(InvalidInputError, match="cannot have adapters with names of their own"):
        qualified_name(tenant, "sql")
    with pytest.raises(InvalidInputError, match="cannot be used"):
        check_name(f"{tenant}:sql", tenant)


@pytest.mark.parametrize("name", ["", "a:b", "../a", "a..b", " a", "n" * 129])
def test_own_names_that_cannot_be(name: str) -> None:
    with pytest.raises(InvalidInputError, match="cannot be used"):
        qualified_name("acme", name)


@pytest.mark.parametrize("tenant", [None, "", "globex", "ACME", "acme:sql"])
def test_only_the_own_tenant_stands_before_the_colon(pool: Pool, tmp_path: Path, tenant: str | None) -> None:
    source = write_peft_folder(tmp_path / "sql")
    with pytest.raises(InvalidInputError, match="before them its tenant's name and ':'"):
        pool.add(source, name="acme:sql", tenant=tenant)
    assert pool.list() == []


def test_an_adapter_with_a_qualified_name(pool: Pool, tmp_path: Path) -> None:
    source = write_peft_folder(tmp_path / "x")
    adapter = pool.add(source, name="acme:sql-writer", tenant="acme").adapter
    assert (adapter.name, adapter.tenant) == ("acme:sql-writer", "acme")
    assert pool.samples("acme:sql-writer") == [Sample("sql writer", "name")], "the tenant's name tells nothing"
    revised = pool.add(write_peft_folder(source, seed=1), name="acme:sql-writer").adapter
    assert (revised.revision, revised.tenant) == (2, "acme")
    for tenant in ("", "globex"):
        with pytest.raises(InvalidInputError, match="cannot be used"):
            pool.add(source, name="acme:sql-writer", tenant=tenant)
    assert pool.tenants() == {"acme"}
    assert pool.verify() == []
    pool.remove("acme:sql-writer")
    assert pool.tenants() == frozenset()


def test_a_plain_folder_takes_no_qualified_names(tmp_path: Path) -> None:
    write_peft_folder(tmp_path / "plain/a")
    with Pool.open(tmp_path / "plain") as pool:
        with pytest.raises(InvalidInputError, match="cannot be used"):
            pool.add(tmp_path / "plain/a", name="acme:a")
        with pytest.raises(InvalidInputError, match="plain folder"):
            pool.add(tmp_path / "plain/a", name="acme:a", tenant="acme")
