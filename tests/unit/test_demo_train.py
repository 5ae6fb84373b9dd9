from __future__ import annotations

import importlib
import json
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest
import typer

from loraretriever.errors import InvalidInputError
from loraretriever.evaluate.tasks import Example
from loraretriever.models import BaseModel
from loraretriever.pool import Pool
from tiny import TINY_BASE, TINY_SPEC, tiny_llama
from tiny_text import WordEncoder, tiny_tokenizer

DEMO = Path(__file__).parents[2] / "demo"
EXAMPLES = [Example(f"{'word ' * (i % 5)}{i}", "yes" if i % 2 else "no", "snli", "inference", "em") for i in range(320)]
SOURCES = "| task | domain |\n| `snli` | inference | em | a corpus | CC BY 4.0 | 320 / 4 / 0 | Say yes or no. |\n"


@pytest.fixture
def variations(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(DEMO))
    return importlib.import_module("variations")


@pytest.fixture
def train(variations: ModuleType, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """`demo/train.py` with a tiny base model and encoder, and without its changes to the process."""
    module = importlib.import_module("train")
    base = BaseModel(TINY_BASE, tiny_llama(), tiny_tokenizer())
    monkeypatch.setattr(module, "load_base_model", lambda name, dtype: base)
    monkeypatch.setattr(module, "SentenceEncoder", WordEncoder)
    monkeypatch.setattr(module, "keep_freed_memory", lambda: None)
    return module


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    folder = tmp_path / "tasks"
    for split, rows in (("train", EXAMPLES), ("validation", EXAMPLES[:4])):
        (folder / split).mkdir(parents=True)
        lines = [json.dumps({name: getattr(row, name) for name in Example.__slots__}) + "\n" for row in rows]
        (folder / split / "snli.jsonl").write_text("".join(lines))
    (folder / "SOURCES.md").write_text(SOURCES)
    return folder


def test_the_larger_pool_has_near_duplicates_of_every_task_of_the_demo_pool(variations: ModuleType) -> None:
    chosen = variations.large_variations()
    counts = Counter(v.task for v in chosen)
    assert len({v.name for v in chosen}) == len(chosen) == 64
    assert counts.keys() == {folder.name for folder in (DEMO / "pool").iterdir() if (folder / "README.md").exists()}
    assert set(counts.values()) == {3, 4}
    assert len({v.settings.seed for v in chosen}) == 64
    for task in counts:
        shapes = {(v.settings.rank, v.settings.targets) for v in chosen if v.task == task}
        assert len(shapes) == counts[task]
    assert {v.settings.rank for v in chosen} == {4, 6, 8, 16}
    assert all(v.settings.alpha == 2 * v.settings.rank for v in chosen)


def test_a_run_that_is_stopped_covers_the_tasks_evenly(variations: ModuleType) -> None:
    chosen = variations.large_variations()
    for stop in range(1, len(chosen)):
        counts = Counter(v.task for v in chosen[:stop])
        assert max(counts.values()) - min(counts[task] for task in variations.LARGE_TASKS) <= 1


def test_the_table_and_its_subsets_are_the_same_every_time(variations: ModuleType) -> None:
    chosen, again = variations.large_variations(), variations.large_variations()
    assert chosen == again
    assert [v.subset(EXAMPLES) for v in chosen] == [v.subset(list(EXAMPLES)) for v in again]


def test_subsets_of_a_task_are_disjoint_or_overlap_by_half(variations: ModuleType) -> None:
    subsets = [
        {example.inputs for example in v.subset(EXAMPLES)} for v in variations.large_variations() if v.task == "snli"
    ]
    assert [len(subset) for subset in subsets] == [128] * 4
    shared = {(i, j): len(subsets[i] & subsets[j]) for i in range(4) for j in range(i)}
    assert shared == {(1, 0): 0, (2, 0): 64, (2, 1): 64, (3, 0): 0, (3, 1): 64, (3, 2): 0}


def test_subsets_are_not_in_the_order_of_the_file(variations: ModuleType) -> None:
    first = variations.large_variations()[0]
    assert first.subset(EXAMPLES) != EXAMPLES[:128]
    whole = variations.demo_variations()[0]
    assert whole.subset(EXAMPLES) == EXAMPLES


def test_too_few_examples_are_refused(variations: ModuleType) -> None:
    last = variations.large_variations()[-1]
    with pytest.raises(InvalidInputError, match="has 319; expected at least 320"):
        last.subset(EXAMPLES[:319])


def test_the_larger_pool_is_made_and_a_second_run_keeps_what_is_finished(
    train: ModuleType, variations: ModuleType, tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work, target = tmp_path / "work", tmp_path / "out" / "pool"
    trained = []
    whole = train.train_adapter

    def counted(base, examples, folder, settings, show):
        trained.append(folder.name)
        if len(trained) == 3:
            raise KeyboardInterrupt
        return whole(base, examples, folder, settings, show)

    monkeypatch.setattr(train, "train_adapter", counted)
    names = [v.name for v in variations.large_variations() if v.task == "snli"]
    with pytest.raises(KeyboardInterrupt):
        train.main(tasks, work, target, only=["snli"], large=True)
    assert trained == names[:3] and {folder.name for folder in target.iterdir()} == set(names[:2])
    train.main(tasks, work, target, only=["snli"], large=True)
    assert trained == [*names[:3], *names[2:]]

    samples = {name: (target / name / "samples.jsonl").read_text() for name in names}
    assert len(set(samples.values())) == 4
    assert all(text.count("\n") == 20 for text in samples.values())
    with Pool.create(tmp_path / "registry", TINY_BASE, spec=TINY_SPEC) as pool:
        for variation in variations.large_variations():
            if variation.task != "snli":
                continue
            folder = target / variation.name
            record = json.loads((folder / "training.json").read_text())
            assert (record["name"], record["task"], record["domain"]) == (variation.name, "snli", "inference")
            assert record["subset_start"] == variation.start and "base_score" not in record
            card = (folder / "README.md").read_text()
            assert f"# {variation.name}\n" in card and "Score: not measured" in card
            adapter = pool.add(folder).adapter
            assert adapter.ranks == (variation.settings.rank,)
            assert set(adapter.targets) == set(variation.settings.targets)


def test_scores_are_optional_and_the_base_model_is_scored_once_per_task(
    train: ModuleType, variations: ModuleType, tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scored = []

    def fixed_score(model, tokenizer, examples):
        scored.append((type(model).__name__, len(examples)))
        return 0.25

    monkeypatch.setattr(train, "mean_score", fixed_score)
    names = [v.name for v in variations.large_variations() if v.task == "snli"][:2]
    train.main(tasks, tmp_path / "work", tmp_path / "pool", only=names, large=True, score_prompts=3)
    assert [count for _, count in scored] == [3, 3, 3]
    assert [name.startswith("Peft") for name, _ in scored] == [False, True, True]
    card = (tmp_path / "pool" / names[1] / "README.md").read_text()
    assert "(exact match, %; 3 validation prompts, greedy): base model 25.0, with this adapter 25.0." in card


def test_the_demo_pool_gets_only_what_beats_the_base_model(
    train: ModuleType, tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "mean_score", lambda model, tokenizer, examples: 0.25)
    short = train.Variation("snli", "snli", train.large_variations()[0].settings)
    monkeypatch.setattr(train, "demo_variations", lambda: [short])
    train.main(tasks, tmp_path / "work", tmp_path / "pool")
    assert (tmp_path / "work" / "snli" / "adapter_model.safetensors").is_file() and not (tmp_path / "pool").exists()
    monkeypatch.setattr(train, "CLEAR_MARGIN", 0.0)
    train.main(tasks, tmp_path / "work", tmp_path / "pool")
    card = (tmp_path / "pool" / "snli" / "README.md").read_text()
    assert "# snli\n" in card and "made for the demo of LoraRetriever by `demo/train.py`." in card


def test_unknown_names_and_an_unscored_demo_pool_are_refused(train: ModuleType, tasks: Path, tmp_path: Path) -> None:
    with pytest.raises(typer.BadParameter, match="no adapter or task is named poetry"):
        train.main(tasks, tmp_path / "work", tmp_path / "pool", only=["poetry", "snli"], large=True)
    with pytest.raises(typer.BadParameter, match="--score-prompts 0"):
        train.main(tasks, tmp_path / "work", tmp_path / "pool", score_prompts=0)
