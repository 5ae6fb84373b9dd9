"""What the hybrid retriever knows of a pool, kept up to date: adapters are read, embedded, learnt from."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from loraretriever.errors import PoolAwayError
from loraretriever.retrieve.encoder import Encoder
from loraretriever.retrieve.following import embed_missing
from loraretriever.retrieve.model import Member, Parts
from loraretriever.retrieve.reader import Reader
from loraretriever.retrieve.snapshot import Snapshot
from loraretriever.types import PoolEntry

_PORTION = 500  # adapters read from the pool at once
_AWAY_SECONDS = 1.0


@dataclass(frozen=True, slots=True, eq=False)
class State:
    """What a call works with from beginning to end. `change` is the pool's when it was read."""

    encoder: Encoder
    encoder_name: str | None
    change: int
    members: dict[str, Member]
    snapshot: Snapshot
    learnt_at: int  # the change of the members that the snapshot's model was learnt from
    is_learnt: bool  # from exactly these members


class Shared:
    """What the followers of one pool's views share."""

    def __init__(self, load: Callable[[str | None], Encoder]) -> None:
        self.turn = threading.Lock()  # one learns at a time
        self._load = load
        self._lock = threading.Lock()
        self._last: tuple[str | None, Encoder] | None = None

    def encoder(self, name: str | None) -> Encoder:
        """The encoder of that name, which all of them use; the last one is remembered."""
        with self._lock:
            if self._last is None or self._last[0] != name:
                self._last = name, self._load(name)
            return self._last[1]


