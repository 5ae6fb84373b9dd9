"""The host store: what stays, what leaves, and many threads at once. Events and barriers order the threads."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loraretriever.batch import AdapterRef
from loraretriever.batch.stacks import PreparedAdapter
from loraretriever.engine.residency import HostStore
from loraretriever.errors import InvalidInputError, PoolError

WAIT = 30.0  # seconds; only a test that fails waits so long
REFS = [AdapterRef(f"a{i}", f"d{i}") for i in range(8)]


def adapter(ref: AdapterRef, nbytes: int = 10) -> PreparedAdapter:
    return PreparedAdapter(ref.name, ref.digest, (), nbytes)


class Loader:
    """A `load` that counts; while `gate` is closed, loads have begun but do not end."""

    def __init__(self, sizes: dict[AdapterRef, int] | None = None) -> None:
        self.sizes = sizes or {}
        self.errors: dict[AdapterRef, BaseException] = {}
        self.calls: list[AdapterRef] = []
        self.gate = threading.Event()
        self.gate.set()
        self.begun = threading.Semaphore(0)

    def __call__(self, ref: AdapterRef) -> PreparedAdapter:
        self.calls.append(ref)
        self.begun.release()
        assert self.gate.wait(WAIT)
        if ref in self.errors:
            raise self.errors[ref]
        return adapter(ref, self.sizes.get(ref, 10))


class Ended:
    """An `on_ready` that can be waited for."""

    def __init__(self) -> None:
        self._ended = threading.Semaphore(0)

    def __call__(self) -> None:
        self._ended.release()

    def wait(self, loads: int = 1) -> None:
        for _ in range(loads):
            assert self._ended.acquire(timeout=WAIT)


@contextmanager
def blocked(store: HostStore, loader: Loader, ref: AdapterRef) -> Iterator[None]:
    """Inside the block the store's only thread is busy with `ref`."""
    loader.gate.clear()
    store.prefetch(ref)
    assert loader.begun.acquire(timeout=WAIT)
    try:
        yield
    finally:
        loader.gate.set()


def in_threads(count: int, call: Callable[[], Any]) -> list[Any]:
    """What each of `count` calls returns or raises, all begun at once."""
    barrier, results = threading.Barrier(count), []

    def run() -> None:
        barrier.wait(WAIT)
        try:
            results.append(call())
        except BaseException as error:
            results.append(error)

    threads = [threading.Thread(target=run) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT)
    assert len(results) == count
    return results


def test_a_prefetched_adapter_is_ready_and_loaded_once() -> None:
    loader, ended = Loader(), Ended()
    with closing(HostStore(loader, 100, on_ready=ended)) as store:
        assert not store.is_ready(REFS[0])
        with blocked(store, loader, REFS[0]):
            assert not store.is_ready(REFS[0])
            store.prefetch(REFS[0])
        ended.wait()
        assert store.is_ready(REFS[0])
        store.prefetch(REFS[0])
        first = store.get(REFS[0])
        assert first.digest == "d0" and store.get(AdapterRef("another name", "d0")) is first
        assert (store.hits, store.loads, store.evictions, store.nbytes) == (2, 1, 0, 10)
    assert loader.calls == [REFS[0]]


def test_get_loads_what_nobody_has_asked_for() -> None:
    loader = Loader()
    with closing(HostStore(loader, 100)) as store:
        assert store.get(REFS[3]).digest == "d3" and store.is_ready(REFS[3])
        assert (store.hits, store.loads) == (0, 1)


@pytest.mark.parametrize("prefetched", [False, True])
def test_many_threads_share_one_load(prefetched: bool) -> None:
    loader = Loader()
    with closing(HostStore(loader, 100, threads=2)) as store:
        if prefetched:
            store.prefetch(REFS[0])
        results = in_threads(8, lambda: store.get(REFS[0]))
        assert loader.calls == [REFS[0]] and all(result is results[0] for result in results)


