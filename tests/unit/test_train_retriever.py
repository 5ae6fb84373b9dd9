from __future__ import annotations

import dataclasses
import fcntl
import json
import random
import shutil
import sys
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from loraretriever.errors import InvalidInputError, LoraRetrieverError, MissingExtraError
from loraretriever.retrieve import MeanIndex, SentenceEncoder
from loraretriever.train import contrastive
from loraretriever.train.pairs import owners_of, plan_epochs, split_samples
from loraretriever.train.retriever import RetrieverTraining, read_task_samples, train_retriever
from loraretriever.train.trained import Epoch, TrainedRetriever
from tiny_text import write_encoder

# One letter tells the tasks apart; a random encoder hardly sees it among the others.
NOISE = random.Random(0)
SAMPLES = {
    f"task-{letter}": ["".join(NOISE.choices("uvwxyz ", k=NOISE.randint(5, 40))) + letter + str(i) for i in range(8)]
    for letter in "abcdef"
}
SHARED = {"one": ["a", "b", "c", "both"], "two": ["d", "e", "f", "both"], "three": ["g", "h", "i"]}


class KilledError(Exception):
    """Stands for the end of a process in the middle of a training."""


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_encoder(tmp_path_factory.mktemp("encoder"))


@pytest.fixture
def config(encoder: Path) -> RetrieverTraining:
    return RetrieverTraining(
        encoder=str(encoder), instruction="task: ", task_share=0.7, epochs=3, batch_size=4, learning_rate=3e-3
    )


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def same(first: Path, second: Path) -> bool:
    one, other = weights(first), weights(second)
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def figures(result: TrainedRetriever) -> list[Epoch]:
    return [dataclasses.replace(epoch, seconds=0.0) for epoch in result.epochs]


# Which tasks and texts


@pytest.mark.parametrize(("share", "trained"), [(0.4, 2), (0.01, 2), (0.7, 4), (1.0, 6)])
def test_a_share_of_the_tasks_is_trained(share: float, trained: int) -> None:
    split = split_samples(SAMPLES, share, None, 0.25, 1)
    assert len(split.trained) == trained
    assert set(split.trained) | set(split.held_out) == set(SAMPLES) and not set(split.trained) & set(split.held_out)
    assert all(len(split.training[name]) == 6 for name in split.trained)
    assert len(split.validation) == 2 * trained + 8 * (6 - trained)
    assert split == split_samples(SAMPLES, share, None, 0.25, 1)
    if share < 1:
        assert {split_samples(SAMPLES, share, None, 0.25, seed).trained for seed in range(9)} != {split.trained}


def test_no_text_is_both_trained_on_and_validated_with() -> None:
    for seed in range(20):
        split = split_samples(SHARED, 1.0, None, 0.34, seed)
        trained = {text for texts in split.training.values() for text in texts}
        assert not trained & {text for _, text in split.validation}
    split = split_samples(SHARED, 0.4, ["two"], 0.25, 0)
    assert split.held_out == ("two",) and "both" not in split.training["one"]


def test_owners_are_all_tasks_that_have_a_text() -> None:
    assert owners_of(SHARED)["both"] == {"one", "two"} and owners_of(SHARED)["a"] == {"one"}


# Batches


def check_batches(plan: list[list[list[Any]]], owners: Mapping[str, frozenset[str]], batch_size: int) -> None:
    for epoch in plan:
        for batch in epoch:
            assert len(batch) <= batch_size
            for row in batch:
                anchor, positive, *_ = row.texts
                assert anchor != positive and owners[anchor] & owners[positive]
                contrasted = [text for other in batch for text in other.texts[1 if other is not row else 2 :]]
                assert all(not owners[anchor] & owners[text] for text in contrasted)


