"""Adapters in host memory, loaded in the background, between the disk and the slots of the device."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection
from concurrent.futures import Future

from loraretriever.batch import AdapterRef
from loraretriever.batch.stacks import PreparedAdapter
from loraretriever.errors import InvalidInputError


class HostStore:
    """Prepared adapters, at most `max_bytes` of them; the least recently used leave first. Safe for several threads.

    Adapters named to `keep` do not leave, though they count, so keep no more than fit. One that is larger than the
    bound by itself is held until it is taken or another is loaded. What is being loaded counts once it is loaded.
    """

    def __init__(
        self,
        load: Callable[[AdapterRef], PreparedAdapter],
        max_bytes: int,
        threads: int = 1,
        on_ready: Callable[[], None] | None = None,
    ) -> None:
        """Start empty. Threads live only while there is something to prefetch.

        Args:
            load: reads and prepares an adapter; called by the store's threads and by those that call `get`.
            max_bytes: bytes held at most.
            threads: adapters loaded at once in the background.
            on_ready: called whenever a load has ended, well or not, by the thread that did it.

        Raises:
            InvalidInputError: a bound below 0, or no threads.
        """
        if max_bytes < 0 or threads < 1:
            raise InvalidInputError(
                f"the host store got max_bytes {max_bytes} and {threads} threads; expected at least 0 bytes, 1 thread."
            )
        self.max_bytes = max_bytes
        self.nbytes = 0
        self.peak_bytes = 0
        self.hits = 0  # calls of `get` that found the adapter loaded
        self.loads = 0  # that ended well
        self.evictions = 0
        self._load = load
        self._on_ready = on_ready
        self._lock = threading.Lock()
        self._held: dict[AdapterRef, PreparedAdapter] = {}  # least recently used first
        self._pending: dict[
            AdapterRef, Future[PreparedAdapter]
        ] = {}  # not begun, under way, or failed and not reported
        self._queue: dict[AdapterRef, Future[PreparedAdapter]] = {}  # those not begun, first come first
        self._early: dict[AdapterRef, Future[PreparedAdapter]] = {}  # those not begun that can wait for these
        self._unwanted: set[AdapterRef] = set()  # under way, and nobody waits: an error is not kept
        self._largest = 0  # bytes of an adapter
        self._kept: frozenset[AdapterRef] = frozenset()
        self._closed = False
        self._most_threads = threads
        self._threads: set[threading.Thread] = set()

    def prefetch(self, ref: AdapterRef, early: bool = False) -> None:
        """Load an adapter in the background, unless it is loaded, being loaded, or has an error to report.

        `early`: it is not needed yet. It is loaded after all others, and dropped if another would have to leave for it.
        """
        with self._lock:
            self._check_open()
            self._unwanted.discard(ref)
            if ref in self._pending:
                if not early and ref in self._early:
                    self._queue[ref] = self._early.pop(ref)
            elif ref not in self._held:
                self._pending[ref] = (self._early if early else self._queue)[ref] = Future()
                if len(self._threads) < self._most_threads:
                    thread = threading.Thread(target=self._work, name="adapter-loader", daemon=True)
                    self._threads.add(thread)
                    thread.start()

    def forget(self, ref: AdapterRef) -> None:
        """Nobody waits for this adapter any more: drop its prefetch, if it has not begun, or its error."""
        with self._lock:
            future = self._pending.get(ref)
            if future is None:
                return
            if self._dequeue(ref) or future.done():
                del self._pending[ref]
            else:
                self._unwanted.add(ref)

    def is_ready(self, ref: AdapterRef) -> bool:
        """Whether `get` returns or raises at once. Loaded adapters that are not kept may leave in between."""
        with self._lock:
            future = self._pending.get(ref)
            return ref in self._held or (future is not None and future.done())

    def get(self, ref: AdapterRef) -> PreparedAdapter:
        """The adapter, at once if it is loaded; waits if it is being loaded; else loads it in the calling thread.

        Raises the error of the load as it is, and forgets it, so that the next call tries again.
        """
        with self._lock:
            self._check_open()
            adapter = self._held.get(ref)
            if adapter is not None:
                self.hits += 1
                self._touch(ref)
                return adapter
            future = self._pending.setdefault(ref, Future())
            self._unwanted.discard(ref)
            is_mine = not future.running() and not future.done()
            if is_mine:  # perhaps from the queue, where it would have to wait for others
                self._dequeue(ref)
                future.set_running_or_notify_cancel()
        if is_mine:
            self._run(ref, future)
        failed = future.exception() is not None
        with self._lock:
            if not failed:
                self._touch(ref)
            elif self._pending.get(ref) is future:
                del self._pending[ref]
        return future.result()

    def keep(self, refs: Collection[AdapterRef]) -> None:
        """These adapters, and no others, stay until the next call, once they are loaded."""
        with self._lock:
            self._kept = frozenset(refs)
            self._shrink(self.max_bytes)

    def close(self) -> None:
        """Drop the prefetches that have not begun, wait for those that have, and end the threads."""
        with self._lock:
            self._closed = True
            for ref in (*self._queue, *self._early):
                del self._pending[ref]
            self._queue.clear()
            self._early.clear()
            threads = list(self._threads)
        for thread in threads:
            thread.join()

    def _check_open(self) -> None:
        if self._closed:
            raise RuntimeError("the host store is closed; make a new one.")

    def _dequeue(self, ref: AdapterRef) -> bool:
        return self._queue.pop(ref, None) is not None or self._early.pop(ref, None) is not None

    def _work(self) -> None:
        while True:
            with self._lock:
                ref = self._next()
                if ref is None:
                    self._threads.discard(threading.current_thread())
                    return
                future = self._pending[ref]
                future.set_running_or_notify_cancel()
            self._run(ref, future)

    def _next(self) -> AdapterRef | None:
        """Take what is to be loaded next from the queues."""
        if not self._queue and self.nbytes + self._largest >= self.max_bytes:
            for ref in self._early:
                del self._pending[ref]
            self._early.clear()
        for ref in self._queue or self._early:
            self._dequeue(ref)
            return ref
        return None

    def _run(self, ref: AdapterRef, future: Future[PreparedAdapter]) -> None:
        try:
            adapter = self._load(ref)
        except BaseException as error:  # also an interrupt: others may wait for this load
            with self._lock:
                if ref in self._unwanted:
                    self._unwanted.remove(ref)
                    del self._pending[ref]
                future.set_exception(error)
        else:
            with self._lock:
                self._shrink(self.max_bytes - adapter.nbytes)
                self._held[ref] = adapter
                self.nbytes += adapter.nbytes
                self.peak_bytes = max(self.peak_bytes, self.nbytes)
                self.loads += 1
                self._largest = max(self._largest, adapter.nbytes)
                self._unwanted.discard(ref)
                del self._pending[ref]
            future.set_result(adapter)
        if self._on_ready is not None:
            self._on_ready()

    def _touch(self, ref: AdapterRef) -> None:
        """An adapter was taken: it is the most recently used one, and need not be held beyond the bound any more."""
        if ref in self._held:
            self._held[ref] = self._held.pop(ref)
            self._shrink(self.max_bytes)

    def _shrink(self, limit: int) -> None:
        for ref in list(self._held):
            if self.nbytes <= limit:
                return
            if ref not in self._kept:
                self.nbytes -= self._held.pop(ref).nbytes
                self.evictions += 1