def test_get_does_not_wait_for_the_queue() -> None:
    loader = Loader()
    with closing(HostStore(loader, 100)) as store, blocked(store, loader, REFS[0]):
        for ref in REFS[1:4]:
            store.prefetch(ref)
        taken: list[PreparedAdapter] = []
        thread = threading.Thread(target=lambda: taken.append(store.get(REFS[3])))
        thread.start()
        # The store's thread is still busy: this load is the caller's own.
        assert loader.begun.acquire(timeout=WAIT)
        assert loader.calls == [REFS[0], REFS[3]]
        loader.gate.set()
        thread.join(WAIT)
        assert taken[0].digest == "d3"
    assert loader.calls.count(REFS[3]) == 1


def test_two_threads_load_at_once() -> None:
    both = threading.Barrier(2)

    def load(ref: AdapterRef) -> PreparedAdapter:
        both.wait(WAIT)  # breaks, and fails the load, unless two are under way together
        return adapter(ref)

    ended = Ended()
    with closing(HostStore(load, 100, threads=2, on_ready=ended)) as store:
        store.prefetch(REFS[0])
        store.prefetch(REFS[1])
        ended.wait(2)
        assert store.get(REFS[0]).digest == "d0" and store.get(REFS[1]).digest == "d1"


@settings(max_examples=80, deadline=None)
@given(
    st.lists(st.integers(1, 30), min_size=8, max_size=8),
    st.integers(0, 80),
    st.lists(st.one_of(st.integers(0, 7), st.sets(st.integers(0, 7), max_size=3)), max_size=25),
)
def test_what_stays_is_what_a_plain_list_says(sizes: list[int], bound: int, steps: list[int | set[int]]) -> None:
    size_of = dict(zip(REFS, sizes, strict=True))
    loader = Loader(size_of)
    held: list[AdapterRef] = []  # least recently used first
    kept: set[AdapterRef] = set()

    def shrink(limit: int) -> int:
        gone = 0
        for ref in [ref for ref in held if ref not in kept]:
            if sum(size_of[other] for other in held) > limit:
                held.remove(ref)
                gone += 1
        return gone

    evictions = peak = 0
    with closing(HostStore(loader, bound)) as store:
        for step in steps:
            if isinstance(step, set):
                kept = {REFS[i] for i in step}
                store.keep(kept)
            else:
                ref = REFS[step]
                assert store.get(ref).digest == ref.digest
                if ref in held:
                    held.remove(ref)
                else:
                    evictions += shrink(bound - size_of[ref])
                held.append(ref)
            peak = max(peak, sum(size_of[ref] for ref in held))
            evictions += shrink(bound)
            assert {ref for ref in REFS if store.is_ready(ref)} == set(held)
            assert (store.nbytes, store.peak_bytes) == (sum(size_of[ref] for ref in held), peak)
            assert store.evictions == evictions
            if not kept:
                assert store.nbytes <= bound


def test_the_least_recently_used_leaves_and_the_bound_holds() -> None:
    loader = Loader()
    with closing(HostStore(loader, 30)) as store:
        for i in (0, 1, 2, 0, 3):
            store.get(REFS[i])
        assert [store.is_ready(ref) for ref in REFS[:4]] == [True, False, True, True]
        assert (store.nbytes, store.peak_bytes, store.evictions) == (30, 30, 1)


def test_kept_adapters_stay_even_beyond_the_bound() -> None:
    with closing(HostStore(Loader(), 20)) as store:
        store.keep(REFS[:3])
        for ref in REFS[:4]:
            store.get(ref)
        assert [store.is_ready(ref) for ref in REFS[:4]] == [True, True, True, False]
        assert store.nbytes == 30
        store.keep(REFS[2:3])
        assert [store.is_ready(ref) for ref in REFS[:3]] == [False, True, True]


def test_one_larger_than_the_bound_waits_to_be_taken() -> None:
    loader, ended = Loader({REFS[0]: 50}), Ended()
    with closing(HostStore(loader, 20, on_ready=ended)) as store:
        store.prefetch(REFS[0])
        ended.wait()
        assert store.is_ready(REFS[0]) and store.nbytes == 50
        assert store.get(REFS[0]).nbytes == 50
        assert not store.is_ready(REFS[0]) and store.nbytes == 0
        store.keep([REFS[0]])
        store.get(REFS[0])
        assert store.is_ready(REFS[0])


