"""A retriever for each view of a pool, which learns from nothing else than what that view may see."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable

from loraretriever.pool import Pool
from loraretriever.retrieve.reader import Reader
from loraretriever.retrieve.retriever import Retriever

MAX_VIEWS = 64


class Views:
    """The retrievers of a pool's views, made when they are first asked for.

    A view is a tenant, "" for who belongs to no tenant, or None for who sees everything. Where a view sees nothing but
    the shared adapters, what is known of these serves it; prompts are remembered apart all the same. Of the others
    each has a retriever of its own. The views used last are kept.
    """

    def __init__(self, pool: Pool, load: Callable[[Reader], Retriever]) -> None:
        """Nothing is loaded yet.

        Args:
            pool: whose views these are.
            load: makes a retriever. One that has the methods `for_view` and `for_caller` (see `HybridRetriever`) is
                loaded once.
        """
        self._pool = pool
        self._load = load
        self._lock = threading.Lock()
        self._root: Retriever | None = None  # of the shared adapters
        self._known: OrderedDict[str | None, tuple[str | None, Retriever]] = OrderedDict()
        self._tenants: tuple[int, frozenset[str]] = -1, frozenset()

    def of(self, view: str | None) -> Retriever:
        """The retriever of a view."""
        seen = self._seen(view)
        with self._lock:
            known = self._known.get(view)
            if known is None or known[0] != seen:
                self._known[view] = known = seen, self._made(seen)
            self._known.move_to_end(view)
            if len(self._known) > MAX_VIEWS:
                self._known.popitem(last=False)
            return known[1]

    def _seen(self, view: str | None) -> str | None:
        """The least view that sees the same adapters."""
        if view == "":
            return view
        change, (known_change, tenants) = self._pool.change, self._tenants
        if change != known_change:
            tenants = self._pool.tenants()
            self._tenants = change, tenants
        if view is None:
            return None if tenants else ""
        return view if view in tenants else ""

    def _made(self, seen: str | None) -> Retriever:
        if self._root is None:
            self._root = self._load(self._pool.view(""))
        make = getattr(self._root, "for_caller" if seen == "" else "for_view", None)
        if seen == "":
            return self._root if make is None else make()
        reader = self._pool.view(seen)
        return self._load(reader) if make is None else make(reader)
