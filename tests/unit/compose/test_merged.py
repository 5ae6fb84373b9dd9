from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import peft
import pytest
import torch
from safetensors import SafetensorError

from loraretriever.compose import merge as merging
from loraretriever.compose import merged
from loraretriever.compose.merge import MERGES, merge_adapters
from loraretriever.compose.merged import MergedStore, merged_digest, merged_name, write_peft
from loraretriever.errors import InvalidInputError
from loraretriever.pool.weights import load_weights
from loraretriever.types import AdapterWeights, Composition, LoraPair, Merge
from tiny import tiny_llama, write_peft_folder

A, B = "a" * 64, "b" * 64
PARTS = [(A, 0.7), (B, 0.3)]
ROOM = 1 << 30


def digest(number: int) -> str:
    return f"{number:064x}"


def adapter(number: int = 0, rank: int = 2, features: int = 3) -> AdapterWeights:
    generator = torch.Generator().manual_seed(number)
    pair = LoraPair(torch.randn(rank, features, generator=generator), torch.ones(features, rank), 1.0)
    return AdapterWeights("made", "", {"m": pair})


def never() -> AdapterWeights:
    raise AssertionError("the store had it")


def same(left: AdapterWeights, right: AdapterWeights) -> bool:
    return left.modules.keys() == right.modules.keys() and all(
        torch.equal(pair.a, right.modules[module].a)
        and torch.equal(pair.b, right.modules[module].b)
        and pair.scaling == right.modules[module].scaling
        for module, pair in left.modules.items()
    )


@pytest.fixture
def store(tmp_path: Path) -> MergedStore:
    return MergedStore(tmp_path / "deep" / "merged", ROOM)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "deep" / "merged"


def entries(folder: Path) -> set[str]:
    return {entry.name for entry in folder.iterdir()} - {"lock", "staging"}


def unfinished(folder: Path) -> list[Path]:
    return list((folder / "staging").iterdir())


# The digest


def test_the_digest_is_the_same_everywhere() -> None:
    """Written down, so that a change that would lose every cached adapter is seen."""
    assert merging.VERSION == 1
    assert (
        merged_digest(PARTS, Merge("ties", density=0.2, seed=3))
        == "5feb2e1bdcd71daf54bef1a69722a8fc9b22a5ca2704df2f1aa9dd5f101999e8"
    )


def test_the_order_of_the_adapters_is_not_in_the_digest() -> None:
    assert merged_digest(PARTS, Merge("ties")) == merged_digest(PARTS[::-1], Merge("ties"))
    assert merged_digest([(A, 1)], Merge("ties")) == merged_digest([(A, 1.0)], Merge("ties")), (
        "whole numbers are numbers"
    )


def test_all_else_is_in_the_digest(monkeypatch: pytest.MonkeyPatch) -> None:
    merges = [
        *(Merge(method) for method in MERGES),
        Merge("ties", density=0.5000000000000001),
        Merge("ties", rank=4),
        Merge("ties", seed=1),
    ]
    weights = [(A, 0.3), (B, 0.7)], [(A, 0.7), (B, 0.30000000000000004)], [(A, 0.7)], [(A, 0.7), (B, 0.3), (B, 0.0)]
    found = {merged_digest(PARTS, merge) for merge in merges} | {merged_digest(w, Merge("ties")) for w in weights}
    monkeypatch.setattr(merged, "VERSION", 2)
    found.add(merged_digest(PARTS, Merge("ties")))
    assert len(found) == len(merges) + len(weights) + 1
    assert all(len(each) == 64 and int(each, 16) for each in found)


def test_a_bad_merge_has_no_digest() -> None:
    with pytest.raises(InvalidInputError, match="unknown merge 'blend'"):
        merged_digest(PARTS, Merge("blend"))
    with pytest.raises(InvalidInputError, match="density is 0"):
        merged_digest(PARTS, Merge("ties", density=0))


def test_names() -> None:
    composition = Composition("ties", ("sql", "german"), (0.7, 1 / 3), merge=Merge("ties_svd"))
    assert merged_name(composition) == "ties_svd(sql=0.7,german=0.333)"
    assert merged_name(Composition("mixture", ("sql",), (-1.0,))) == "mixture(sql=-1)"


# What is in an entry


def test_an_entry_is_a_peft_adapter(tmp_path: Path, store: MergedStore, folder: Path) -> None:
    """Ranks that differ between modules, and modules that one adapter lacks."""
    parts = []
    for i, (rank, targets) in enumerate([(2, ["q_proj"]), (4, ["q_proj", "down_proj"])]):
        write_peft_folder(tmp_path / f"{i}", rank=rank, targets=targets, seed=i)
        parts.append(load_weights(tmp_path / f"{i}", f"{i}", digest(i)))
    made = store.get(A, "ours", lambda: merge_adapters(parts, (0.6, 0.4), Merge("svd", rank=5)))
    assert {pair.a.shape[0] for pair in made.modules.values()} == {4, 5}
    model = peft.PeftModel.from_pretrained(tiny_llama(), folder / A)
    for module, pair in made.modules.items():
        layer = model.base_model.model.get_submodule(module)
        torch.testing.assert_close(layer.get_delta_weight("default").detach(), pair.scaling * pair.b @ pair.a)
    layers = {name for name, module in model.base_model.model.named_modules() if hasattr(module, "get_delta_weight")}
    assert layers == made.modules.keys()