@pytest.mark.parametrize("negatives", [0, 1, 3])
@pytest.mark.parametrize("batch_size", [2, 4, 32])
@pytest.mark.parametrize("samples", [SAMPLES, SHARED, {**SAMPLES, "large": [f"large {i}" for i in range(50)]}])
def test_no_anchor_is_contrasted_with_its_own_task(
    samples: Mapping[str, Sequence[str]], batch_size: int, negatives: int
) -> None:
    owners = owners_of(samples)
    near = {text: [other for other in owners if not owners[other] & owners[text]][:5] for text in owners}
    plan = plan_epochs(samples, owners, near, negatives, batch_size, 3, 0)
    check_batches(plan, owners, batch_size)
    assert len(plan) == 3 and len({len(epoch) for epoch in plan}) == 1
    assert all(len(row.texts) == 2 + negatives for epoch in plan for batch in epoch for row in batch)
    assert plan[0] != plan[1] and plan == plan_epochs(samples, owners, near, negatives, batch_size, 3, 0)


def test_each_text_is_an_anchor_once_in_an_epoch() -> None:
    plan = plan_epochs(SAMPLES, owners_of(SAMPLES), {}, 0, 6, 2, 0)
    for epoch in plan:
        anchors = [row.texts[0] for batch in epoch for row in batch]
        assert sorted(anchors) == sorted(text for texts in SAMPLES.values() for text in texts)
        assert all(len(batch) == 6 for batch in epoch), "balanced tasks fill their batches"


def test_tasks_that_share_all_texts_cannot_be_told_apart() -> None:
    samples = {"one": ["a", "b", "c"], "two": ["a", "b", "c"]}
    owners = owners_of(samples)
    for negatives in (0, 1):
        with pytest.raises(InvalidInputError, match="told apart"):
            plan_epochs(samples, owners, {text: [] for text in owners}, negatives, 4, 1, 0)


