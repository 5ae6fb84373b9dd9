from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from loraretriever.errors import ModelLoadError
from loraretriever.retrieve import SentenceEncoder
from tiny_text import write_encoder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_encoder(tmp_path_factory.mktemp("encoder"))


def test_unit_vectors_in_order(folder: Path) -> None:
    encoder = SentenceEncoder(str(folder), batch_size=2)
    texts = ["one", "a much longer text than the others", "two", "three"]
    vectors = encoder.encode(texts)
    assert vectors.shape == (4, 32) and vectors.dtype == np.float32
    assert np.linalg.norm(vectors, axis=1) == pytest.approx(1.0, abs=1e-5)
    for text, vector in zip(texts, vectors, strict=True):
        assert encoder.encode([text])[0] == pytest.approx(vector, abs=1e-5)


def test_the_instruction_is_put_before_the_text(folder: Path) -> None:
    with_instruction = SentenceEncoder(str(folder), instruction="task: ").encode(["one"])
    assert with_instruction == pytest.approx(
        SentenceEncoder(str(folder), instruction="").encode(["task: one"]), abs=1e-6
    )


def test_tags_tell_encoders_apart(folder: Path, tmp_path: Path) -> None:
    tag = SentenceEncoder(str(folder)).tag
    assert tag == SentenceEncoder(str(folder)).tag
    assert tag != SentenceEncoder(str(folder), instruction="").tag
    assert tag.split("#")[1] != SentenceEncoder(str(write_encoder(tmp_path, seed=1))).tag.split("#")[1]


def test_a_folder_without_a_model_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match="sentence-transformers format"):
        SentenceEncoder(str(tmp_path))
