from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from loraretriever.errors import InvalidInputError, ModelLoadError
from loraretriever.retrieve import SentenceEncoder
from loraretriever.retrieve.window import CHARACTERS_PER_TOKEN, Window, cut_characters, cut_middle
from tiny_text import tiny_tokenizer, write_encoder

TEXTS = ["one", "a much longer text than the others, in order that rows be padded", "two", "three words here", "x" * 90]
STRANGE = ["", " ", "\0", "a\0b", "\ud800", "ok \udfff ok", "🙂" * 5, "👩‍👩‍👧 é ü 漢字", "\u202e\ufeff"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_encoder(tmp_path_factory.mktemp("encoder"))


def write_variant(folder: Path, source: Path, pooling: str = "mean", model: str = "bert", dense: bool = False) -> str:
    """The encoder in `source` with another pooling, another transformer, or more modules."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Dense, Normalize, Pooling, Transformer
    from transformers import DistilBertConfig, DistilBertModel

    inner = source.parent / "inner"
    if model == "distilbert":
        torch.manual_seed(0)
        inner = folder / "inner"
        config = DistilBertConfig(vocab_size=128, dim=32, n_layers=1, n_heads=2, hidden_dim=32)
        DistilBertModel(config).save_pretrained(inner)
        tiny_tokenizer(chat=False, padding_side="right").save_pretrained(inner)
    modules: list[Any] = [Transformer(str(inner)), Pooling(32, pooling_mode=pooling)]
    if dense:
        torch.manual_seed(1)
        modules += [Dense(32, 8), Normalize()]
    SentenceTransformer(modules=modules).save_pretrained(str(folder / "variant"))
    return str(folder / "variant")


def reference(folder: str | Path, texts: list[str]) -> np.ndarray:
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(folder), device="cpu")
    return np.asarray(model.encode(texts, normalize_embeddings=True, show_progress_bar=False))


def test_unit_vectors_in_order(folder: Path) -> None:
    encoder = SentenceEncoder(str(folder), batch_size=2)
    vectors = encoder.encode(TEXTS)
    assert vectors.shape == (5, 32) and vectors.dtype == np.float32
    assert np.linalg.norm(vectors, axis=1) == pytest.approx(1.0, abs=1e-5)
    for text, vector in zip(TEXTS, vectors, strict=True):
        assert encoder.encode([text])[0] == pytest.approx(vector, abs=1e-5)
    assert encoder.encode([]).shape == (0, 32)


@pytest.mark.parametrize(
    "variant",
    [
        {"pooling": "mean"},
        {"pooling": "cls"},
        {"pooling": "lasttoken"},
        {"pooling": "max"},
        {"dense": True},
        {"model": "distilbert"},
        {"model": "distilbert", "pooling": "lasttoken", "dense": True},
    ],
    ids=str,
)
def test_equals_sentence_transformers_within_the_window(folder: Path, tmp_path: Path, variant: dict[str, Any]) -> None:
    path = write_variant(tmp_path, folder, **variant)
    encoder = SentenceEncoder(path, instruction="", batch_size=3)
    assert encoder.encode(TEXTS) == pytest.approx(reference(path, TEXTS), abs=1e-5)
    singles = np.concatenate([encoder.encode([text]) for text in TEXTS])
    assert singles == pytest.approx(encoder.encode(TEXTS), abs=1e-5)


@pytest.mark.parametrize("model", ["bert", "distilbert"])
def test_int8_is_close_and_does_not_depend_on_the_batch(folder: Path, tmp_path: Path, model: str) -> None:
    path = write_variant(tmp_path, folder, model=model)
    exact, quick = SentenceEncoder(path), SentenceEncoder(path, precision="int8")
    assert exact.tag != quick.tag
    vectors = quick.encode(TEXTS)
    assert (vectors * exact.encode(TEXTS)).sum(1).min() > 0.99
    singles = np.concatenate([quick.encode([text]) for text in TEXTS])
    assert (vectors * singles).sum(1).min() > 0.9999


def test_the_int8_product_is_the_formula() -> None:
    from loraretriever.retrieve.int8 import Int8Linear

    torch.manual_seed(0)
    for bias in (True, False):
        linear = torch.nn.Linear(24, 40, bias=bias)
        x = torch.randn(2, 3, 24) * torch.tensor([1e-3, 1.0, 1e3])[:, None] + 0.5
        x[0, 0], x[1, 0] = 0, 7
        middle = (x.amin(-1, keepdim=True) + x.amax(-1, keepdim=True)) / 2
        scale = ((x.amax(-1, keepdim=True) - x.amin(-1, keepdim=True)) / 254).clamp(min=1e-9)
        weight_scale = linear.weight.abs().amax(1, keepdim=True) / 63
        weight = (linear.weight / weight_scale).round() * weight_scale
        with torch.no_grad():
            expected = torch.nn.functional.linear(((x - middle) / scale).round() * scale + middle, weight, linear.bias)
            assert torch.allclose(Int8Linear(linear)(x), expected, rtol=1e-4, atol=1e-5)


def test_int8_never_overflows() -> None:
    from loraretriever.retrieve.int8 import Int8Linear

    linear = torch.nn.Linear(512, 8)
    torch.nn.init.constant_(linear.weight, -1.0)
    x = torch.ones(3, 512)
    x[:, 0] = -1.0
    with torch.no_grad():
        assert Int8Linear(linear)(x) == pytest.approx(linear(x).numpy(), rel=1e-4)


def test_a_long_text_is_its_head_and_its_tail(folder: Path) -> None:
    encoder = SentenceEncoder(str(folder), instruction="", max_tokens=11)
    assert encoder.encode(["012345" + "~" * 100 + "abcde"]) == pytest.approx(encoder.encode(["012345abcde"]), abs=1e-6)
    # The window counts the instruction.
    with_instruction = SentenceEncoder(str(folder), instruction="in: ", max_tokens=11)
    assert with_instruction.encode(["01~~~~~abcde"]) == pytest.approx(encoder.encode(["in: 01abcde"]), abs=1e-6)


def test_a_window_is_no_larger_than_the_model(folder: Path) -> None:
    unbounded = SentenceEncoder(str(folder), instruction="", max_tokens=None)
    assert unbounded.encode(["x" * 5000]) == pytest.approx(unbounded.encode(["x" * 256]), abs=1e-6)


def words(count: int) -> str:
    return " ".join(f"w{i}{'y' * (i % 7)}{'.,;'[i % 3]}" for i in range(count))


@pytest.mark.parametrize("size", [8, 31, 64, 128])
@pytest.mark.parametrize("separator", [" ", "\n", " \t "])
def test_cutting_characters_first_leaves_the_window_as_it_is(size: int, separator: str) -> None:
    text = words(20_000).replace(" ", separator)
    window, everything = Window(word_tokenizer(), size), Window(word_tokenizer(), None)
    assert window.read([text])[0] == cut_middle(everything.read([text])[0], size)
    assert len(cut_characters(text, size)) <= (size + 1) * CHARACTERS_PER_TOKEN + 1


def word_tokenizer() -> Any:
    """A WordPiece tokenizer like BERT's, with special tokens."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *"w.,;", *(f"##{c}" for c in "0123456789y"), "##yy", "##yyyy"]
    tokenizer = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]")