def test_scalings_are_kept(tmp_path: Path) -> None:
    """Also where a module's path is the end of another's."""
    pairs = {
        name: LoraPair(torch.ones(rank, 3), torch.ones(3, rank), scaling)
        for name, rank, scaling in (("x.q", 2, 0.5), ("q", 4, 1.0), ("y.q", 4, -2.0), ("yxq", 3, 0.1))
    }
    write_peft(tmp_path, pairs)
    loaded = load_weights(tmp_path, "n", A)
    assert {name: pair.scaling for name, pair in loaded.modules.items()} == pytest.approx(
        {name: pair.scaling for name, pair in pairs.items()}
    )
    assert {name: pair.a.shape[0] for name, pair in loaded.modules.items()} == {"x.q": 2, "q": 4, "y.q": 4, "yxq": 3}


def test_made_once_then_read(store: MergedStore, folder: Path) -> None:
    made = store.get(A, "first", adapter)
    assert (made.name, made.digest) == ("first", A)
    read = MergedStore(folder, ROOM).get(A, "second", never)
    assert (read.name, read.digest) == ("second", A) and same(made, read)
    assert entries(folder) == {A} and not unfinished(folder)


def test_what_make_raises_is_raised(store: MergedStore, folder: Path) -> None:
    def fail() -> AdapterWeights:
        raise InvalidInputError("no such adapters")

    with pytest.raises(InvalidInputError, match="no such adapters"):
        store.get(A, "n", fail)
    assert not folder.exists()
    assert same(store.get(A, "n", adapter), adapter())


# Limits


def size(entry: Path) -> int:
    return sum(file.stat().st_size for file in entry.iterdir())


def test_the_least_recently_used_give_way(store: MergedStore, folder: Path) -> None:
    for number in range(3):
        store.get(digest(number), "n", lambda number=number: adapter(number))
        os.utime(folder / digest(number), ns=(number, number))
    store.get(digest(0), "n", never)  # used now
    small = MergedStore(folder, max_bytes=3 * size(folder / digest(0)) + 10)
    small.get(digest(3), "n", lambda: adapter(3))
    assert entries(folder) == {digest(0), digest(2), digest(3)}
    small.get(digest(4), "n", lambda: adapter(4))
    assert entries(folder) == {digest(0), digest(3), digest(4)}
    assert not unfinished(folder)
    assert sum(size(folder / name) for name in entries(folder)) <= 3 * size(folder / digest(0)) + 10


def test_the_newest_stays_whatever_its_size(folder: Path) -> None:
    store = MergedStore(folder, max_bytes=0)
    for number in range(3):
        store.get(digest(number), "n", adapter)
        assert entries(folder) == {digest(number)}
    store.get(digest(2), "n", never)


def test_the_limit_is_not_negative(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="max_bytes is -1; expected 0"):
        MergedStore(tmp_path, -1)


def test_an_adapter_that_is_in_use_outlives_its_folder(folder: Path) -> None:
    store = MergedStore(folder, max_bytes=0)
    store.get(A, "n", adapter)
    read = store.get(A, "n", never)
    store.get(B, "n", lambda: adapter(1))
    assert entries(folder) == {B} and same(read, adapter())


# Damage


def flip(entry: Path) -> None:
    content = bytearray((entry / "adapter_model.safetensors").read_bytes())
    content[-1] ^= 1
    (entry / "adapter_model.safetensors").write_bytes(content)


def change_scaling(entry: Path) -> None:
    config = json.loads((entry / "adapter_config.json").read_text())
    (entry / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 77}))


def replace_by_file(entry: Path) -> None:
    for file in entry.iterdir():
        file.unlink()
    entry.rmdir()
    entry.write_text("no folder")


@pytest.mark.parametrize(
    "damage",
    [
        flip,
        change_scaling,
        replace_by_file,
        lambda entry: (entry / "adapter_model.safetensors").write_bytes(b""),
        lambda entry: (entry / "adapter_model.safetensors").unlink(),
        lambda entry: (entry / "adapter_config.json").write_bytes(b"{\xff"),
        lambda entry: (entry / "sha256").write_bytes(b"\xff"),
        lambda entry: (entry / "sha256").unlink(),
    ],
    ids=["bit", "scaling", "file", "empty", "no weights", "config", "sum", "no sum"],
)
def test_a_damaged_entry_is_made_again(store: MergedStore, folder: Path, damage: Callable[[Path], None]) -> None:
    store.get(A, "n", lambda: adapter(1))
    damage(folder / A)
    assert same(store.get(A, "n", lambda: adapter(2)), adapter(2))
    assert same(store.get(A, "n", never), adapter(2))
    assert entries(folder) == {A} and not unfinished(folder)


