"""Folders for engines that read an adapter from a folder, over a real pool."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from pathlib import Path

import peft
import pytest
import torch

from loraretriever.compose import compose_explicit, format_composition, merged
from loraretriever.compose.folders import AdapterFolders, reduced
from loraretriever.compose.lanes import Lane
from loraretriever.errors import AdapterNotFoundError, InvalidInputError, PoolError
from loraretriever.pool import Pool
from loraretriever.pool.weights import load_weights
from loraretriever.types import BASE_COMPOSITION, Composition, Mixer
from tiny import TINY_BASE, TINY_SPEC, tiny_llama, write_peft_folder

ROOM = 1 << 30


@pytest.fixture
def pool(tmp_path: Path) -> Iterator[Pool]:
    with Pool.create(tmp_path / "pool", TINY_BASE, spec=TINY_SPEC) as opened:
        for seed, (name, rank) in enumerate({"sql": 4, "german": 2, "math": 8}.items()):
            opened.add(write_peft_folder(tmp_path / name, seed=seed, rank=rank), samples=[name])
        yield opened


@pytest.fixture
def folders(pool: Pool, tmp_path: Path) -> AdapterFolders:
    return AdapterFolders(pool, tmp_path / "made", ROOM)


def mixture(**weights: float) -> Composition:
    return compose_explicit("mixture", weights)


def logits(folder: Path) -> torch.Tensor:
    """Of the tiny model with an adapter, by PEFT."""
    model = peft.PeftModel.from_pretrained(tiny_llama(), str(folder)).eval()
    with torch.no_grad():
        result: torch.Tensor = model(input_ids=torch.arange(5, 25)[None]).logits
    return result


def test_a_mixture_is_the_sum_of_its_adapters_in_peft(pool: Pool, folders: AdapterFolders, tmp_path: Path) -> None:
    name = folders.name(mixture(sql=0.7, german=-0.3), 64)
    made = logits(folders.folder(name))
    model = peft.PeftModel.from_pretrained(tiny_llama(), str(tmp_path / "sql"), adapter_name="sql")
    model.load_adapter(str(tmp_path / "german"), "german")
    for layer in (module for module in model.modules() if isinstance(module, peft.tuners.lora.LoraLayer)):
        layer.scaling["sql"] *= 0.7
        layer.scaling["german"] *= -0.3
    model.base_model.set_adapter(["sql", "german"])
    with torch.no_grad():
        expected = model.eval()(input_ids=torch.arange(5, 25)[None]).logits
    torch.testing.assert_close(made, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(made, logits(tmp_path / "sql"), atol=1e-3)


def test_one_adapter_alone_stays_where_it_is(pool: Pool, folders: AdapterFolders, tmp_path: Path) -> None:
    adapter = pool.get("sql")
    name = folders.name(mixture(sql=1), 64)
    assert name == f"sql@{adapter.digest[:12]}"
    assert folders.folder(name) == adapter.folder
    assert not (tmp_path / "made").exists()
    assert folders.touch(adapter.folder)


def test_of_a_plain_folder_whose_files_may_change_a_copy_is_made(tmp_path: Path) -> None:
    write_peft_folder(tmp_path / "plain" / "sql", samples=["x"])
    with Pool.open(tmp_path / "plain") as pool:
        folders = AdapterFolders(pool, tmp_path / "made", ROOM)
        folder = folders.folder(folders.name(mixture(sql=1), 64))
        assert folder.parent == tmp_path / "made"
        torch.testing.assert_close(logits(folder), logits(tmp_path / "plain" / "sql"))


def test_the_base_model_is_an_adapter_that_changes_nothing(folders: AdapterFolders) -> None:
    assert folders.name(BASE_COMPOSITION, 64) == "base"
    with torch.no_grad():
        expected = tiny_llama()(input_ids=torch.arange(5, 25)[None]).logits
    assert torch.equal(logits(folders.folder("base")), expected)


def test_a_name_keeps_its_bytes_when_an_adapter_is_revised_or_removed(
    pool: Pool, folders: AdapterFolders, tmp_path: Path
) -> None:
    name = folders.name(mixture(sql=0.5, german=0.5), 64)
    before = logits(folders.folder(name))
    pool.add(write_peft_folder(tmp_path / "new", seed=9), name="sql", samples=["sql"])
    pool.remove("german")
    fresh = AdapterFolders(pool, tmp_path / "elsewhere", ROOM)
    torch.testing.assert_close(logits(fresh.folder(name)), before)
    assert folders.name(mixture(sql=1), 64) != name
    with pytest.raises(AdapterNotFoundError, match="no revision of an adapter 'sql' has a digest that begins with"):
        folders.folder("sql@000000000000")


def test_ranks_that_are_too_large(folders: AdapterFolders) -> None:
    composition = mixture(sql=0.5, math=0.5)
    assert folders.name(composition, 12).startswith("mixture(")
    with pytest.raises(InvalidInputError, match="has the rank 12 as one adapter, and the engine takes 8 at most"):
        folders.name(composition, 8)
    with pytest.raises(InvalidInputError, match="rank 12"):
        folders.folder(folders.name(composition, 12), max_rank=8)
    reduced = folders.name(composition, 8, reduce=True)
    assert re.fullmatch(r"svd\(math@.*=0.5,sql@.*=0.5;rank=8\)", reduced)
    modules = load_weights(folders.folder(reduced), "", "").modules
    assert {len(pair.a) for pair in modules.values()} == {8}
    assert folders.name(compose_explicit("fusion", {"sql": 0.5, "math": 0.5}), 8).startswith("fusion(")


def test_what_an_engine_that_reduces_runs(pool: Pool) -> None:
    large, small = mixture(sql=0.5, math=0.5), mixture(sql=1)
    made = reduced(pool, large, 8)
    assert format_composition(made) == "svd(sql=0.5,math=0.5;rank=8)" and reduced(pool, made, 8) == made
    assert reduced(pool, large, 12) == large and reduced(pool, small, 8) == small
    refused = [compose_explicit("arrow", {"sql": 0.5, "math": 0.5}), compose_explicit("ties", {"sql": 1, "math": 1})]
    for composition in (*refused, mixture(sql=1, gone=1), BASE_COMPOSITION):
        assert reduced(pool, composition, 2) == composition


def test_what_is_made_is_kept_and_mended(folders: AdapterFolders) -> None:
    name = folders.name(mixture(sql=0.5, math=0.5), 64)
    folder = folders.folder(name)
    weights = folder / "adapter_model.safetensors"
    content, made = weights.read_bytes(), weights.stat().st_ino
    assert folders.folder(name) == folder and weights.stat().st_ino == made
    weights.write_bytes(content[:-7] + b"garbage")
    assert folders.folder(name) == folder and weights.read_bytes() == content


def test_lanes_name_the_adapters_themselves(pool: Pool, folders: AdapterFolders) -> None:
    composition = compose_explicit("fusion", {"sql": 0.7, "german": 0.3, "math": 0.1})
    name = folders.name(composition, 8, lanes=True)
    lane = folders.lane(name, slots=3)
    places = {pool.get(each).folder: weight for each, weight in (("sql", 0.7), ("german", 0.3), ("math", 0.1))}
    assert {Path(folder): weight for folder, weight in zip(lane.folders, lane.weights, strict=True)} == places
    assert lane.mixer is Mixer.PARAMETERS
    with pytest.raises(InvalidInputError, match="3 adapters needs as many slots, and vLLM has 2"):
        folders.lane(name, slots=2)
    merged = folders.name(compose_explicit("ties", {"sql": 0.5, "math": 0.5}), 8, lanes=True)
    assert folders.lane(merged) == Lane((str(folders.folder(merged)),), (1.0,))
    assert folders.lane("base") == Lane((str(folders.folder("base")),), (1.0,))
    with pytest.raises(InvalidInputError, match="weighs its adapters anew"):
        folders.name(compose_explicit("arrow", {"sql": 0.5, "math": 0.5}), 8, lanes=True)


def test_room_is_made_but_not_by_what_was_just_used(pool: Pool, tmp_path: Path) -> None:
    folders = AdapterFolders(pool, tmp_path / "made", max_bytes=1)
    first, second, third = (folders.folder(folders.name(mixture(sql=w, math=1), 64)) for w in (0.1, 0.2, 0.3))
    assert first.is_dir() and second.is_dir(), "an engine may be about to read them"
    for folder in (first, second):
        os.utime(folder, (1e9, 1e9))
    assert folders.touch(second)
    folders.folder(folders.name(mixture(sql=0.4, math=1), 64))
    assert not first.exists() and second.is_dir() and third.is_dir()
    assert not folders.touch(first)


def test_a_full_disk_is_an_error_and_leaves_nothing(
    folders: AdapterFolders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object, **options: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    name = folders.name(mixture(sql=0.5, math=0.5), 64)
    with monkeypatch.context() as patched:
        patched.setattr(merged, "save_file", full)
        with pytest.raises(PoolError, match="No space left on device"):
            folders.folder(name)
    assert not [path for path in (tmp_path / "made").glob("*") if re.fullmatch("[0-9a-f]{64}", path.name)]
    assert folders.folder(name).is_dir(), "there is room again"