def test_special_tokens_stay_at_both_ends() -> None:
    ids = Window(word_tokenizer(), 9).read(["w " * 300])[0]
    assert ids == [2, *[4] * 7, 3]


def test_the_cut_falls_between_words_where_there_are_any() -> None:
    text = "head " * 200 + "tail " * 200
    assert set(cut_characters(text, 8).split()) == {"head", "tail"}
    assert cut_characters("x" * 1000, 8) == "x" * 64 + " " + "x" * 64
    assert cut_characters("short", 8) == "short"
    assert cut_characters(text, None) == text


@pytest.mark.parametrize("precision", ["float32", "int8"])
@pytest.mark.parametrize("instruction", ["", "task: "])
def test_strange_texts_have_vectors_too(folder: Path, instruction: str, precision: Any) -> None:
    encoder = SentenceEncoder(str(folder), instruction=instruction, precision=precision)
    vectors = encoder.encode([*STRANGE, "y" * 1_000_000, "\ud800" * 1_000_000, " " * 1_000_000])
    assert np.linalg.norm(vectors, axis=1) == pytest.approx(1.0, abs=1e-5)


def test_of_a_huge_text_only_the_ends_are_tokenised(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = SentenceEncoder(str(folder), max_tokens=64)
    seen: list[int] = []
    read = Window.read

    def spy(window: Window, texts: list[str]) -> list[list[int]]:
        seen.extend(len(text) for text in texts)
        return read(window, texts)

    monkeypatch.setattr(Window, "read", spy)
    encoder.encode(["word " * 200_000, "y" * 1_000_000])
    assert max(seen) <= 65 * CHARACTERS_PER_TOKEN


def test_the_instruction_is_put_before_the_text(folder: Path) -> None:
    with_instruction = SentenceEncoder(str(folder), instruction="task: ").encode(["one"])
    assert with_instruction == pytest.approx(
        SentenceEncoder(str(folder), instruction="").encode(["task: one"]), abs=1e-6
    )


def test_tokens_are_those_that_are_read(folder: Path) -> None:
    """One for each character; this tokenizer adds none."""
    encoder = SentenceEncoder(str(folder), instruction="ab: ", max_tokens=16)
    assert encoder.count_tokens(["hello", "x" * 1000]) == 4 + 5 + 16
    assert encoder.count_tokens([]) == 0


def test_the_models_own_prompt_is_put_before_the_instruction(folder: Path, tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(folder), prompts={"own": "own: "}, default_prompt_name="own", device="cpu")
    model.save_pretrained(str(tmp_path))
    expected = SentenceEncoder(str(folder), instruction="own: task: ").encode(["one"])
    assert SentenceEncoder(str(tmp_path), instruction="task: ").encode(["one"]) == pytest.approx(expected, abs=1e-6)


def test_tags_tell_encoders_apart(folder: Path, tmp_path: Path) -> None:
    tag = SentenceEncoder(str(folder)).tag
    assert tag == SentenceEncoder(str(folder)).tag
    others = [
        SentenceEncoder(str(folder), instruction="").tag,
        SentenceEncoder(str(folder), max_tokens=64).tag,
        SentenceEncoder(str(folder), precision="int8").tag,
    ]
    assert len({tag, *others}) == 4
    assert tag.split("#")[1] != SentenceEncoder(str(write_encoder(tmp_path, seed=1))).tag.split("#")[1]


def test_static_embeddings_work_too(tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding

    weights = np.random.default_rng(0).normal(size=(128, 16)).astype(np.float32)
    static = StaticEmbedding(tiny_tokenizer(chat=False), embedding_weights=weights)
    SentenceTransformer(modules=[static], device="cpu").save_pretrained(str(tmp_path))
    encoder = SentenceEncoder(str(tmp_path), instruction="task: ")
    vectors = encoder.encode([*TEXTS, *STRANGE, "y" * 1_000_000])
    assert np.linalg.norm(vectors, axis=1) == pytest.approx(1.0, abs=1e-5)
    assert vectors[:5] == pytest.approx(reference(tmp_path, ["task: " + text for text in TEXTS]), abs=1e-5)
    assert encoder.encode([]).shape == (0, 16)
    assert not SentenceEncoder(str(tmp_path), instruction="").encode([""]).any()


def test_a_folder_without_a_model_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match="sentence-transformers format"):
        SentenceEncoder(str(tmp_path))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"precision": "int4"}, "expected one of float32, int8"),
        ({"precision": "int8", "device": "cuda"}, "expected the device 'cpu'"),
        ({"max_tokens": 2}, "at least 8"),
        ({"batch_size": 0}, "at least 1"),
    ],
)
def test_wrong_values_are_refused(folder: Path, wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        SentenceEncoder(str(folder), **wrong)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_graphics_processor_gives_the_same_vectors(folder: Path) -> None:
    expected = SentenceEncoder(str(folder)).encode(TEXTS)
    assert SentenceEncoder(str(folder), device="cuda").encode(TEXTS) == pytest.approx(expected, abs=1e-4)
