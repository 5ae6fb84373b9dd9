"""Encoders around an encoder: one remembers vectors, one gathers the texts of many threads into batches."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict, deque
from collections.abc import Sequence

import numpy as np

from loraretriever.errors import InvalidInputError, LoraRetrieverError
from loraretriever.openmp import release_workers
from loraretriever.retrieve.encoder import Encoder, Vectors, count_tokens


class CachingEncoder:
    """Remembers the vectors of the most recent texts. Texts themselves are not kept: their 16-byte hashes are."""

    def __init__(self, encoder: Encoder, size: int = 4096) -> None:
        """Wrap an encoder.

        Args:
            encoder: asked for the texts that are not remembered, once per call.
            size: how many vectors to keep; 384 dimensions take 1.5 KB each.
        """
        if size < 1:
            raise InvalidInputError(f"the cache's size is {size}; expected a whole number of at least 1.")
        self.encoder = encoder
        self._size = size
        self._lock = threading.Lock()
        self._vectors: OrderedDict[bytes, Vectors] = OrderedDict()

    @property
    def tag(self) -> str:
        """The wrapped encoder's."""
        return self.encoder.tag

    def encode(self, texts: Sequence[str]) -> Vectors:
        """Shape: (len(texts), dimension), rows of length 1. The caller owns them."""
        if not texts:
            return self.encoder.encode(texts)
        keys = [_hash(text) for text in texts]
        found = self._known(keys)
        missing = {key: text for key, text in zip(keys, texts, strict=True) if key not in found}
        if missing:
            rows = self.encoder.encode(list(missing.values()))
            new = {key: row.copy() for key, row in zip(missing, rows, strict=True)}
            self._remember(new)
            found |= new
        return np.stack([found[key] for key in keys])

    def count_tokens(self, texts: Sequence[str]) -> int:
        """The wrapped encoder's."""
        return count_tokens(self.encoder, texts)

    def _known(self, keys: Sequence[bytes]) -> dict[bytes, Vectors]:
        with self._lock:
            known = {key: self._vectors[key] for key in keys if key in self._vectors}
            for key in known:
                self._vectors.move_to_end(key)
        return known

    def _remember(self, new: dict[bytes, Vectors]) -> None:
        with self._lock:
            for key, vector in new.items():
                self._vectors[key] = vector
                self._vectors.move_to_end(key)
            while len(self._vectors) > self._size:
                self._vectors.popitem(last=False)


def _hash(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()


class _Call:
    """What one thread waits for."""

    def __init__(self, texts: Sequence[str]) -> None:
        self.texts = list(texts)
        self.done = False
        self.vectors: Vectors | None = None
        self.error: BaseException = LoraRetrieverError("encoding was interrupted; try again.")

    def result(self) -> Vectors:
        if self.vectors is None:
            raise self.error
        return self.vectors


class QueueEncoder:
    """Encodes the texts of calls that come at the same time together.

    There is no thread and no waiting for more calls: whoever finds the model free encodes what waits, for all, in
    the order in which it came. While it does, the next batch gathers. A thread that has encoded gives its OpenMP
    workers back: with a server's many threads they would outnumber the processors.
    """

    def __init__(self, encoder: Encoder, max_batch: int = 32) -> None:
        """Wrap an encoder, which is then used by one thread at a time.

        Args:
            encoder: gets `max_batch` texts at most, unless a single call has more.
            max_batch: texts, not calls.
        """
        if max_batch < 1:
            raise InvalidInputError(f"max_batch is {max_batch}; expected a whole number of at least 1.")
        self._encoder = encoder
        self._max_batch = max_batch
        self._changed = threading.Condition()
        self._waiting: deque[_Call] = deque()
        self._busy = False
        self._closed = False

    @property
    def tag(self) -> str:
        """The wrapped encoder's."""
        return self._encoder.tag

    def encode(self, texts: Sequence[str]) -> Vectors:
        """Shape: (len(texts), dimension), rows of length 1.

        Raises:
            LoraRetrieverError: the encoder was closed. An error of the wrapped encoder reaches the call that caused it.
        """
        call = _Call(texts)
        with self._changed:
            if self._closed:
                raise LoraRetrieverError("the encoder is closed; make a new one.")
            self._waiting.append(call)
        try:
            while not call.done:
                self._wait_or_work(call)
        finally:
            self._withdraw(call)
        return call.result()

    def count_tokens(self, texts: Sequence[str]) -> int:
        """The wrapped encoder's."""
        return count_tokens(self._encoder, texts)

    def _wait_or_work(self, call: _Call) -> None:
        with self._changed:
            self._changed.wait_for(lambda: call.done or not self._busy)
            if call.done:
                return
            batch = self._take()
            self._busy = True
        self._run(batch)

    def _withdraw(self, call: _Call) -> None:
        """Nobody encodes for a thread that was interrupted."""
        with self._changed:
            if call in self._waiting:
                self._waiting.remove(call)
                self._changed.notify_all()

    def close(self) -> None:
        """Refuse further calls and wait for those that came before."""
        with self._changed:
            self._closed = True
            self._changed.wait_for(lambda: not self._busy and not self._waiting)

    def _take(self) -> list[_Call]:
        """The calls that waited longest, as many as a batch holds, one at least."""
        batch = [self._waiting.popleft()]
        texts = len(batch[0].texts)
        while self._waiting and texts + len(self._waiting[0].texts) <= self._max_batch:
            batch.append(self._waiting.popleft())
            texts += len(batch[-1].texts)
        return batch

    def _run(self, batch: list[_Call]) -> None:
        try:
            self._encode_together(batch)
        finally:
            release_workers()
            with self._changed:
                for call in batch:
                    call.done = True
                self._busy = False
                self._changed.notify_all()

    def _encode_together(self, batch: list[_Call]) -> None:
        try:
            vectors = self._encoder.encode([text for call in batch for text in call.texts])
        except Exception as error:
            if len(batch) > 1:  # one text may be at fault: only its own call is to fail
                for call in batch:
                    self._encode_together([call])
            else:
                batch[0].error = error
            return
        ends = np.cumsum([len(call.texts) for call in batch])
        for call, part in zip(batch, np.split(vectors, ends[:-1]), strict=True):
            call.vectors = part