def test_hard_negatives_are_the_nearest_texts_of_other_tasks() -> None:
    samples = {**SAMPLES, **SHARED}
    owners = owners_of(samples)
    texts = sorted(owners)
    vectors = np.random.default_rng(0).normal(size=(len(texts), 8)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    near = contrastive.mine_near(texts, vectors, owners, 3)
    for text, vector in zip(texts, vectors, strict=True):
        others = [i for i, other in enumerate(texts) if not owners[other] & owners[text]]
        others.sort(key=lambda i, vector=vector: -float(vectors[i] @ vector))
        assert near[text] == [texts[i] for i in others[:3]]


# Validation and the encoder's pass


@pytest.mark.parametrize("samples", [SAMPLES, {**SAMPLES, **SHARED}])
def test_ranks_are_those_of_an_index_without_the_query(samples: Mapping[str, Sequence[str]]) -> None:
    queries = [(name, text) for name, texts in samples.items() for text in texts]
    validation = contrastive.Validation(samples, queries, ["task-b"])
    vectors = np.random.default_rng(1).normal(size=(len(validation.texts), 8)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    of = dict(zip(validation.texts, vectors, strict=True))
    expected = []
    for name, query in queries:
        index = MeanIndex({n: np.stack([of[t] for t in texts if t != query]) for n, texts in samples.items()})
        (hits,) = index.search(of[query][None], len(samples))
        expected.append(1 + [hit.adapter for hit in hits].index(name))
    ranks = validation.ranks(vectors)
    assert ranks.tolist() == expected
    found = validation.figures(vectors)
    held_out = np.array([rank for rank, (name, _) in zip(expected, queries, strict=True) if name == "task-b"])
    assert found["mrr"] == pytest.approx(np.mean(1 / np.array(expected)))
    assert found["held_out_top3"] == pytest.approx(np.mean(held_out <= 3)) and found["held_out_queries"] == 8


def test_chunks_of_similar_length_give_the_same_embeddings(encoder: Path) -> None:
    model = contrastive.load_model(str(encoder), "cpu", "", None).eval()
    texts = ["word " * (i * 7 % 11) + "end" for i in range(21)]
    with torch.no_grad():
        whole = model(model.preprocess(texts))["sentence_embedding"]
        chunked = contrastive._embed_by_length(model, model.preprocess(texts), chunk=4)
    assert torch.allclose(whole, chunked, atol=1e-5)


def test_the_loss_is_the_softmax_of_the_paper(encoder: Path) -> None:
    model = contrastive.load_model(str(encoder), "cpu", "", None).eval()
    columns = [["aaa", "bbb"], ["aa", "bb"], ["ccc", "ddd"]]
    loss = contrastive._RankingLoss(model, scale=1 / 0.1)([model.preprocess(column) for column in columns], None)
    anchors, positives, negatives = (contrastive.encode(model, column, "") for column in columns)
    exps = np.exp(anchors @ np.concatenate([positives, negatives]).T / 0.1)
    assert loss.item() == pytest.approx(np.mean([-np.log(exps[i, i] / exps[i].sum()) for i in range(2)]), abs=1e-4)


# The training


def test_a_trained_retriever_is_better_and_can_be_loaded(
    config: RetrieverTraining, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    steps: list[tuple[int, int]] = []
    told: list[Epoch] = []
    capfd.readouterr()
    result = train_retriever(
        SAMPLES, tmp_path / "out", config, lambda step, total: steps.append((step, total)), told.append
    )
    assert capfd.readouterr().out == ""
    assert result.folder == tmp_path / "out" and [path.name for path in tmp_path.iterdir()] == ["out"]
    assert tuple(told) == result.epochs and [epoch.epoch for epoch in told] == list(range(len(told)))
    assert all(after == (before[0] + 1, before[1]) for before, after in pairwise(steps))
    best = result.epochs[result.best_epoch]
    assert best.mrr == max(epoch.mrr for epoch in result.epochs[1:]) > result.epochs[0].mrr
    assert best.loss is not None and best.trained is not None and best.held_out is not None
    assert best.held_out.queries == 8 * len(result.held_out_tasks) == 16

    record = json.loads((result.folder / "loraretriever.json").read_text())
    assert record["encoder"] == config.encoder and record["instruction"] == "task: " and record["seed"] == 0
    assert len(record["encoder_sha256"]) == len(record["samples_sha256"]) == 64
    assert record["settings"]["hard_negatives"] == config.hard_negatives
    assert tuple(record["trained_tasks"]) == result.trained_tasks and len(record["epochs"]) == len(told)
    assert {"torch", "sentence-transformers", "loraretriever"} <= set(record["versions"])
    card = (result.folder / "README.md").read_text()
    assert "`task: `" in card and f"{best.held_out.top1:.3f}" in card

    # What is loaded ranks as the validation did.
    trained = SentenceEncoder(str(result.folder), "task: ")
    split = split_samples(SAMPLES, 0.7, None, 0.2, 0)
    validation = contrastive.Validation(SAMPLES, split.validation, split.held_out)
    assert validation.figures(trained.encode(validation.texts))["mrr"] == pytest.approx(best.mrr)


def test_bfloat16_max_tokens_and_no_instruction(config: RetrieverTraining, tmp_path: Path) -> None:
    config = dataclasses.replace(config, dtype="bfloat16", max_tokens=32, instruction="", hard_negatives=0, epochs=1)
    result = train_retriever(SAMPLES, tmp_path / "out", config)
    model = contrastive.load_model(str(result.folder), "cpu", "", None)
    assert model.max_seq_length == 32 and model.default_prompt_name is None
    assert all(tensor.dtype in (torch.float32, torch.int64) for tensor in model.state_dict().values())


def test_held_out_tasks_can_be_named(config: RetrieverTraining, tmp_path: Path) -> None:
    config = dataclasses.replace(config, held_out_tasks=("task-a",), epochs=1)
    result = train_retriever(SAMPLES, tmp_path / "out", config)
    assert result.held_out_tasks == ("task-a",) and len(result.trained_tasks) == 5


def test_training_stops_when_nothing_gets_better(config: RetrieverTraining, tmp_path: Path) -> None:
    config = dataclasses.replace(config, epochs=9, patience=2, learning_rate=1e-12)
    result = train_retriever(SAMPLES, tmp_path / "out", config)
    assert result.best_epoch == 1 and len(result.epochs) == 1 + 3


# Interruptions


def test_a_training_that_was_stopped_goes_on_to_the_same_weights(config: RetrieverTraining, tmp_path: Path) -> None:
    whole = train_retriever(SAMPLES, tmp_path / "whole", config)
    total = []

    def stop(step: int, steps: int) -> None:
        total.append(steps)
        if step == steps // 3 + 2:  # in the second epoch
            raise KilledError

    with pytest.raises(KilledError):
        train_retriever(SAMPLES, tmp_path / "stopped", config, stop)
    assert not (tmp_path / "stopped").exists()
    begun: list[int] = []
    told: list[Epoch] = []
    resumed = train_retriever(
        SAMPLES, tmp_path / "stopped", config, lambda step, steps: begun.append(step), told.append
    )
    assert begun[0] == total[0] // 3, "it goes on after the first epoch"
    assert [epoch.epoch for epoch in told] == [2, 3]
    assert figures(resumed) == figures(whole) and same(resumed.folder, whole.folder)
    assert resumed.seconds >= resumed.epochs[1].seconds > 0
    assert not (tmp_path / "stopped.part").exists()


def test_what_is_trained_is_not_trained_again(
    config: RetrieverTraining, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*args: object) -> None:
        raise KilledError

    config = dataclasses.replace(config, epochs=1)
    with monkeypatch.context() as patched:
        patched.setattr("loraretriever.train.retriever.write_record", killed)
        with pytest.raises(KilledError):
            train_retriever(SAMPLES, tmp_path / "out", config)
    result = train_retriever(SAMPLES, tmp_path / "out", config, killed, killed)
    assert result.best_epoch == 1
    # Killed after the renaming, before the rest was cleared up.
    (tmp_path / "out.part").mkdir()
    assert train_retriever(SAMPLES, tmp_path / "out", config, killed, killed) == result
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    with pytest.raises(InvalidInputError, match="exists; expected a new folder"):
        train_retriever(SAMPLES, tmp_path / "out", config)


@pytest.fixture
def stopped(config: RetrieverTraining, tmp_path: Path) -> Path:
    """The output of a training that was stopped in its second epoch."""

    def stop(step: int, steps: int) -> None:
        if step == steps // 3 + 1:
            raise KilledError

    with pytest.raises(KilledError):
        train_retriever(SAMPLES, tmp_path / "out", config, stop)
    return tmp_path / "out"


def test_other_settings_samples_or_weights_are_refused(
    config: RetrieverTraining, stopped: Path, encoder: Path, tmp_path: Path
) -> None:
    other = dataclasses.replace(config, learning_rate=1e-5)
    with pytest.raises(InvalidInputError, match=r"learning_rate is 1e-05, was 0.003\. .*--restart"):
        train_retriever(SAMPLES, stopped, other)
    with pytest.raises(InvalidInputError, match="samples_sha256 is"):
        train_retriever({**SAMPLES, "more": ["one more", "and another"]}, stopped, config)
    kept = tmp_path / "kept"
    shutil.copytree(encoder, kept)
    try:
        shutil.copytree(write_encoder(tmp_path / "other", seed=1), encoder, dirs_exist_ok=True)
        with pytest.raises(InvalidInputError, match="encoder_sha256 is"):
            train_retriever(SAMPLES, stopped, config)
    finally:
        shutil.copytree(kept, encoder, dirs_exist_ok=True)
    result = train_retriever(SAMPLES, stopped, dataclasses.replace(other, epochs=1), restart=True)
    assert [epoch.epoch for epoch in result.epochs] == [0, 1]


def test_a_checkpoint_that_was_not_finished_is_left_out(config: RetrieverTraining, stopped: Path) -> None:
    part = stopped.with_name("out.part")
    (checkpoint,) = part.glob("checkpoint-*")
    shutil.copytree(checkpoint, part / "checkpoint-999")
    (part / "checkpoint-999" / "trainer_state.json").write_text('{"log_history": [')
    (part / "model").mkdir()
    begun: list[int] = []
    train_retriever(SAMPLES, stopped, config, lambda step, steps: begun.append(step))
    assert begun[0] == int(checkpoint.name.removeprefix("checkpoint-"))


def test_two_trainings_do_not_share_an_output(config: RetrieverTraining, stopped: Path) -> None:
    with (stopped.with_name("out.part") / "lock").open("a") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        with pytest.raises(LoraRetrieverError, match="another process is training"):
            train_retriever(SAMPLES, stopped, config)


def test_a_foreign_folder_is_left_alone(config: RetrieverTraining, tmp_path: Path) -> None:
    (tmp_path / "out.part").mkdir()
    (tmp_path / "out.part" / "thesis.txt").write_text("years of work")
    with pytest.raises(InvalidInputError, match="no unfinished training"):
        train_retriever(SAMPLES, tmp_path / "out", config, restart=True)
    assert (tmp_path / "out.part" / "thesis.txt").exists()


# Bad input


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        ({}, "samples of 0 adapters; expected at least two"),
        ({"one": ["a", "b", "c"]}, "samples of 1 adapters; expected at least two"),
        ({**SAMPLES, "few": ["a"]}, "'few' has 1 different samples; expected at least two .*pool disable few"),
        ({**SAMPLES, "same": ["a", "a"]}, "'same' has 1 different samples"),
        ({**SAMPLES, "empty": ["a", " ", "b"]}, "sample 2 of 'empty' is ' '; expected some text"),
        ({"one": ["a", "b"], "two": ["c", "d"]}, "expected one with three, to validate with"),
    ],
)
def test_samples_that_cannot_be_used(samples: dict[str, list[str]], message: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match=message):
        train_retriever(samples, tmp_path / "out", RetrieverTraining(task_share=1.0))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"task_share": 0.0}, "task_share is 0.0; expected a number above 0 and at most 1"),
        ({"task_share": 1.1}, "task_share is 1.1"),
        ({"task_share": float("nan")}, "task_share is nan"),
        ({"temperature": 0.0}, "temperature is 0.0; expected a positive number"),
        ({"learning_rate": float("inf")}, "learning_rate is inf"),
        ({"epochs": 0}, "epochs is 0; expected at least 1"),
        ({"batch_size": 1}, "batch_size is 1; expected at least 2"),
        ({"hard_negatives": -1}, "hard_negatives is -1"),
        ({"patience": 0}, "patience is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"device": "cuda:1"}, "device is 'cuda:1'; expected .*CUDA_VISIBLE_DEVICES"),
        ({"dtype": "float16"}, "dtype is 'float16'"),
        ({"held_out_tasks": ("none",)}, "held-out task 'none' has no samples; expected one of task-a, task-b"),
        ({"held_out_tasks": tuple(SAMPLES)[1:]}, "1 of 6 tasks would be trained on; expected at least two"),
        ({"max_tokens": 9999}, "max_tokens is 9999; expected at most 256"),
        ({"max_tokens": 20}, "max_tokens is 20; expected more than 52"),
    ],
)
def test_settings_that_cannot_be_used(settings: dict[str, Any], message: str, encoder: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match=message):
        train_retriever(SAMPLES, tmp_path / "out", RetrieverTraining(**{"encoder": str(encoder), **settings}))
    assert list(tmp_path.iterdir()) == []


