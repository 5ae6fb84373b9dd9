"""From text to unit vectors."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from loraretriever.config import DEFAULT_ENCODER, PAPER_INSTRUCTION
from loraretriever.models import encodable, load_errors, resolve_encoder

_EXPECTED = "Expected a local folder in sentence-transformers format or the id of such a model on the hub."

Vectors = NDArray[np.float32]


class Encoder(Protocol):
    """Anything that turns texts into unit vectors."""

    @property
    def tag(self) -> str:
        """Names the encoder, its weights and its instruction: vectors of different tags cannot be compared."""
        ...

    def encode(self, texts: Sequence[str]) -> Vectors:
        """Shape: (len(texts), dimension), rows of length 1."""
        ...


class SentenceEncoder:
    """A sentence-transformers model that reads `instruction + text`."""

    def __init__(
        self,
        name: str = DEFAULT_ENCODER,
        instruction: str = PAPER_INSTRUCTION,
        device: str = "cpu",
        batch_size: int = 32,
    ) -> None:
        """Load the model from a folder, the hub, or an installed package.

        Raises:
            ModelLoadError: the model cannot be found or loaded.
        """
        from sentence_transformers import SentenceTransformer

        with load_errors("encoder", name, _EXPECTED):
            self._model: Any = SentenceTransformer(resolve_encoder(name), device=device).eval()
        self._instruction = instruction
        self._batch_size = batch_size
        self.tag = f"{name}#{self._fingerprint()}#{instruction}"

    def _fingerprint(self) -> str:
        """Tells weights apart, whatever the folder is called, without reading all of them."""
        digest = hashlib.sha256()
        for key, value in sorted(self._model.state_dict().items()):
            head = value.detach().flatten()[:64].cpu().float().numpy().tobytes()
            digest.update(f"{key}{tuple(value.shape)}".encode() + head)
        return digest.hexdigest()[:16]

    def encode(self, texts: Sequence[str]) -> Vectors:
        """Shape: (len(texts), dimension), rows of length 1."""
        vectors = self._model.encode(
            [self._instruction + encodable(text) for text in texts],
            batch_size=self._batch_size,
            normalize_embeddings=True,
            convert_to_numpy=True,
            show_progress_bar=False,
        )
        return np.asarray(vectors, dtype=np.float32)