def test_a_file_in_place_of_the_folder_means_no_store(store: MergedStore, folder: Path) -> None:
    folder.parent.mkdir()
    folder.write_text("no folder")
    assert same(store.get(A, "n", adapter), adapter())
    assert same(store.get(A, "n", lambda: adapter(1)), adapter(1))
    assert folder.read_text() == "no folder"


def test_a_folder_that_cannot_be_written_is_read(
    store: MergedStore, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.get(A, "n", adapter)

    def refuse(*args: object, **named: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    for name in ("mkdir", "utime", "rename"):
        monkeypatch.setattr(os, name, refuse)
    assert same(store.get(A, "n", never), adapter())
    assert same(store.get(B, "n", lambda: adapter(1)), adapter(1))
    assert entries(folder) == {A}


@pytest.fixture
def small_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files above 4 KB are refused: as on a full disk, a write fails half-way."""
    whole = merged.save_file

    def save(tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str]) -> None:
        whole(tensors, path, metadata)
        if path.stat().st_size > 4096:
            path.write_bytes(path.read_bytes()[:4096])
            raise SafetensorError("I/O error: No space left on device")

    monkeypatch.setattr(merged, "save_file", save)


def test_a_full_disk_means_no_store(store: MergedStore, folder: Path, small_files: None) -> None:
    large = adapter(features=2000)
    with pytest.raises(SafetensorError):  # so that the test tests something
        write_peft(folder.parent.parent, large.modules)
    assert same(store.get(A, "n", lambda: large), large)
    assert entries(folder) == set() and not unfinished(folder)
    store.get(B, "n", adapter)
    assert entries(folder) == {B}


# Several at once


def test_threads_wait_for_the_first(store: MergedStore) -> None:
    started, others = threading.Event(), threading.Barrier(4)
    calls = []

    def make() -> AdapterWeights:
        calls.append(1)
        started.set()
        others.wait(10)  # until all others are about to ask
        return adapter()

    def ask() -> AdapterWeights:
        started.wait(10)
        others.wait(10)
        return store.get(A, "n", make)

    with ThreadPoolExecutor(4) as pool:
        results = [pool.submit(store.get, A, "n", make), *(pool.submit(ask) for _ in range(3))]
        assert all(same(result.result(20), adapter()) for result in results)
    assert len(calls) == 1


def test_another_process_that_was_faster_is_not_replaced(store: MergedStore, folder: Path) -> None:
    def make() -> AdapterWeights:
        MergedStore(folder, ROOM).get(A, "n", adapter)  # meanwhile, elsewhere
        os.utime(folder / A / "sha256", ns=(7, 7))
        return adapter()

    assert same(store.get(A, "n", make), adapter())
    assert (folder / A / "sha256").stat().st_mtime_ns == 7


# Three children, forked after the imports, ask for the same few adapters again and again; with room for about two of
# them, adapters are removed all the time. One child never ends by itself.
WORKERS = """
import os, signal, sys
from pathlib import Path
import torch
from loraretriever.compose.merged import MergedStore
from loraretriever.types import AdapterWeights, LoraPair

def make(number):
    pair = LoraPair(torch.full((2, 3), float(number)), torch.ones(3, 2), 1.0)
    return AdapterWeights("made", "", {"m": pair})

def work(rounds):
    store = MergedStore(Path(sys.argv[1]), int(sys.argv[2]))
    for i in range(rounds):
        number = i * 7 % 5
        found = store.get(f"{number:064x}", "n", lambda: make(number))
        assert (found.modules["m"].a == number).all() and found.modules["m"].scaling == 1

def start(rounds):
    child = os.fork()
    if child == 0:
        failed = 1
        try:
            work(rounds)
            failed = 0
        finally:
            os._exit(failed)
    return child

children = [start(40), start(40), start(10**9)]
for child in children[:2]:
    print(os.waitpid(child, 0)[1], flush=True)
os.kill(children[2], signal.SIGKILL)
print(os.waitpid(children[2], 0)[1], flush=True)
"""


def test_processes_share_a_folder_and_one_is_killed(folder: Path) -> None:
    room = 2000
    command = [sys.executable, "-c", WORKERS, str(folder), str(room)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    assert done.stdout.split() == ["0", "0", str(int(signal.SIGKILL))]
    store = MergedStore(folder, room)
    store.get(A, "n", adapter)
    assert not unfinished(folder), "what the killed one left is swept"
    assert A in entries(folder) and sum(size(folder / name) for name in entries(folder)) <= room
    for name in entries(folder):
        store.get(name, "n", never)


def test_leftovers_of_killed_writers_are_swept_those_of_others_are_not(store: MergedStore, folder: Path) -> None:
    left = folder / "staging" / "unfinished-x" / A
    left.mkdir(parents=True)
    (left / "adapter_config.json").write_text("{")

    with merged.staging_folder(folder) as alive:  # sweeps
        assert unfinished(folder) == [alive]
        store.get(A, "n", adapter)
        assert unfinished(folder) == [alive]
    assert entries(folder) == {A} and not unfinished(folder)