@pytest.mark.parametrize("error", [PoolError("damaged"), InvalidInputError("does not fit"), OSError("no disk")])
def test_the_error_of_a_load_is_reported_once_then_tried_again(error: Exception) -> None:
    loader, ended = Loader(), Ended()
    loader.errors[REFS[0]] = error
    with closing(HostStore(loader, 100, on_ready=ended)) as store:
        store.prefetch(REFS[0])
        ended.wait()
        assert store.is_ready(REFS[0])
        store.prefetch(REFS[0])  # its error comes first
        with pytest.raises(type(error)) as raised:
            store.get(REFS[0])
        assert raised.value is error and loader.calls == [REFS[0]]
        assert not store.is_ready(REFS[0])
        del loader.errors[REFS[0]]
        store.prefetch(REFS[0])
        ended.wait()
        assert store.get(REFS[0]).digest == "d0"
        assert store.loads == 1


def test_all_that_wait_for_a_load_get_its_error() -> None:
    loader = Loader()
    loader.errors[REFS[0]] = PoolError("damaged")
    waiting = threading.Barrier(5)

    def get() -> object:
        waiting.wait(WAIT)
        return store.get(REFS[0])

    with closing(HostStore(loader, 100)) as store:
        results: list[Any] = []
        with blocked(store, loader, REFS[0]):
            thread = threading.Thread(target=lambda: results.extend(in_threads(4, get)))
            thread.start()
            waiting.wait(WAIT)
        thread.join(WAIT)
        assert all(isinstance(result, PoolError) for result in results) and len(results) == 4
        # A thread that came only after the report tries again, and nobody's load runs beside another's.
        assert len(loader.calls) <= 4 and not store.is_ready(REFS[0])


def test_a_thread_goes_on_after_an_error() -> None:
    loader, ended = Loader(), Ended()
    loader.errors[REFS[0]] = SystemExit()
    with closing(HostStore(loader, 100, on_ready=ended)) as store:
        store.prefetch(REFS[0])
        store.prefetch(REFS[1])
        ended.wait(2)
        assert store.is_ready(REFS[1])
        with pytest.raises(SystemExit):
            store.get(REFS[0])


def test_forgotten_prefetches_and_errors_go() -> None:
    loader, ended = Loader(), Ended()
    loader.errors[REFS[4]] = PoolError("damaged")
    with closing(HostStore(loader, 100, on_ready=ended)) as store:
        with blocked(store, loader, REFS[0]):
            for ref in REFS[1:5]:
                store.prefetch(ref)
            store.forget(REFS[0])  # has begun: it ends, and is held
            store.forget(REFS[1])
            store.forget(REFS[7])  # unknown
            store.prefetch(REFS[2])
        ended.wait(4)
        assert loader.calls == [REFS[0], *REFS[2:5]]
        assert store.is_ready(REFS[0]) and not store.is_ready(REFS[1]) and store.is_ready(REFS[4])
        store.forget(REFS[4])
        store.forget(REFS[0])
        assert not store.is_ready(REFS[4]) and store.is_ready(REFS[0])


def test_early_loads_come_after_all_others() -> None:
    loader, ended = Loader(), Ended()
    with closing(HostStore(loader, 100, on_ready=ended)) as store:
        with blocked(store, loader, REFS[0]):
            for ref in REFS[1:5]:
                store.prefetch(ref, early=True)
            store.prefetch(REFS[5])
            store.prefetch(REFS[3])  # needed now
            store.prefetch(REFS[5], early=True)  # still needed now
            store.forget(REFS[2])
        ended.wait(5)
        assert loader.calls == [REFS[i] for i in (0, 5, 3, 1, 4)]


