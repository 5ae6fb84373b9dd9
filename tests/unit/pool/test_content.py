"""What was removed or revised can be loaded for a while: requests that came before need it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from sqlalchemy import text

from loraretriever.errors import AdapterNotFoundError
from loraretriever.pool import AddChange, Pool, content
from places import contents
from tiny import TINY_SPEC, write_peft_folder


def end_grace(pool: Pool) -> None:
    """As if the time were over for all that was removed."""
    with pool._database.write() as session:
        session.execute(text("UPDATE removed SET expires = '2000-01-01 00:00:00.000000'"))


def is_gone(pool: Pool, name: str, digest: str) -> bool:
    try:
        return pool.weights(name, digest).digest != digest
    except AdapterNotFoundError as error:
        assert "was revised or removed meanwhile" in str(error)
        return True


def test_removed_content_stays_for_a_while(pool: Pool, tmp_path: Path) -> None:
    first = pool.add(write_peft_folder(tmp_path / "a")).adapter.digest
    second = pool.add(write_peft_folder(tmp_path / "a", seed=1)).adapter.digest
    pool.remove("a")
    with Pool.open(pool.location) as other:
        for each in (pool, other):
            assert [each.weights("a", digest).digest for digest in (first, second)] == [first, second]
            for call in (each.get, each.weights):
                with pytest.raises(AdapterNotFoundError, match="no adapter 'a'"):
                    call("a")
            assert is_gone(each, "b", first), "only under its name"
            assert is_gone(each, "a", "0" * 64)
    pool.add(write_peft_folder(tmp_path / "b", seed=2))
    assert {first, second} < contents(pool), "an add sweeps, but not this"
    assert pool.verify() == []
    end_grace(pool)
    assert not is_gone(pool, "a", first), "it is there until somebody sweeps"
    pool.add(tmp_path / "b", name="c")
    assert contents(pool) == {pool.get("b").digest}
    assert is_gone(pool, "a", first)


def test_a_removal_sweeps_what_is_due(pool: Pool, tmp_path: Path) -> None:
    digests = {
        name: pool.add(write_peft_folder(tmp_path / name, seed=seed)).adapter.digest for seed, name in enumerate("abc")
    }
    pool.remove("a")
    end_grace(pool)
    pool.remove("b")
    assert contents(pool) == {digests["b"], digests["c"]}
    pool.grace_seconds = 0
    pool.remove("c")
    assert contents(pool) == {digests["b"]}, "how long it stays is told by who removed it"


def test_content_that_is_needed_again_stays(pool: Pool, tmp_path: Path) -> None:
    source = write_peft_folder(tmp_path / "a")
    digest = pool.add(source).adapter.digest
    pool.remove("a")
    assert pool.add(source).change is AddChange.ADDED
    end_grace(pool)
    pool.add(write_peft_folder(tmp_path / "b", seed=1))
    assert digest in contents(pool)
    pool.add(source, name="twin")
    pool.remove("a")
    pool.grace_seconds = 0
    pool.remove("twin")
    assert pool.weights("a", digest).digest == digest, "the other one's time is not over"
    assert pool.verify() == []


def test_a_plain_folder_finds_what_was_replaced_or_removed(tmp_path: Path) -> None:
    folder = tmp_path / "plain"
    write_peft_folder(folder / "a", samples=["x"])
    write_peft_folder(folder / "a.1", samples=["y"], seed=7)
    with Pool.open(folder) as pool, Pool.open(folder) as other:
        pool.check_shapes(TINY_SPEC)
        digests = [pool.get("a").digest]
        digests += [pool.add(write_peft_folder(tmp_path / "a", seed=seed)).adapter.digest for seed in (1, 2)]
        dotted = pool.get("a.1").digest
        for name in ("a", "a.1"):
            pool.remove(name)
        for each in (pool, other):
            assert [each.weights("a", digest).digest for digest in digests] == digests
            assert each.weights("a.1", dotted).digest == dotted
            assert is_gone(each, "a", dotted)
            assert is_gone(each, "*", dotted)
        weights = folder / ".loraretriever/removed/a.1/adapter_model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-1] + b"\x3d")
        assert is_gone(pool, "a", digests[0]), "its files were changed"


def test_a_plain_folders_files_that_changed_by_hand(tmp_path: Path) -> None:
    write_peft_folder(tmp_path / "plain/a", samples=["x"])
    with Pool.open(tmp_path / "plain") as pool:
        digest = pool.get("a").digest
        write_peft_folder(tmp_path / "plain/a", seed=1)
        assert is_gone(pool, "a", digest)


def test_an_adapter_that_is_replaced_while_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Configuration and weights are never those of two revisions."""
    write_peft_folder(tmp_path / "plain/a", samples=["x"], alpha=8)
    source = write_peft_folder(tmp_path / "a", alpha=16, seed=1)
    with Pool.open(tmp_path / "plain") as pool:
        pool.check_shapes(TINY_SPEC)
        digest = pool.get("a").digest
        expected = pool.weights("a", digest)
        load = content.load_weights
        loads = 0

        def replaced(folder: Path, name: str, digest: str) -> object:
            nonlocal loads
            loads += 1
            if loads == 1:
                pool.add(source)
            return load(folder, name, digest)

        monkeypatch.setattr(content, "load_weights", replaced)
        found = pool.weights("a", digest)
        assert loads == 2
    for module, pair in expected.modules.items():
        assert found.modules[module].scaling == pair.scaling
        assert found.modules[module].a.equal(pair.a)


CHANGES = """
import sys
from loraretriever.pool import Pool
location, *sources = sys.argv[1:]
with Pool.open(location) as pool:
    for source in sources:
        pool.add(source, name="a", samples=["x"])
        print("added", flush=True)
        sys.stdin.readline()
    for _ in range(8):
        for source in sources:
            pool.add(source, name="a", samples=["x"])
        pool.remove("a")
    pool.add(sources[0], name="a", samples=["x"])
"""


@pytest.mark.parametrize("kind", ["made", "plain"])
def test_what_a_reader_has_seen_it_can_load(pool: Pool, tmp_path: Path, kind: str) -> None:
    """While another process revises and removes the adapter: no digest that `get` gave is ever gone."""
    sources = [write_peft_folder(tmp_path / f"source{seed}", seed=seed) for seed in range(2)]
    location = pool.location
    if kind == "plain":
        location = tmp_path / "plain"
        write_peft_folder(location / "a", samples=["x"])
        write_peft_folder(location / "b", samples=["x"], seed=5)
    with Pool.open(location) as reader:
        reader.check_shapes(TINY_SPEC)
        command = [sys.executable, "-c", CHANGES, str(location), *map(str, sources)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as writer:
            assert writer.stdin and writer.stdout
            seen: list[str] = []
            for _ in sources:  # both are seen, however fast the writer is; the rest is a race
                assert writer.stdout.readline() == "added\n"
                seen.append(reader.get("a").digest)
                writer.stdin.write("\n")
                writer.stdin.flush()
            while writer.poll() is None:
                try:
                    seen.append(reader.get("a").digest)
                except AdapterNotFoundError:
                    continue
                assert reader.weights("a", seen[-1]).digest == seen[-1]
        assert writer.returncode == 0
        assert len(set(seen)) == 2
        for digest in set(seen):
            assert reader.weights("a", digest).digest == digest
