"""The pool of the preset `paper48`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from safetensors.numpy import load_file

from loraretriever.errors import AdmissionError, InvalidInputError, PoolError
from loraretriever.evaluate.experiment import paper48_pool
from loraretriever.evaluate.experiment.paper48 import Preset, load_paper48
from loraretriever.evaluate.experiment.paper48_pool import CONVERT, make_pool
from loraretriever.evaluate.experiment.paper48_tables import TASKS
from loraretriever.evaluate.experiment.stream import make_catalogue
from loraretriever.pool import Pool
from paper_fakes import write_fake_adapters, write_fake_paper

ROOT = Path(__file__).parents[3]
SOME = ("dart", "sst2", "wmt14_enfr")


@pytest.fixture
def preset(tmp_path: Path) -> Preset:
    return load_paper48(write_fake_paper(tmp_path / "paper", SOME, samples=4))


@pytest.fixture
def adapters(tmp_path: Path) -> Path:
    return write_fake_adapters(tmp_path / "adapters", SOME)


def test_a_pool_of_all_48(tmp_path: Path) -> None:
    preset = load_paper48(write_fake_paper(tmp_path / "paper"))
    source = write_fake_adapters(tmp_path / "adapters")
    steps: list[None] = []
    folder = make_pool(preset, tmp_path / "pool", source, done=lambda: steps.append(None))
    assert folder == tmp_path / "pool"
    assert len(steps) == 48
    with Pool.open(folder) as pool:
        found = pool.list()
        assert {each.name for each in found} == set(TASKS)
        assert not pool.problems
        assert pool.base_model == "meta-llama/Llama-2-7b-hf"
        assert {(each.ranks, each.targets, each.samples) for each in found} == {((6,), ("q_proj", "v_proj"), 4)}
        assert [each.text for each in pool.samples("drop")] == [each.inputs for each in preset.samples["drop"]]
        catalogue = make_catalogue(found, {})
    assert catalogue.domains == {task: known.domain for task, known in TASKS.items()}
    assert catalogue.excluded("wsc", "strict_ood") == {"wsc", "definite_pronoun_resolution"}


def test_weights_are_those_of_the_source(tmp_path: Path, preset: Preset, adapters: Path) -> None:
    folder = make_pool(preset, tmp_path / "pool", str(adapters))
    for task in SOME:
        copy = load_file(folder / task / "adapter_model.safetensors")
        original = load_file(adapters / f"llama2_7b_lora-{task}" / "adapter_model.safetensors")
        assert copy.keys() == original.keys()
        assert all((copy[name] == original[name]).all() for name in copy)


def test_a_call_that_was_cut_off_is_gone_on_with(tmp_path: Path, preset: Preset, adapters: Path) -> None:
    class Cut(Exception):
        pass

    def cut() -> None:
        raise Cut

    with pytest.raises(Cut):
        make_pool(preset, tmp_path / "pool", adapters, done=cut)
    (tmp_path / "pool" / ".unfinished-x").mkdir()
    assert {each.name for each in (tmp_path / "pool").iterdir()} == {"dart", ".unfinished-x"}
    before = (tmp_path / "pool" / "dart" / "adapter_model.safetensors").stat()
    (adapters / "llama2_7b_lora-dart" / "adapter_model.safetensors").unlink()  # it is not read again
    make_pool(preset, tmp_path / "pool", adapters)
    assert {each.name for each in (tmp_path / "pool").iterdir()} == set(SOME)
    after = (tmp_path / "pool" / "dart" / "adapter_model.safetensors").stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)


def test_samples_follow_the_preset_and_stay_when_they_are_right(tmp_path: Path, preset: Preset, adapters: Path) -> None:
    folder = make_pool(preset, tmp_path / "pool", adapters)
    file = folder / "dart" / "samples.jsonl"
    time = file.stat().st_mtime_ns
    make_pool(preset, folder, adapters)
    assert file.stat().st_mtime_ns == time
    other = load_paper48(write_fake_paper(tmp_path / "other", SOME, samples=2))
    make_pool(other, folder, adapters)
    assert len(file.read_text().splitlines()) == 2


def test_folders_named_as_the_tasks(tmp_path: Path, preset: Preset) -> None:
    source = write_fake_adapters(tmp_path / "short", SOME, prefix="")
    with Pool.open(make_pool(preset, tmp_path / "pool", source)) as pool:
        assert {each.name for each in pool.list()} == set(SOME)


def test_adapters_that_name_other_paths_of_the_base_model(tmp_path: Path, preset: Preset) -> None:
    source = write_fake_adapters(tmp_path / "adapters", SOME[:1], base_model="/data/models/llama2")
    write_fake_adapters(source, SOME[1:])
    folder = make_pool(preset, tmp_path / "pool", source)
    with Pool.open(folder) as pool:
        assert {each.name for each in pool.list()} == set(SOME)
        assert {each.base_model for each in pool.list()} == {"meta-llama/Llama-2-7b-hf"}
    assert json.loads((folder / "dart" / "training.json").read_text())["named_base_model"] == "/data/models/llama2"


def test_a_pool_of_other_adapters_is_not_mixed_with_these(tmp_path: Path, preset: Preset, adapters: Path) -> None:
    folder = make_pool(preset, tmp_path / "pool", adapters)
    others = write_fake_adapters(tmp_path / "others", SOME)
    with pytest.raises(InvalidInputError, match="there already, from .*adapters/llama2_7b_lora-dart.* Name another"):
        make_pool(preset, folder, others)
    (folder / "dart" / "training.json").unlink()
    with pytest.raises(InvalidInputError, match="there already, from None"):
        make_pool(preset, folder, adapters)


def test_adapters_that_are_missing(tmp_path: Path, preset: Preset) -> None:
    source = write_fake_adapters(tmp_path / "adapters", ("sst2",))
    with pytest.raises(InvalidInputError, match=r"lacks the adapters of 2 of 3 tasks \(dart, wmt14_enfr\)"):
        make_pool(preset, tmp_path / "pool", source)
    assert not (tmp_path / "pool").exists()
    for wrong in (tmp_path / "none", "nowhere", "a/b/c"):
        with pytest.raises(InvalidInputError, match="the adapters' source is"):
            make_pool(preset, tmp_path / "pool", wrong)


def to_pickle(folder: Path) -> None:
    """Replace an adapter's weights by the pickle that PEFT once wrote."""
    import torch

    tensors = {name: torch.from_numpy(t) for name, t in load_file(folder / "adapter_model.safetensors").items()}
    torch.save(tensors, folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()


def test_pickles_are_not_opened_and_the_command_converts_them(tmp_path: Path, preset: Preset, adapters: Path) -> None:
    broken = adapters / "llama2_7b_lora-dart"
    before = load_file(broken / "adapter_model.safetensors")
    to_pickle(broken)
    with pytest.raises(AdmissionError, match=r"found adapter_model\.bin, .* convert a copy of it with: python -c"):
        make_pool(preset, tmp_path / "pool", adapters)
    subprocess.run([sys.executable, "-c", CONVERT, str(broken)], check=True)
    folder = make_pool(preset, tmp_path / "pool", adapters)
    after = load_file(folder / "dart" / "adapter_model.safetensors")
    assert after.keys() == before.keys()
    assert all((after[name] == before[name]).all() for name in before)


def test_the_documentation_has_the_same_command() -> None:
    assert f'python -c "{CONVERT}" FOLDER' in (ROOT / "docs" / "paper48.md").read_text(encoding="utf-8")


def test_an_adapter_that_cannot_be_used_is_not_put_into_the_pool(
    tmp_path: Path, preset: Preset, adapters: Path
) -> None:
    file = adapters / "llama2_7b_lora-sst2" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"r": 4}))
    with pytest.raises(AdmissionError, match="expected rank 4") as caught:
        make_pool(preset, tmp_path / "pool", adapters)
    assert "convert" not in str(caught.value)
    assert {each.name for each in (tmp_path / "pool").iterdir()} == {"dart"}


