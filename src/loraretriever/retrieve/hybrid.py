"""The default retriever: dense and sparse views of the samples, combined into calibrated probabilities."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from loraretriever.pool import Pool
from loraretriever.retrieve.encoder import Encoder
from loraretriever.retrieve.explain import Explanation, explain
from loraretriever.retrieve.following import check_names, check_request, embed_missing
from loraretriever.retrieve.model import Member, Parts
from loraretriever.retrieve.snapshot import Ranked, Snapshot
from loraretriever.types import AdapterFilter, Hit, PoolEntry, Ranking

_PORTION = 500  # adapters read from the pool at once
_LONG, _ENDS = 3000, (160, 320)  # characters


@dataclass(frozen=True, slots=True, eq=False)
class _State:
    """What a call works with from beginning to end. `change` is the pool's when it was read."""

    encoder: Encoder
    encoder_name: str | None
    change: int
    members: dict[str, Member]
    snapshot: Snapshot
    is_learnt: bool  # from exactly these members


class HybridRetriever:
    """Ranks adapters by whitened means of embeddings and by TF-IDF, and says how probable each is.

    Follows the pool. A change is in force at the next call: what was added is described by the model learnt before.
    Then a thread learns anew from all adapters, and its result replaces the old one at once.
    """

    def __init__(
        self,
        pool: Pool,
        load_encoder: Callable[[str | None], Encoder],
        parts: Parts = Parts(),  # noqa: B008 - frozen
        false_fallback: float = 0.01,
        drift: float = 0.07,
        index_folder: Path | None = None,
    ) -> None:
        """Nothing is loaded before the first call.

        Args:
            pool: whose enabled adapters are ranked.
            load_encoder: gives the encoder for the name in `Pool.encoder`, or the default one for None. When that
                name changes, the new encoder is loaded and embeds all samples while the old one serves.
            parts: which parts are at work.
            false_fallback: the share of prompts that have an adapter, which may be left to the base model.
            drift: how much lower the cosines of prompts in words of their own are than those of the samples.
            index_folder: where the index over many adapters is kept; None: it is built anew.
        """
        self._pool = pool
        self._load_encoder = load_encoder
        self._parts = parts
        self._rates = false_fallback, drift
        self._index_folder = index_folder
        self._lock = threading.Lock()  # over reading the pool and replacing the state
        self._state: _State | None = None
        self._thread: threading.Thread | None = None
        self._failure: Exception | None = None

    def rank(self, prompts: Sequence[str], k: int, wanted: AdapterFilter = AdapterFilter()) -> list[Ranking]:  # noqa: B008
        """For each prompt its k most probable adapters, best first.

        Raises:
            InvalidInputError: k is not positive, or a prompt is empty.
            AdapterNotFoundError: the filter names an adapter that is not in the pool.
        """
        state, found = self._rank(prompts, k, wanted)
        threshold = state.snapshot.threshold(*self._rates)
        return [Ranking(_hits(each, k), each.fit, threshold) for each in found]

    def explain(self, prompts: Sequence[str], k: int, wanted: AdapterFilter = AdapterFilter()) -> list[Explanation]:  # noqa: B008
        """Why each prompt's k best adapters were found."""
        state, found = self._rank(prompts, k, wanted)
        threshold = state.snapshot.threshold(*self._rates)
        vectors = state.encoder.encode([each.text for each in found])
        return [
            explain(prompt, vector, each, k, threshold, state.snapshot, self._pool, state.encoder.tag)
            for prompt, vector, each in zip(prompts, vectors, found, strict=True)
        ]

    def _rank(self, prompts: Sequence[str], k: int, wanted: AdapterFilter) -> tuple[_State, list[Ranked]]:
        check_request(prompts, k)
        state = self._current()
        check_names(self._pool, {*wanted.exclude, *(wanted.only or ())}, state.members.keys())
        if not prompts:
            return state, []
        views = [view for prompt in prompts for view in _views(prompt)]
        found = iter(state.snapshot.rank(state.encoder.encode(views), views, wanted))
        # Python's max keeps the first of equals: the whole prompt.
        return state, [max((next(found) for _ in _views(prompt)), key=lambda each: each.fit) for prompt in prompts]

    def settle(self) -> None:
        """Wait until what is learnt is learnt from the pool as it is now.

        Raises:
            LoraRetrieverError: a new encoder cannot be used, or the pool cannot be read.
        """
        while True:
            self._current()
            with self._lock:
                failure, self._failure = self._failure, None
                if failure is None:
                    self._begin_learning()
                thread = self._thread
            if failure is not None:
                raise failure
            if thread is None:
                return
            thread.join()

    def _current(self) -> _State:
        """The state for the pool as it is now; what must be learnt for it is begun."""
        state = self._state
        if state is not None and state.change == self._pool.change:
            return state
        with self._lock:
            if self._state is None:
                name = self._pool.encoder
                self._state = self._read_all(self._load_encoder(name), name)
            else:
                self._state = self._follow(self._state)
            self._begin_learning()
            return self._state

    def _begin_learning(self) -> None:
        """In a thread, unless one is at work or all is learnt; the lock is held. What failed before is tried again."""
        if self._thread is not None or self._state is None:
            return
        self._failure = None
        if not self._is_settled(self._state):
            self._thread = threading.Thread(target=self._learn, name="loraretriever-learning", daemon=True)
            self._thread.start()

    def _is_settled(self, state: _State) -> bool:
        return state.is_learnt and state.encoder_name == self._pool.encoder

    def _read_all(self, encoder: Encoder, name: str | None) -> _State:
        change = self._pool.change  # first: what changes while this reads is read again at the next call
        embed_missing(self._pool, encoder)
        names = [adapter.name for adapter in self._pool.list(enabled_only=True)]
        members: dict[str, Member] = {}
        for start in range(0, len(names), _PORTION):
            _, entries = self._pool.entries(encoder.tag, names[start : start + _PORTION])
            members |= {each.name: Member.of(each) for each in entries.values() if _is_embedded(each)}
        return _State(encoder, name, change, members, self._learnt(members), True)

    def _follow(self, state: _State) -> _State:
        """The state after what changed in the pool since."""
        change = self._pool.change
        names = self._pool.changes_since(state.change)
        if names is None:
            return self._read_all(state.encoder, state.encoder_name)
        embed_missing(self._pool, state.encoder, names)
        _, entries = self._pool.entries(state.encoder.tag, names)
        new = {name: Member.of(entry) for name, entry in entries.items() if _is_embedded(entry)}
        gone = names & state.members.keys() - entries.keys()
        if not new and not gone:
            return replace(state, change=change)
        members = {name: member for name, member in state.members.items() if name not in gone} | new
        snapshot = state.snapshot.changed(new, gone)
        is_learnt = snapshot is None
        snapshot = snapshot or self._learnt(members)
        return replace(state, change=change, members=members, snapshot=snapshot, is_learnt=is_learnt)

    def _learnt(self, members: Mapping[str, Member]) -> Snapshot:
        return Snapshot.learnt(list(members.values()), self._parts, self._index_folder)

    def _learn(self) -> None:
        """In a thread of its own, until there is nothing left to learn."""
        while True:
            state = self._state
            assert state is not None
            try:
                learnt = self._learnt_from(state)
                with self._lock:
                    if self._state is state:
                        self._state = learnt
                    if self._state is not None and self._is_settled(self._state):
                        self._thread = None
                        return
            except Exception as error:  # told to whoever waits in `settle`; the state in force stays in force
                with self._lock:
                    self._failure, self._thread = error, None
                return

    def _learnt_from(self, state: _State) -> _State:
        name = self._pool.encoder
        if name != state.encoder_name:
            return self._read_all(self._load_encoder(name), name)
        snapshot = self._learnt(state.members)
        return replace(state, snapshot=snapshot, is_learnt=True)


def _is_embedded(entry: PoolEntry) -> bool:
    """Whether all samples and counter samples have a vector; some may have come since vectors were last made."""
    return entry.vectors is not None and entry.counter_vectors is not None


def _views(prompt: str) -> tuple[str, ...]:
    """What is read of a prompt: all of it, and of a very long one pieces of its beginning and end by themselves too.

    Much of a long prompt may be a document, and the question stand before or after it.
    """
    if len(prompt) <= _LONG:
        return (prompt,)
    parts = [part for size in _ENDS for part in (prompt[:size], prompt[-size:])]
    return (prompt, *(part for part in parts if part.strip()))


def _hits(found: Ranked, k: int) -> tuple[Hit, ...]:
    rows = zip(found.names[:k], found.probabilities[:k], found.logits[:k], strict=True)
    return tuple(Hit(name, float(probability), float(logit)) for name, probability, logit in rows)
