from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from loraretriever.evaluate.tasks import Example
from loraretriever.models import BaseModel
from loraretriever.pool import Pool
from loraretriever.train.adapters import TrainingSettings, train_adapter
from loraretriever.train.steps import StepsResult
from tiny import TINY_BASE, TINY_SPEC, tiny_llama
from tiny_text import tiny_tokenizer

SETTINGS = TrainingSettings(rank=4, alpha=8, batch_size=4, examples=40, epochs=2, learning_rate=1e-2)
EXAMPLES = [Example(f"{'word ' * (i % 5)}{i}", "yes" if i % 2 else "no", "t", "d", "em") for i in range(40)]


class KilledError(Exception):
    """Stands for the end of a process in the middle of a training."""


@pytest.fixture
def base() -> BaseModel:
    return BaseModel(TINY_BASE, tiny_llama(), tiny_tokenizer())


def train(base: BaseModel, folder: Path, stop_at: int | None = None) -> StepsResult:
    def on_step(step: int, steps: int, loss: float) -> None:
        if step == stop_at:
            raise KilledError

    return train_adapter(base, EXAMPLES, folder, SETTINGS, on_step, save_every=3)


def test_a_training_that_was_stopped_goes_on_to_the_same_weights(base: BaseModel, tmp_path: Path) -> None:
    whole = train(base, tmp_path / "whole")
    assert whole.steps == 20 and whole.last_loss < whole.first_loss
    with pytest.raises(KilledError):
        train(base, tmp_path / "stopped", stop_at=8)
    assert not (tmp_path / "stopped" / "adapter_model.safetensors").exists()
    resumed = train(base, tmp_path / "stopped")
    assert (resumed.steps, resumed.first_loss, resumed.last_loss) == (20, whole.first_loss, whole.last_loss)
    files = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "stopped")]
    assert files[0].keys() == files[1].keys()
    assert all(torch.equal(files[0][key], files[1][key]) for key in files[0])
    assert not (tmp_path / "stopped" / "checkpoint.pt").exists()


def test_the_base_model_is_left_as_it_was(base: BaseModel, tmp_path: Path) -> None:
    before = {key: value.clone() for key, value in base.model.state_dict().items()}
    train(base, tmp_path / "adapter")
    after = base.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_what_was_trained_is_admitted(base: BaseModel, tmp_path: Path) -> None:
    train(base, tmp_path / "adapter")
    with Pool.create(tmp_path / "pool", TINY_BASE, spec=TINY_SPEC) as pool:
        adapter = pool.add(tmp_path / "adapter", samples=["word 1"]).adapter
        assert adapter.ranks == (4,) and set(adapter.targets) == {"q_proj", "k_proj", "v_proj", "o_proj"}
        assert all(pair.scaling == 2.0 for pair in pool.weights("adapter").modules.values())