class Hub:
    """Plays the hub: hands out the fakes, and fails when it is told to."""

    def __init__(self, adapters: Path) -> None:
        self.adapters = adapters
        self.asked: list[tuple[str, str | None]] = []
        self.fail: Exception | None = None

    def download(self, source: str, revision: str | None, max_bytes: int) -> Any:
        self.asked.append((source, revision))
        if self.fail:
            raise self.fail
        task = source.rpartition("-")[2]
        return SimpleNamespace(repo=source, commit="c0ffee", folder=self.adapters / f"llama2_7b_lora-{task}")


@pytest.fixture
def hub(adapters: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    hub = Hub(adapters)
    monkeypatch.setattr(paper48_pool, "download_adapter", hub.download)
    return hub


@pytest.mark.parametrize(("source", "prefix"), [("hub", "Styxxxx/llama2_7b_lora-"), ("me/retrained-", "me/retrained-")])
def test_adapters_from_the_hub(tmp_path: Path, preset: Preset, hub: Hub, source: str, prefix: str) -> None:
    folder = make_pool(preset, tmp_path / "pool", source, revision="refs/pr/1")
    assert hub.asked == [(f"{prefix}{task}", "refs/pr/1") for task in SOME]
    record = json.loads((folder / "sst2" / "training.json").read_text())
    assert (record["source"], record["commit"]) == (f"{prefix}sst2", "c0ffee")
    make_pool(preset, folder, source, revision="refs/pr/1")
    assert len(hub.asked) == 3  # nothing is asked for again


def test_a_hub_that_cannot_be_reached(tmp_path: Path, preset: Preset, hub: Hub) -> None:
    hub.fail = PoolError("cannot get it.")
    with pytest.raises(PoolError, match=r"cannot get it\. .*the same command goes on"):
        make_pool(preset, tmp_path / "pool")
    hub.fail = None
    with Pool.open(make_pool(preset, tmp_path / "pool")) as pool:
        assert len(pool.list()) == 3


def test_pickles_on_the_hub(tmp_path: Path, preset: Preset, hub: Hub) -> None:
    hub.fail = AdmissionError("a/b: adapter_model.safetensors is missing; expected a PEFT adapter saved so.")
    with pytest.raises(AdmissionError, match="convert a copy of it with"):
        make_pool(preset, tmp_path / "pool")
    hub.fail = AdmissionError("a/b/adapter_model.safetensors has 3 bytes; expected at most 2.")
    with pytest.raises(AdmissionError, match="at most 2") as caught:
        make_pool(preset, tmp_path / "pool")
    assert "convert" not in str(caught.value)