class Follower:
    """Follows what one reader sees of a pool.

    A change is in force at the next `current`: what was added is described by the model learnt before. Then a thread
    learns anew from all adapters, and its result replaces the old one at once. What changed while it learnt is
    described by the new model, and the thread goes on.
    """

    def __init__(
        self,
        pool: Reader,
        shared: Shared,
        parts: Parts,
        index_folder: Path | None,
        origin: Follower | None = None,
    ) -> None:
        """Nothing is loaded before the first call.

        Args:
            pool: what it follows.
            shared: gives the encoder.
            parts, index_folder: as in `HybridRetriever`.
            origin: what it begins with; it sees nothing that this one may not see.
        """
        self.pool = pool
        self._shared = shared
        self._parts = parts
        self._index_folder = index_folder
        self._origin = origin
        self._lock = threading.Lock()  # over reading the pool and replacing the state
        self._state: State | None = None
        self._thread: threading.Thread | None = None
        self._failure: Exception | None = None
        self._away_until = 0.0  # by the monotonic clock: until then the pool is not asked again

    def for_view(self, pool: Reader) -> Follower:
        """One for a view that may see whatever this one sees: until it has learnt, it goes on from what this one has.

        Both use the same encoder, and take turns in learning.
        """
        folder = pool.state_folder / "index" if self._index_folder is not None else None
        return Follower(pool, self._shared, self._parts, folder, origin=self)

    def current(self) -> State:
        """The state for the pool as it is now; what must be learnt for it is begun.

        While a shared pool's database is away, it is the last one.
        """
        state = self._state
        if state is not None and time.monotonic() < self._away_until:
            return state
        try:
            return self._current()
        except PoolAwayError:
            if state is None:
                raise
            self._away_until = time.monotonic() + _AWAY_SECONDS
            return state

    def _current(self) -> State:
        state = self._state
        if state is not None and state.change == self.pool.change:
            return state
        with self._lock:
            self._state = self._begin() if self._state is None else self._follow(self._state)
            self._begin_learning()
            return self._state

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

    def _begin(self) -> State:
        if self._origin is None:
            name = self.pool.encoder
            return self._read_all(self._shared.encoder(name), name)
        known = self._origin.current()
        change = self.pool.change
        touched = self.pool.changes_since(known.change)
        if touched is None:
            return self._read_all(known.encoder, known.encoder_name)
        seen = {adapter.name for adapter in self.pool.list(enabled_only=True)}
        return self._changed(known, change, touched | (seen ^ known.members.keys()))

    def _follow(self, state: State) -> State:
        """The state after what changed in the pool since."""
        change = self.pool.change  # first: what changes while this reads is read again at the next call
        names = self.pool.changes_since(state.change)
        if names is None:
            return self._read_all(state.encoder, state.encoder_name)
        return self._changed(state, change, names)

    def _changed(self, state: State, change: int, names: Collection[str]) -> State:
        """The state after these adapters came, went, or changed; of those that are as they were, nothing is learnt."""
        if not names:
            return replace(state, change=change)
        embed_missing(self.pool, state.encoder, names)
        there, read = self._read(state.encoder, names)
        new = {name: member for name, member in read.items() if not member.equals(state.members.get(name))}
        gone = set(names) & state.members.keys() - there
        if not new and not gone:
            return replace(state, change=change)
        members = {name: member for name, member in state.members.items() if name not in gone} | new
        snapshot = state.snapshot.changed(new, gone)
        if snapshot is None:
            return State(state.encoder, state.encoder_name, change, members, self._learnt(members), change, True)
        return replace(state, change=change, members=members, snapshot=snapshot, is_learnt=False)

    def _read_all(self, encoder: Encoder, name: str | None) -> State:
        change = self.pool.change
        embed_missing(self.pool, encoder)
        _, members = self._read(encoder, [adapter.name for adapter in self.pool.list(enabled_only=True)])
        return State(encoder, name, change, members, self._learnt(members), change, True)

    def _read(self, encoder: Encoder, names: Collection[str]) -> tuple[set[str], dict[str, Member]]:
        """Which of the adapters are there and enabled, and those of them whose samples are all embedded."""
        there: set[str] = set()
        members: dict[str, Member] = {}
        ordered = sorted(names)
        for start in range(0, len(ordered), _PORTION):
            _, entries = self.pool.entries(encoder.tag, ordered[start : start + _PORTION])
            there |= entries.keys()
            members |= {name: Member.of(entry) for name, entry in entries.items() if _is_embedded(entry)}
        return there, members

    def _learnt(self, members: Mapping[str, Member]) -> Snapshot:
        return Snapshot.learnt(list(members.values()), self._parts, self._index_folder)

    def _begin_learning(self) -> None:
        """In a thread, unless one is at work or all is learnt; the lock is held. What failed before is tried again."""
        if self._thread is not None or self._state is None:
            return
        self._failure = None
        if not self._is_settled(self._state):
            self._thread = threading.Thread(target=self._learn, name="loraretriever-learning", daemon=True)
            self._thread.start()

    def _is_settled(self, state: State) -> bool:
        return state.is_learnt and state.encoder_name == self.pool.encoder

    def _learn(self) -> None:
        """In a thread of its own, until there is nothing left to learn."""
        while True:
            try:
                with self._shared.turn:
                    state = self._state
                    assert state is not None
                    learnt = self._learnt_from(state)
                with self._lock:
                    self._state = self._brought_up(learnt)
                    if self._is_settled(self._state):
                        self._thread = None
                        return
            except Exception as error:  # told to whoever waits in `settle`; the state in force stays in force
                with self._lock:
                    self._failure, self._thread = error, None
                return

    def _learnt_from(self, state: State) -> State:
        name = self.pool.encoder
        if name != state.encoder_name:
            learnt = self._read_all(self._shared.encoder(name), name)
            return self._follow(learnt)  # all that came meanwhile is embedded here, and not while the lock is held
        return replace(state, snapshot=self._learnt(state.members), learnt_at=state.change, is_learnt=True)

    def _brought_up(self, learnt: State) -> State:
        """What was learnt, brought up to what is in force now; the lock is held."""
        now = self._state
        assert now is not None
        if learnt.encoder_name != now.encoder_name:  # its vectors cannot be compared with those of the members now
            return learnt if learnt.change >= now.change else self._follow(learnt)
        if now.learnt_at > learnt.learnt_at:  # so much changed that `_changed` has learnt
            return now
        new = {name: member for name, member in now.members.items() if not member.equals(learnt.members.get(name))}
        gone = learnt.members.keys() - now.members.keys()
        if not new and not gone:
            return replace(now, snapshot=learnt.snapshot, learnt_at=learnt.learnt_at, is_learnt=True)
        snapshot = learnt.snapshot.changed(new, gone)
        if snapshot is None:
            return now
        return replace(now, snapshot=snapshot, learnt_at=learnt.learnt_at, is_learnt=False)


def _is_embedded(entry: PoolEntry) -> bool:
    """Whether all samples and counter samples have a vector; some may have come since vectors were last made."""
    return entry.vectors is not None and entry.counter_vectors is not None