def test_siblings_leave_something_to_train_on(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="'one' has 1 samples to train on.*no other adapter shares"):
        train_retriever(
            {"one": ["a", "b", "c"], "two": ["b", "c", "d"], "three": ["e", "f", "g"]},
            tmp_path / "out",
            RetrieverTraining(held_out_tasks=("two",)),
        )


def test_samples_are_read_by_adapter(tmp_path: Path) -> None:
    file = tmp_path / "samples.jsonl"
    file.write_text('{"adapter": "b", "inputs": "1", "domain": "d"}\n{"adapter": "a", "inputs": "2"}\n\n')
    assert read_task_samples(file) == {"b": ["1"], "a": ["2"]}
    file.write_text('{"adapter": "b", "inputs": "1"}\n{"adapter": "b", "inputs": ""}\n')
    with pytest.raises(InvalidInputError, match="samples.jsonl:2: inputs is ''; expected some text"):
        read_task_samples(file)
    file.write_text('{"inputs": "1"}\n')
    with pytest.raises(InvalidInputError, match="samples.jsonl:1: adapter is None"):
        read_task_samples(file)


def test_a_missing_package_names_the_extra(
    config: RetrieverTraining, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.delitem(sys.modules, "loraretriever.train.contrastive")
    monkeypatch.delattr("loraretriever.train.contrastive")
    with pytest.raises(MissingExtraError, match=r"'datasets'.*pip install 'loraretriever\[train\]'"):
        train_retriever(SAMPLES, tmp_path / "out", config)
