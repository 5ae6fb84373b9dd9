"""Tiny tokenizers and encoders, made in a moment and without a network."""

from __future__ import annotations

import functools
import hashlib
import string
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from loraretriever.retrieve.encoder import Vectors
from tiny import HIDDEN, VOCABULARY, tiny_llama

CHAT_TEMPLATE = "{% for m in messages %}<{{ m.content }}>{% endfor %}{% if add_generation_prompt %}={% endif %}"


def tiny_tokenizer(chat: bool = True, padding_side: str = "left") -> Any:
    """One token per printable ASCII character; 0 pads, 1 begins, 2 ends, 3 is unknown."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<s>", "</s>", "<unk>", *string.printable[:95], "\n"]
    assert len(words) <= VOCABULARY
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("[\\s\\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        chat_template=CHAT_TEMPLATE if chat else None,
        padding_side=padding_side,
    )


def write_base_model(folder: Path, hidden: int = HIDDEN) -> Path:
    """The tiny Llama and its tokenizer as a folder that transformers can load."""
    tiny_llama(hidden=hidden).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def write_encoder(folder: Path, seed: int = 0, layers: int = 1) -> Path:
    """A random sentence encoder as a folder that sentence-transformers can load."""
    import torch
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
    from transformers import BertConfig, BertModel

    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=256,
    )
    inner = folder / "inner"
    BertModel(config).save_pretrained(inner)
    tiny_tokenizer(chat=False, padding_side="right").save_pretrained(inner)
    transformer = Transformer(str(inner))
    SentenceTransformer(modules=[transformer, Pooling(32)]).save_pretrained(str(folder / "encoder"))
    return folder / "encoder"


class WordEncoder:
    """A stand-in for a sentence encoder: the sum of one random vector per word, scaled to length 1."""

    def __init__(self, tag: str = "words") -> None:
        self.tag = tag
        self.encoded: list[str] = []

    def encode(self, texts: Sequence[str]) -> Vectors:
        self.encoded += texts
        if not texts:
            return np.empty((0, 64), dtype=np.float32)
        vectors = np.stack([sum(self._vector(word) for word in text.lower().split()) for text in texts])
        return np.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True), dtype=np.float32)

    def _vector(self, word: str) -> np.ndarray:
        return _word_vector(self.tag + word)


@functools.cache
def _word_vector(word: str) -> np.ndarray:
    seed = int.from_bytes(hashlib.sha256(word.encode("utf-8", "replace")).digest()[:4], "little")
    return np.random.default_rng(seed).normal(size=64)
