from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from loraretriever.errors import ModelLoadError, PoolError
from loraretriever.pool import AddChange, Pool, admission, files, layout
from loraretriever.types import Sample
from tiny import TINY_BASE, TINY_SPEC, write_peft_folder


@pytest.fixture(autouse=True)
def no_base_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> None:
        raise ModelLoadError(f"cannot load {name}")

    monkeypatch.setattr("loraretriever.models.base_model_spec", fail)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "plain"
    write_peft_folder(folder / "a", samples=["x", "y"], card="Does this.\n")
    write_peft_folder(folder / "b", seed=1)
    (folder / "notes").mkdir()
    (folder / "README.md").write_text("not an adapter")
    return folder


def names(pool: Pool) -> list[str]:
    return [adapter.name for adapter in pool.list()]


def change(file: Path) -> None:
    """Make sure that the file's time differs, however coarse the file system's clock is."""
    status = file.stat()
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns + 1_000_000_000))


def test_adapters_are_registered_where_they_lie(folder: Path) -> None:
    with Pool.open(folder) as pool:
        assert (names(pool), pool.base_model, pool.problems) == (["a", "b"], TINY_BASE, ())
        assert pool.get("a").folder == folder / "a"
        assert pool.get("a").description == "Does this."
        assert pool.samples("a") == [Sample("x"), Sample("y")]
        assert pool.samples("b") == [Sample("b", "name")]
        assert len(pool.weights("a").modules) == 4
        assert pool.verify() == ["the shapes of a, b cannot be checked: cannot load tiny/llama"]
        assert pool.check_shapes(TINY_SPEC) == []
        assert pool.verify() == []
        number = pool.change
    assert (folder / ".loraretriever/.gitignore").read_text() == "*\n"
    with Pool.open(folder) as pool:
        assert (names(pool), pool.change) == (["a", "b"], number), "nothing has changed"


def test_changes_are_found_on_opening(folder: Path) -> None:
    with Pool.open(folder) as pool:
        pool.set_enabled("a", False)
        first, number = pool.get("a"), pool.change
    write_peft_folder(folder / "c", seed=2)
    write_peft_folder(folder / "a", seed=3)
    change(folder / "a/adapter_model.safetensors")
    shutil.rmtree(folder / "b")
    with Pool.open(folder) as pool:
        assert (names(pool), pool.problems) == (["a", "c"], ())
        assert pool.get("a").revision == 2
        assert pool.get("a").digest != first.digest
        assert not pool.get("a").enabled
        assert pool.change == number + 3
        (folder / "a/samples.jsonl").write_text('{"inputs": "new"}\n')
        pool.refresh()
        assert (pool.get("a").revision, pool.samples("a")) == (2, [Sample("new")])
        (folder / "a/samples.jsonl").unlink()
        pool.refresh()
        assert pool.samples("a") == [Sample("Does this.", "model_card")]


def test_a_touched_adapter_is_still_the_same(folder: Path) -> None:
    with Pool.open(folder) as pool:
        before = pool.list()
        change(folder / "a/adapter_model.safetensors")
        with pytest.raises(PoolError, match="have changed"):
            pool.weights("a")
        pool.refresh()
        assert pool.list() == before
        pool.weights("a")


def test_bad_folders_are_reported_and_left_out(folder: Path, tmp_path: Path) -> None:
    write_peft_folder(folder / "dora", config={"use_dora": True})
    write_peft_folder(folder / "has space")
    write_peft_folder(folder / "other", base_model="other/base")
    write_peft_folder(folder / "lines", samples=["x", ""])
    (write_peft_folder(folder / "half") / "adapter_model.safetensors").unlink()
    write_peft_folder(tmp_path / "elsewhere")
    (folder / "link").symlink_to(tmp_path / "elsewhere")
    expected = {
        "dora": "use_dora=True",
        "has space": "cannot be used; expected",
        "other": "'other/base'; expected the pool's 'tiny/llama'",
        "lines": "samples.jsonl:2: the sample is ''",
        "half": "it is missing",
        "link": "is a link; expected a folder",
    }
    for _ in range(2):
        with Pool.open(folder) as pool:
            assert names(pool) == ["a", "b"]
            assert len(pool.problems) == len(expected)
            for name, message in expected.items():
                assert any(repr(name) in problem and message in problem for problem in pool.problems), name
            assert set(pool.problems) < set(pool.verify())


