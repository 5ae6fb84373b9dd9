from __future__ import annotations

from pathlib import Path

import pytest

from loraretriever.errors import InvalidInputError
from loraretriever.evaluate.metrics import score
from loraretriever.evaluate.tasks import read_examples


@pytest.mark.parametrize(
    ("metric", "answer", "reference", "expected"),
    [
        ("em", " Yes.", "yes", 1.0),
        ("em", "yes", "yes\n\nbecause", 1.0),
        ("em", "no", "yes", 0.0),
        ("rouge", "the cat sat", "the cat sat", 1.0),
        ("rouge", "the cat", "the dog", 0.5),
        ("rouge", "", "the dog", 0.0),
        ("bleu", "the cat sat on the mat", "the cat sat on the mat", 1.0),
        ("bleu", "", "the cat", 0.0),
    ],
)
def test_scores(metric: str, answer: str, reference: str, expected: float) -> None:
    assert score(metric, answer, reference) == pytest.approx(expected)


def test_an_unknown_metric() -> None:
    with pytest.raises(InvalidInputError, match="expected one of em, rouge, bleu"):
        score("accuracy", "a", "b")


@pytest.mark.parametrize(
    "line", ['{"inputs": "a"}', "not json", "[1]", '{"inputs":"a","targets":"b","task":"t","domain":"d","metric":"x"}']
)
def test_bad_task_files_name_the_line(tmp_path: Path, line: str) -> None:
    file = tmp_path / "task.jsonl"
    file.write_text('{"inputs":"a","targets":"b","task":"t","domain":"d","metric":"em"}\n\n' + line + "\n")
    with pytest.raises(InvalidInputError, match=r"task.jsonl:3 "):
        read_examples(file)


def test_a_missing_task_file(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="cannot read"):
        read_examples(tmp_path / "none.jsonl")
