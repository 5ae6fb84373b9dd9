"""What a pool is told beside its adapters: its sentence encoder, and whom an adapter belongs to."""

from __future__ import annotations

from pathlib import Path

import pytest

from loraretriever.errors import InvalidInputError
from loraretriever.pool import AddChange, Pool
from tiny import write_peft_folder


def test_the_encoder_of_a_pool(pool: Pool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert pool.encoder is None
    change = pool.change
    pool.set_encoder("some/encoder")
    assert (pool.encoder, pool.change, pool.changes_since(change)) == ("some/encoder", change + 1, frozenset())
    (tmp_path / "models/mine").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    pool.set_encoder("models/mine")
    with Pool.open(pool.location) as again:
        assert again.encoder == str(tmp_path / "models/mine")
        again.set_encoder(None)
        again.set_encoder(None)
    assert (pool.encoder, pool.change) == (None, change + 3)
    for name in ("", " ", "a\0b", "\udcff"):
        with pytest.raises(InvalidInputError, match="the encoder's name is .*expected"):
            pool.set_encoder(name)


def test_the_encoder_of_a_plain_folder(tmp_path: Path) -> None:
    write_peft_folder(tmp_path / "plain/a")
    with Pool.open(tmp_path / "plain") as pool:
        pool.set_encoder("some/encoder")
    write_peft_folder(tmp_path / "plain/b", seed=1)
    with Pool.open(tmp_path / "plain") as pool:
        assert pool.encoder == "some/encoder"


def test_tenants(pool: Pool, tmp_path: Path) -> None:
    source = write_peft_folder(tmp_path / "a")
    assert pool.add(source, samples=["x"], tenant="acme & co").adapter.tenant == "acme & co"
    assert pool.add(source).change is AddChange.UNCHANGED
    assert pool.add(write_peft_folder(source, seed=1)).adapter.tenant == "acme & co", "a revision has the same"
    assert pool.add(source, tenant="other").change is AddChange.DETAILS_UPDATED
    assert pool.list()[0].tenant == "other"
    assert pool.entries("e")[1]["a"].tenant == "other"
    assert pool.add(source, tenant="").adapter.tenant is None
    assert pool.add(source, name="b").adapter.tenant is None


@pytest.mark.parametrize("tenant", ["x" * 129, " x", "a\nb", "\udcff"])
def test_bad_tenants(pool: Pool, tmp_path: Path, tenant: str) -> None:
    with pytest.raises(InvalidInputError, match="tenant is .*expected at most 128"):
        pool.add(write_peft_folder(tmp_path / "a"), tenant=tenant)
    assert pool.list() == []


def test_a_plain_folder_has_no_tenants(tmp_path: Path) -> None:
    write_peft_folder(tmp_path / "plain/a")
    with Pool.open(tmp_path / "plain") as pool:
        assert pool.get("a").tenant is None
        with pytest.raises(InvalidInputError, match="tenant is 'acme', but .* is a plain folder"):
            pool.add(tmp_path / "plain/a", tenant="acme")