HOSTILE = [
    {"rank_pattern": {"(?i)q_proj": 4}},
    {"rank_pattern": {"a{99999999999999}": 4}},
    {"rank_pattern": {"(" * 3000 + ")" * 3000: 4}},
    {"lora_alpha": 10**400},
    {"base_model_name_or_path": "\ud800"},
]


@pytest.mark.parametrize("config", HOSTILE, ids=range(len(HOSTILE)))
def test_one_bad_configuration_leaves_the_others(folder: Path, config: dict[str, Any]) -> None:
    write_peft_folder(folder / "bad", config=config)
    with Pool.open(folder) as pool:
        assert (names(pool), len(pool.problems)) == (["a", "b"], 1)


@pytest.mark.parametrize("value", ["!!bool maybe", "!!int ''", "!!timestamp foo"])
def test_odd_front_matter_is_no_problem(folder: Path, value: str) -> None:
    write_peft_folder(folder / "c", card=f"---\nx: {value}\n---\nWrites SQL.\n")
    with Pool.open(folder) as pool:
        assert (names(pool), pool.problems) == (["a", "b", "c"], ())


def test_configurations_that_never_end_are_not_read(folder: Path) -> None:
    for name in ("link", "pipe"):
        (folder / name).mkdir()
    (folder / "link/adapter_config.json").symlink_to("/dev/zero")
    os.mkfifo(folder / "pipe/adapter_config.json")
    with Pool.open(folder) as pool:
        assert (names(pool), len(pool.problems)) == (["a", "b"], 2)


def test_a_folder_that_may_not_be_read_leaves_the_others(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "locked").mkdir()
    real = os.stat

    def stat(path: Any, *args: Any, **options: Any) -> os.stat_result:
        if Path(str(path)).parent.name == "locked":
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, *args, **options)

    monkeypatch.setattr(os, "stat", stat)
    with Pool.open(folder) as pool:
        assert (names(pool), pool.problems) == (["a", "b"], ())


