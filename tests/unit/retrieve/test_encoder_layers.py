"""The encoder that gives the means of several layers, against transformers' own hidden states."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from loraretriever.retrieve import SentenceEncoder
from loraretriever.retrieve.encoder import _thirds
from tiny_text import tiny_tokenizer, write_encoder

TEXTS = ["one", "a longer text than the others, in order that rows be padded", "two", "three words here", "x" * 90]
STRANGE = ["", " ", "\0", "\ud800", "🙂" * 5, "漢字"]


def write_distilbert(folder: Path, layers: int) -> Path:
    """A transformer that does not go through the forward pass of our own."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
    from transformers import DistilBertConfig, DistilBertModel

    torch.manual_seed(0)
    config = DistilBertConfig(vocab_size=128, dim=32, n_layers=layers, n_heads=2, hidden_dim=32)
    DistilBertModel(config).save_pretrained(folder / "inner")
    tiny_tokenizer(chat=False, padding_side="right").save_pretrained(folder / "inner")
    SentenceTransformer(modules=[Transformer(str(folder / "inner")), Pooling(32)]).save_pretrained(
        str(folder / "encoder")
    )
    return folder / "encoder"


def write(folder: Path, kind: str, layers: int) -> str:
    return str(write_encoder(folder, layers=layers) if kind == "bert" else write_distilbert(folder, layers))


def plain_thirds(folder: Path, texts: list[str], layers: list[int]) -> np.ndarray:
    """Each text alone through transformers: the means of the hidden states after these layers, each of length 1."""
    from transformers import AutoModel

    model = AutoModel.from_pretrained(folder / "inner").eval()
    tokenizer = tiny_tokenizer(chat=False)
    rows = []
    for text in texts:
        with torch.inference_mode():
            ids = torch.tensor([tokenizer(text).input_ids])
            states = model(input_ids=ids, output_hidden_states=True).hidden_states
        means = [states[layer][0].mean(0).numpy() for layer in layers]  # states[0] are the embeddings
        rows.append(np.concatenate([mean / np.linalg.norm(mean) for mean in means]))
    joined = np.stack(rows)
    return np.asarray(joined / np.linalg.norm(joined, axis=1, keepdims=True))


@pytest.mark.parametrize(
    ("kind", "layers", "read"),
    [
        ("bert", 6, [2, 4, 6]),
        ("distilbert", 6, [2, 4, 6]),
        ("bert", 4, [1, 3, 4]),
        ("bert", 2, [1, 2]),
        ("distilbert", 1, [1]),
    ],
)
def test_equals_the_means_of_transformers_own_hidden_states(
    tmp_path: Path, kind: str, layers: int, read: list[int]
) -> None:
    encoder = SentenceEncoder(write(tmp_path, kind, layers), instruction="", batch_size=3, layers="thirds")
    assert (encoder._bert is not None) == (kind == "bert")
    vectors = encoder.encode(TEXTS)
    assert vectors.dtype == np.float32 and vectors.shape == (5, 32 * len(read))
    assert vectors == pytest.approx(plain_thirds(tmp_path, TEXTS, read), abs=1e-5)
    for text, vector in zip(TEXTS, vectors, strict=True):
        assert encoder.encode([text])[0] == pytest.approx(vector, abs=1e-5), "the batch does not matter"
    for part in np.split(vectors, len(read), axis=1):
        assert np.linalg.norm(part, axis=1) == pytest.approx(np.full(5, len(read) ** -0.5), abs=1e-5)
    assert encoder.encode([]).shape == (0, 32 * len(read))


def test_the_layers_after_one_and_two_thirds_and_all() -> None:
    places = {layers: [place + 1 for place in _thirds(layers)] for layers in (1, 2, 3, 6, 12, 24)}
    assert places == {1: [1], 2: [1, 2], 3: [1, 2, 3], 6: [2, 4, 6], 12: [4, 8, 12], 24: [8, 16, 24]}


@pytest.mark.parametrize("kind", ["bert", "distilbert"])
def test_another_reading_is_another_tag(tmp_path: Path, kind: str) -> None:
    folder = write(tmp_path, kind, 3)
    last, thirds = SentenceEncoder(folder), SentenceEncoder(folder, layers="thirds")
    assert last.tag != thirds.tag
    assert last.encode(["a"]).shape == (1, 32) and thirds.encode(["a"]).shape == (1, 96)
    assert thirds.tag == SentenceEncoder(folder, layers="thirds").tag
    assert thirds.tag != SentenceEncoder(folder, layers="thirds", precision="int8").tag


@pytest.mark.parametrize("kind", ["bert", "distilbert"])
def test_int8_and_strange_texts(tmp_path: Path, kind: str) -> None:
    folder = write(tmp_path, kind, 3)
    exact, quick = (SentenceEncoder(folder, layers="thirds", precision=each) for each in ("float32", "int8"))
    vectors = quick.encode(TEXTS + STRANGE)
    assert (vectors * exact.encode(TEXTS + STRANGE)).sum(1).min() > 0.99
    assert np.linalg.norm(vectors, axis=1) == pytest.approx(1.0, abs=1e-5)


def test_a_static_model_has_no_layers(tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding

    torch.manual_seed(0)
    tokenizer = tiny_tokenizer(chat=False).backend_tokenizer
    SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_dim=16)]).save_pretrained(
        str(tmp_path / "static")
    )
    last, thirds = (SentenceEncoder(str(tmp_path / "static"), layers=each) for each in ("last", "thirds"))
    assert last.tag == thirds.tag, "they read alike"
    assert (last.encode(TEXTS) == thirds.encode(TEXTS)).all() and thirds.encode([]).shape == (0, 16)
