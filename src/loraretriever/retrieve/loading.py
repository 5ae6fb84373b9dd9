"""From settings to a retriever."""

from __future__ import annotations

import json
from pathlib import Path

from loraretriever.config import DEFAULT_ENCODER, PAPER_INSTRUCTION, Settings
from loraretriever.errors import InvalidInputError
from loraretriever.retrieve.caching import QueueEncoder
from loraretriever.retrieve.encoder import Encoder, SentenceEncoder
from loraretriever.retrieve.hybrid import HybridRetriever
from loraretriever.retrieve.model import Parts
from loraretriever.retrieve.reader import Reader
from loraretriever.retrieve.retriever import PaperRetriever, Retriever

TRAINING_RECORD = "loraretriever.json"  # beside an encoder that `train-retriever` made
PAPER = "paper"
_REMEMBERED = 1024  # prompts of each view; 4.6 KB each with MiniLM
PARTS = {
    "hybrid": Parts(),
    "dense": Parts(sparse=False),
    "sparse": Parts(dense=False),
    "sparse-centroid": Parts(dense=False, head=False),
    "dense+sparse": Parts(head=False),
}


def load_retriever(pool: Reader, settings: Settings) -> Retriever:
    """The retriever of that name; the encoder is loaded at its first call, or now for the paper's formula.

    Raises:
        InvalidInputError: there is no such retriever.
        ModelLoadError: the encoder cannot be loaded.
    """
    if settings.retriever == PAPER:
        return PaperRetriever(pool, QueueEncoder(paper_encoder(settings.encoder or pool.encoder, settings)))
    if settings.retriever not in PARTS:
        raise InvalidInputError(
            f"unknown retriever {settings.retriever!r}; expected one of {', '.join([*PARTS, PAPER])}."
        )

    def load(pool_encoder: str | None) -> Encoder:
        return QueueEncoder(hybrid_encoder(settings.encoder or pool_encoder, settings))

    parts = PARTS[settings.retriever]
    folder = pool.state_folder / "index"
    return HybridRetriever(pool, load, parts, settings.false_fallback, settings.drift, folder, _REMEMBERED)


def hybrid_encoder(name: str | None, settings: Settings) -> Encoder:
    """The encoder as the hybrid reads it: short windows, several layers, and no instruction unless trained with one."""
    name = name or DEFAULT_ENCODER
    precision = settings.precision
    if precision == "auto":
        precision = "int8" if settings.device == "cpu" and _has_int8_products() else "float32"
    return SentenceEncoder(
        name,
        _instruction(name, settings, ""),
        settings.device,
        max_tokens=settings.max_tokens,
        precision=precision,
        layers="thirds",
    )


def paper_encoder(name: str | None, settings: Settings) -> Encoder:
    """The encoder as the paper's formula reads it: its own vector, of as many tokens as it takes."""
    name = name or DEFAULT_ENCODER
    return SentenceEncoder(name, _instruction(name, settings, PAPER_INSTRUCTION), settings.device, max_tokens=None)


def _instruction(name: str, settings: Settings, default: str) -> str:
    """What was asked for, or what the encoder was trained with, or the default."""
    if settings.instruction is not None:
        return settings.instruction
    try:
        record = json.loads((Path(name) / TRAINING_RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return default
    trained = record.get("instruction") if isinstance(record, dict) else None
    return trained if isinstance(trained, str) else default


def _has_int8_products() -> bool:
    """Whether the processor has fast products of 8-bit integers (VNNI); without, PyTorch takes 40 times as long."""
    import torch

    supported = getattr(torch.cpu, "_is_vnni_supported", None)
    return supported is not None and bool(supported())
