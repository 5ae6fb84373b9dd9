"""What all retrievers need to follow a pool: embeddings of new samples, and checks of what they are asked."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import islice

from loraretriever.errors import InvalidInputError
from loraretriever.retrieve.encoder import Encoder
from loraretriever.retrieve.reader import Reader

_PORTION = 64  # adapters embedded and stored at once: another process may go on from there


def embed_missing(pool: Reader, encoder: Encoder, names: Collection[str] | None = None) -> None:
    """Embed the samples that this encoder has not embedded yet, of all adapters or of some, and store the vectors.

    Each adapter's by themselves: rounding in float32 may depend on what is encoded together, and an adapter's vectors
    are to depend on nobody else's samples.
    """
    missing = iter(pool.missing_embeddings(encoder.tag, names).items())
    while portion := dict(islice(missing, _PORTION)):
        vectors = {name: encoder.encode([sample.text for sample in samples]) for name, samples in portion.items()}
        pool.store_embeddings(encoder.tag, vectors)


def check_request(prompts: Sequence[str], k: int) -> None:
    """Refuse what cannot be ranked."""
    if k < 1:
        raise InvalidInputError(f"k is {k}; expected a whole number of at least 1.")
    check_texts(prompts)


def check_texts(texts: Sequence[str]) -> None:
    """Refuse texts that say nothing."""
    for position, text in enumerate(texts):
        if not text.strip():
            raise InvalidInputError(f"prompt {position + 1} of {len(texts)} is empty; expected some text.")


def check_names(pool: Reader, names: Collection[str], known: Collection[str]) -> None:
    """Refuse names that are not in the pool; a disabled adapter may be named."""
    for name in sorted(set(names) - set(known)):
        pool.get(name)