def test_nothing_leaves_for_an_early_load() -> None:
    loader, ended = Loader(), Ended()
    with closing(HostStore(loader, 25, on_ready=ended)) as store:
        for ref in REFS[:2]:
            store.get(ref)
        store.prefetch(REFS[2], early=True)
        with blocked(store, loader, REFS[3]):  # after the early one has been dropped
            assert not store.is_ready(REFS[2])
            store.prefetch(REFS[4], early=True)
        ended.wait(3)
        assert store.get(REFS[4]).digest == "d4"  # dropped, too, and so it can be had as ever
    assert REFS[2] not in loader.calls and store.evictions == 2


def test_an_early_load_may_be_taken_before_its_turn() -> None:
    loader, ended = Loader(), Ended()
    with closing(HostStore(loader, 100, on_ready=ended)) as store:
        with blocked(store, loader, REFS[0]):
            store.prefetch(REFS[1], early=True)
            store.prefetch(REFS[2], early=True)
            loader.gate.set()
            assert store.get(REFS[2]).digest == "d2"
        ended.wait(3)
        assert sorted(loader.calls, key=REFS.index) == REFS[:3]


def test_the_error_of_a_load_under_way_is_forgotten_too() -> None:
    loader, ended = Loader(), Ended()
    loader.errors[REFS[0]] = PoolError("damaged")
    with closing(HostStore(loader, 100, on_ready=ended)) as store:
        with blocked(store, loader, REFS[0]):
            store.forget(REFS[0])
        ended.wait()
        assert not store.is_ready(REFS[0])
        with blocked(store, loader, REFS[0]):
            store.forget(REFS[0])
            store.prefetch(REFS[0])  # somebody waits again
        ended.wait()
        assert store.is_ready(REFS[0])
        with pytest.raises(PoolError, match="damaged"):
            store.get(REFS[0])


def test_random_use_by_many_threads_stays_in_bounds() -> None:
    under_way: set[AdapterRef] = set()
    twice: list[AdapterRef] = []

    def load(ref: AdapterRef) -> PreparedAdapter:
        if ref in under_way:
            twice.append(ref)
        under_way.add(ref)
        made = adapter(ref)
        under_way.remove(ref)
        return made

    with closing(HostStore(load, 40, threads=2)) as store:

        def use() -> bool:
            mine = threading.get_ident() % 7
            for i in range(200):
                store.prefetch(REFS[(mine + 3 * i) % 8], early=i % 2 == 0)
                ref = REFS[(mine + i * i) % 8]
                if store.get(ref).digest != ref.digest:
                    return False
                store.forget(REFS[i % 8])
            return True

        assert in_threads(6, use) == [True] * 6
    assert not twice and store.peak_bytes <= 40 and store.loads - store.evictions == store.nbytes // 10


def test_close_drops_the_queue_and_ends_the_threads() -> None:
    before, loader = set(threading.enumerate()), Loader()
    store = HostStore(loader, 100, threads=2)
    assert set(threading.enumerate()) == before  # threads come with the work
    loader.gate.clear()
    for ref in REFS[:4]:
        store.prefetch(ref)
    for _ in range(2):
        assert loader.begun.acquire(timeout=WAIT)
    mine = set(threading.enumerate()) - before
    assert len(mine) == 2 and all(thread.daemon for thread in mine)
    closer = threading.Thread(target=store.close)
    closer.start()
    deadline = time.monotonic() + WAIT
    while not store._closed and time.monotonic() < deadline:
        time.sleep(0.001)
    assert store._closed and closer.is_alive()  # it waits for the loads that have begun
    loader.gate.set()
    closer.join(WAIT)
    assert not any(thread.is_alive() for thread in mine) and set(loader.calls) == set(REFS[:2])
    for call in (store.get, store.prefetch):
        with pytest.raises(RuntimeError, match="closed"):
            call(REFS[0])
    store.close()


@pytest.mark.parametrize(("max_bytes", "threads"), [(-1, 1), (10, 0)])
def test_bounds_that_mean_nothing_are_refused(max_bytes: int, threads: int) -> None:
    with pytest.raises(InvalidInputError, match=f"max_bytes {max_bytes} and {threads} threads"):
        HostStore(Loader(), max_bytes, threads)
