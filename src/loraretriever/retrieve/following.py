"""What all retrievers need to follow a pool: embeddings of new samples, and checks of what they are asked."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import islice

import numpy as np

from loraretriever.errors import InvalidInputError
from loraretriever.pool import Pool
from loraretriever.retrieve.encoder import Encoder

_PORTION = 64  # adapters embedded and stored at once: another process may go on from there


def embed_missing(pool: Pool, encoder: Encoder, names: Collection[str] | None = None) -> None:
    """Embed the samples that this encoder has not embedded yet, of all adapters or of some, and store the vectors."""
    missing = iter(pool.missing_embeddings(encoder.tag, names).items())
    while portion := dict(islice(missing, _PORTION)):
        vectors = encoder.encode([sample.text for samples in portion.values() for sample in samples])
        ends = np.cumsum([len(samples) for samples in portion.values()])
        pool.store_embeddings(encoder.tag, dict(zip(portion, np.split(vectors, ends[:-1]), strict=True)))


def check_request(prompts: Sequence[str], k: int) -> None:
    """Refuse what cannot be ranked."""
    if k < 1:
        raise InvalidInputError(f"k is {k}; expected a whole number of at least 1.")
    for position, prompt in enumerate(prompts):
        if not prompt.strip():
            raise InvalidInputError(f"prompt {position + 1} of {len(prompts)} is empty; expected some text.")


def check_names(pool: Pool, names: Collection[str], known: Collection[str]) -> None:
    """Refuse names that are not in the pool; a disabled adapter may be named."""
    for name in sorted(set(names) - set(known)):
        pool.get(name)