def test_links_in_the_state_folder_are_refused(folder: Path, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    state = folder / ".loraretriever"
    state.symlink_to(tmp_path)
    with pytest.raises(PoolError, match="is a link or a device"):
        Pool.open(folder)
    state.unlink()
    state.mkdir()
    for name in (".gitignore", "lock", "pool.db", "staging", "replaced", "removed"):
        (state / name).symlink_to(victim)
        with pytest.raises(PoolError, match=f"{name} is a link or a device"):
            Pool.open(folder)
        (state / name).unlink()
    os.mkfifo(state / "lock")
    with pytest.raises(PoolError, match="lock is a link or a device"):
        Pool.open(folder)
    assert victim.read_text() == "precious"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plain", "victim"]


def test_writing_samples_follows_no_link(folder: Path, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (folder / "a/.samples.jsonl.tmp").symlink_to(victim)
    with Pool.open(folder) as pool:
        pool.add(write_peft_folder(tmp_path / "a"), samples=["new"])
        assert pool.samples("a") == [Sample("new")]
    assert victim.read_text() == "precious"
    assert not (folder / "a/.samples.jsonl.tmp").exists()


def test_the_gitignore_is_the_users(folder: Path) -> None:
    Pool.open(folder).close()
    (folder / ".loraretriever/.gitignore").write_text("mine")
    Pool.open(folder).close()
    assert (folder / ".loraretriever/.gitignore").read_text() == "mine"


def test_an_edited_card_gives_the_description(folder: Path) -> None:
    with Pool.open(folder) as pool:
        pool.add(folder / "a", description="By hand.")
        change(folder / "a/adapter_model.safetensors")
        pool.refresh()
        assert pool.get("a").description == "By hand."
        (folder / "a/README.md").write_text("Does \x1b[1mthat instead.\n")
        pool.refresh()
        assert (pool.get("a").description, pool.get("a").revision) == ("Does [1mthat instead.", 1)


def test_admission_holds_no_transaction(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Pool.open(folder) as pool:
        write_peft_folder(folder / "c", seed=2)
        seen = []

        def admit(*args: Any, **options: Any) -> Any:
            pool.set_enabled("a", False)  # writes
            seen.append(args[0].name)
            return admission.admit(*args, **options)

        monkeypatch.setattr("loraretriever.pool.plain.admit", admit)
        monkeypatch.setattr("loraretriever.pool.sqlite._BUSY_SECONDS", 1.0)
        pool.refresh()
        assert (names(pool), seen, pool.get("a").enabled) == (["a", "b", "c"], ["c"], False)


def test_an_adapter_that_turned_bad_is_no_longer_registered(folder: Path) -> None:
    Pool.open(folder).close()
    (folder / "a/adapter_model.safetensors").write_bytes(b"damaged")
    with Pool.open(folder) as pool:
        assert names(pool) == ["b"]
        assert "'a' was left out" in pool.problems[0]


def test_a_folder_without_any_usable_base_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "plain/a").mkdir(parents=True)
    (tmp_path / "plain/a/adapter_config.json").write_text("{")
    with pytest.raises(PoolError, match=r"no adapter in .* can be used: .*not valid JSON"):
        Pool.open(tmp_path / "plain")


@pytest.fixture
def read_only(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setattr(layout, "is_writable", lambda path: not path.is_relative_to(folder))
    before = sorted(folder.rglob("*"))
    yield folder
    assert sorted(folder.rglob("*")) == before


def test_a_read_only_folder_has_its_database_in_the_cache(read_only: Path, cache: Path) -> None:
    with Pool.open(read_only) as pool:
        assert names(pool) == ["a", "b"]
        pool.set_enabled("a", False)
        with pytest.raises(PoolError, match="is read-only. Copy"):
            pool.add(read_only / "a", name="c")
        with pytest.raises(PoolError, match="is read-only. Copy"):
            pool.remove("a")
    assert len(list(cache.glob("pools/*/pool.db"))) == 1
    with Pool.open(read_only) as pool:
        assert not pool.get("a").enabled


def test_adding_to_a_plain_folder(folder: Path, tmp_path: Path) -> None:
    with Pool.open(folder) as pool:
        source = write_peft_folder(tmp_path / "c", seed=2)
        assert pool.add(source, samples=["p"], description="d").change is AddChange.ADDED
        assert pool.add(source, samples=["p"]).change is AddChange.UNCHANGED
        assert pool.add(source, samples=["q"]).change is AddChange.SAMPLES_UPDATED
        assert pool.add(write_peft_folder(source, seed=3)).change is AddChange.REVISED
        before, number = pool.list(), pool.change
        assert pool.samples("c") == [Sample("q")]
        assert (pool.get("c").description, pool.get("c").folder) == ("d", folder / "c")
    with Pool.open(folder) as pool:
        assert (pool.list(), pool.change, pool.samples("c")) == (before, number, [Sample("q")])
    shutil.rmtree(folder / ".loraretriever")
    with Pool.open(folder) as pool:
        assert (names(pool), pool.samples("c")) == (["a", "b", "c"], [Sample("q")])
        with pytest.raises(PoolError, match="exists but is not an adapter of the pool"):
            pool.add(source, name="notes")


def test_a_folder_that_was_left_out_is_added_in_place(folder: Path) -> None:
    other = write_peft_folder(folder / "other", base_model="other/copy", samples=["x"])
    (other / "notes.txt").write_text("mine")
    lines = (other / "samples.jsonl").read_bytes()
    for _ in range(2):
        with Pool.open(folder) as pool:
            assert (names(pool), len(pool.problems)) == (["a", "b"], 1)
    with Pool.open(folder) as pool:
        assert pool.add(other, allow_base_mismatch=True).change is AddChange.ADDED
        number = pool.change
        assert pool.add(other, allow_base_mismatch=True).change is AddChange.UNCHANGED
        pool.weights("other")
    assert ((other / "notes.txt").read_text(), (other / "samples.jsonl").read_bytes()) == ("mine", lines)
    with Pool.open(folder) as pool:
        assert (names(pool), pool.problems, pool.change) == (["a", "b", "other"], (), number)
        assert pool.samples("other") == [Sample("x")]
        assert pool.add(other, allow_base_mismatch=True, samples=["y"]).change is AddChange.SAMPLES_UPDATED
        write_peft_folder(other, base_model="other/copy", seed=5)
        assert pool.add(other, allow_base_mismatch=True).change is AddChange.REVISED
        number = pool.change
    with Pool.open(folder) as pool:
        assert (pool.samples("other"), pool.change, pool.problems) == ([Sample("y")], number, ())
    assert (other / "notes.txt").read_text() == "mine"


def test_samples_from_a_description_in_place_stay(folder: Path) -> None:
    with Pool.open(folder) as pool:
        (folder / "a/samples.jsonl").unlink()
        pool.refresh()
        pool.add(folder / "a", description="By hand.")
        samples = [Sample("Does this.", "model_card"), Sample("By hand.", "description")]
        assert pool.samples("a") == samples
        change(folder / "a/adapter_config.json")
        pool.add(folder / "a")
        pool.weights("a")
        change(folder / "a/adapter_config.json")
        pool.refresh()
        assert pool.samples("a") == samples


def test_a_revision_keeps_the_folder_before_it(folder: Path, tmp_path: Path) -> None:
    (folder / "a/notes.txt").write_text("mine")
    with Pool.open(folder) as pool:
        first = pool.get("a").digest
        second = pool.add(write_peft_folder(tmp_path / "a", seed=5)).adapter.digest
        assert pool.weights("a", second).digest == second
        assert pool.weights("a", first).digest == first
    assert (folder / ".loraretriever/removed/a.1/notes.txt").read_text() == "mine"


def test_lost_files_are_repaired(folder: Path, tmp_path: Path) -> None:
    source = write_peft_folder(tmp_path / "c", seed=2)
    with Pool.open(folder) as pool:
        pool.add(source)
        shutil.rmtree(folder / "c")
        assert pool.add(source).change is AddChange.REPAIRED
        pool.weights("c")


def test_removing_from_a_plain_folder_keeps_the_files(folder: Path) -> None:
    with Pool.open(folder) as pool:
        pool.remove("a")
        assert names(pool) == ["b"]
        pool.add(folder / ".loraretriever/removed/a.1", name="a")
        pool.remove("a")
    assert not (folder / "a").exists()
    assert sorted(path.name for path in (folder / ".loraretriever/removed").iterdir()) == ["a.1", "a.2"]
    with Pool.open(folder) as pool:
        assert names(pool) == ["b"]
        pool.remove("b")
    with Pool.open(folder) as pool:
        assert names(pool) == []


@pytest.mark.parametrize("how", ["open", "add", "remove"])
def test_a_replacement_cut_short_is_undone(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    class Killed(BaseException):
        pass

    with Pool.open(folder) as pool:
        digest = pool.get("a").digest

        def killed(source: Path, target: Path) -> None:
            if target == folder / "a":
                raise Killed
            files.rename(source, target)

        monkeypatch.setattr("loraretriever.pool.plain.rename", killed)
        with pytest.raises(Killed):
            pool.add(write_peft_folder(tmp_path / "a", seed=5))
        assert not (folder / "a").exists()
        monkeypatch.undo()
        monkeypatch.setenv("LORARETRIEVER_CACHE", str(tmp_path / "cache"))
        if how == "add":  # by a process that has the pool open
            assert pool.add(write_peft_folder(tmp_path / "a", seed=5)).change is AddChange.REVISED
            assert (folder / ".loraretriever/removed/a.1/samples.jsonl").exists()
            return
        if how == "remove":
            pool.remove("a")
            pool.refresh()
            assert names(pool) == ["b"]
            return
    with Pool.open(folder) as pool:
        assert (names(pool), pool.get("a").digest, pool.problems) == (["a", "b"], digest, ())
