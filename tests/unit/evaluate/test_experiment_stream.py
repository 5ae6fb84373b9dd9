"""The stream of prompts, what each setting excludes, and answers that survive a kill."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from loraretriever.errors import InvalidInputError
from loraretriever.evaluate.experiment.answers import Answer, AnswerStore, composition_key
from loraretriever.evaluate.experiment.similarity import weight_cosines
from loraretriever.evaluate.experiment.stream import Catalogue, make_catalogue, make_stream, read_prompts, read_split
from loraretriever.evaluate.tasks import Example
from loraretriever.pool import Pool
from loraretriever.types import AdapterWeights, Composition
from tiny import write_peft_folder

CATALOGUE = Catalogue(
    {"snli-a": "snli", "snli-b": "snli", "qnli-a": "qnli", "sql": "wikisql", "own": "unknown"},
    {"snli": "inference", "qnli": "inference", "wikisql": "code"},
)


def write_split(folder: Path, split: str, counts: dict[str, int]) -> Path:
    (folder / split).mkdir(parents=True, exist_ok=True)
    for task, count in counts.items():
        rows = [
            {"inputs": f"{task} {i}", "targets": f"yes {i}", "task": task, "domain": f"d-{task}", "metric": "em"}
            for i in range(count)
        ]
        (folder / split / f"{task}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_settings_exclude_own_adapters_or_the_whole_domain() -> None:
    assert CATALOGUE.excluded("snli", "iid") == frozenset()
    assert CATALOGUE.excluded("snli", "ood") == {"snli-a", "snli-b"}
    assert CATALOGUE.excluded("snli", "strict_ood") == {"snli-a", "snli-b", "qnli-a"}
    assert CATALOGUE.excluded("wikisql", "strict_ood") == {"sql"}
    assert CATALOGUE.adapters_of("snli") == ("snli-a", "snli-b")


def test_catalogue_reads_the_task_from_the_training_record_or_else_the_name(tmp_path: Path) -> None:
    for name in ("sql", "snli-r4"):
        write_peft_folder(tmp_path / name)
    (tmp_path / "snli-r4" / "training.json").write_text('{"task": "snli", "domain": "inference"}')
    with Pool.open(tmp_path) as pool:
        catalogue = make_catalogue(pool.list(), {"sql": "code"})
    assert catalogue.tasks == {"sql": "sql", "snli-r4": "snli"}
    assert catalogue.domains == {"sql": "code", "snli": "inference"}


def test_stream_is_mixed_seeded_and_bounded(tmp_path: Path) -> None:
    tasks = read_split(write_split(tmp_path, "test", {"sql": 9, "snli": 5, "alone": 3}), "test")
    own = {"sql": "sql", "snli": "snli-a"}
    stream = make_stream(tasks, own, 4, seed=1)
    assert [prompt.task for prompt in stream].count("sql") == 4
    assert {prompt.task for prompt in stream} == {"sql", "snli"}
    assert stream == make_stream(tasks, own, 4, seed=1)
    assert stream != make_stream(tasks, own, 4, seed=2)
    order = [prompt.task for prompt in stream]
    assert order != sorted(order) and order != sorted(order, reverse=True)
    prompt = stream[0]
    place = int(prompt.id.split("/")[1])
    assert tasks[prompt.task][place].inputs == prompt.inputs and prompt.own == own[prompt.task]


def test_stream_without_an_adapter_for_its_tasks_is_refused(tmp_path: Path) -> None:
    tasks = read_split(write_split(tmp_path, "test", {"alone": 3}), "test")
    with pytest.raises(InvalidInputError, match="no adapter of the pool is for one of the tasks alone"):
        make_stream(tasks, {}, 4, seed=0)
    with pytest.raises(InvalidInputError, match="has no task files"):
        read_split(tmp_path, "validation")


def test_other_prompts_take_domain_and_metric_from_their_task(tmp_path: Path) -> None:
    like = {"sql": [Example("a", "b", "sql", "code", "bleu")]}
    file = tmp_path / "new.jsonl"
    file.write_text('{"inputs": "x", "targets": "y", "task": "sql"}\n')
    assert read_prompts([file], like)["sql"] == [Example("x", "y", "sql", "code", "bleu")]
    file.write_text('{"inputs": "x", "targets": "y", "task": "other"}\n')
    with pytest.raises(InvalidInputError, match=r"new.jsonl:1 is of the task 'other' without a domain"):
        read_prompts([file], like)
    file.write_text('{"inputs": "x", "task": "sql"}\n')
    with pytest.raises(InvalidInputError, match="lacks one of inputs, targets, task"):
        read_prompts([file], like)


def test_answers_are_found_again_and_a_torn_line_is_made_anew(tmp_path: Path) -> None:
    one, two = Answer("snli/1", "sql", "yes\nno", 3), Answer("snli/2", "sql", "ä", 1)
    store = AnswerStore(tmp_path, {"base_model": "m"})
    store.add([one, two])
    file = tmp_path / "answers.jsonl"
    whole = file.read_bytes()
    file.write_bytes(whole[:-4])  # killed while it wrote the second
    again = AnswerStore(tmp_path, {"base_model": "m"})
    assert again.get("snli/1", "sql") == one
    assert again.get("snli/2", "sql") is None
    again.add([two])
    assert file.read_bytes() == whole
    assert AnswerStore(tmp_path, {"base_model": "m"}).get("snli/2", "sql") == two


def test_answers_of_another_run_are_not_mixed_in(tmp_path: Path) -> None:
    AnswerStore(tmp_path, {"base_model": "m", "pool": "1"})
    with pytest.raises(InvalidInputError, match="differs in pool"):
        AnswerStore(tmp_path, {"base_model": "m", "pool": "2"})


def test_compositions_that_differ_in_any_digit_have_answers_of_their_own() -> None:
    one = Composition("mixture", ("a", "b"), (0.1 + 0.2, 0.7))
    assert composition_key(one) != composition_key(replace(one, weights=(0.3, 0.7)))
    assert composition_key(one) != composition_key(replace(one, strategy="fusion"))


def test_weight_cosines_are_those_of_the_whole_updates(tmp_path: Path) -> None:
    names = ["a", "b", "c"]
    write_peft_folder(tmp_path / "a", seed=0, rank=4)
    write_peft_folder(tmp_path / "b", seed=1, rank=2)
    write_peft_folder(tmp_path / "c", seed=2, targets=("q_proj", "up_proj"))
    with Pool.open(tmp_path) as pool:
        adapters: dict[str, AdapterWeights] = {name: pool.weights(name) for name in names}
    modules = sorted({module for each in adapters.values() for module in each.modules})

    def flat(name: str, module: str) -> np.ndarray:
        shape = next(
            (p.b.shape[0], p.a.shape[1]) for x in adapters.values() for m, p in x.modules.items() if m == module
        )
        pair = adapters[name].modules.get(module)
        if pair is None:
            return np.zeros(shape).ravel()
        return (pair.scaling * pair.b.double() @ pair.a.double()).numpy().ravel()

    vectors = [np.concatenate([flat(name, module) for module in modules]) for name in names]
    expected = [[x @ y / np.linalg.norm(x) / np.linalg.norm(y) for y in vectors] for x in vectors]
    np.testing.assert_allclose(weight_cosines(adapters, names), expected, atol=1e-10)
