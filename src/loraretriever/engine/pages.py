"""Where each sequence's keys and values lie in one flat memory. Bookkeeping only; the tensors are in `attention.py`.

The memory is cut into pages of equal size, and each page into rows of one capacity, a power of two: sequences of
similar length lie side by side, so that attention reads them in place, all rows of a page at once. A sequence that
outgrows its row moves to one of twice the capacity; when one leaves, the last row of that capacity takes its place,
so that only the last page of each capacity has empty rows.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

from loraretriever.errors import InvalidInputError

SMALLEST_ROW = 64  # tokens
_PAGES = 16  # at least so many pages, if they are not smaller than the smallest row for it
_LARGEST_PAGE = 8192  # tokens


@dataclass(frozen=True, slots=True)
class Place:
    """A row: its first token's position in the memory, and how many tokens it can hold."""

    start: int
    capacity: int


@dataclass(frozen=True, slots=True)
class Move:
    """A row is to begin with the first `tokens` tokens of another one, and to be cleared behind them.

    Without a source, it is a new sequence's, which will fill these tokens. Moves are to be done in their order.
    """

    source: Place | None
    target: Place
    tokens: int


class PageTable:
    """Gives sequences rows in a memory of `tokens` tokens. Keys are compared by identity of hash and equality."""

    def __init__(self, tokens: int) -> None:
        """Cut the memory into pages.

        Raises:
            InvalidInputError: it cannot hold a single row.
        """
        if tokens < SMALLEST_ROW:
            raise InvalidInputError(
                f"the key/value cache has room for {tokens} tokens; expected at least {SMALLEST_ROW}. "
                "Raise its size (cache_mib)."
            )
        page = SMALLEST_ROW
        while 2 * page * _PAGES <= tokens and page < _LARGEST_PAGE:
            page *= 2
        self.page_tokens = page
        self.tokens = tokens // page * page
        self._free = set(range(self.tokens // page))  # pages
        self._rows: dict[int, list[Hashable]] = {}  # capacity -> keys in the order of their rows
        self._pages: dict[int, list[int]] = {}  # capacity -> first page of each group of rows
        self._where: dict[Hashable, tuple[int, int]] = {}  # key -> (capacity, index of the row)
        self._length: dict[Hashable, int] = {}
        self._moves: list[Move] = []

    def __contains__(self, key: Hashable) -> bool:
        return key in self._where

    def __getitem__(self, key: Hashable) -> Place:
        return self._place(*self._where[key])

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence that fits."""
        return 1 << (self.tokens.bit_length() - 1)

    @property
    def used(self) -> int:
        """Tokens in pages that are in use."""
        return self.tokens - len(self._free) * self.page_tokens

    def fits(self, tokens: int) -> bool:
        """Whether a sequence of that length fits when there is no other."""
        return tokens <= self.longest

    def place(self, key: Hashable, tokens: int) -> bool:
        """Let a sequence have room for that many tokens; False, and nothing has changed, if there is none."""
        capacity = _capacity(tokens)
        if key in self._where and capacity <= self._where[key][0]:
            self._length[key] = max(self._length[key], tokens)
            return True
        rows = self._rows.setdefault(capacity, [])
        pages = self._pages.setdefault(capacity, [])
        if len(rows) == len(pages) * self._rows_of(capacity):
            first = self._find(capacity)
            if first is None:
                return False
            self._free.difference_update(range(first, first + self._span(capacity)))
            pages.append(first)
        target = self._place(capacity, len(rows))
        if key in self._where:
            self._moves.append(Move(self[key], target, self._length[key]))
            self.remove(key)
        else:
            self._moves.append(Move(None, target, tokens))
        self._where[key] = (capacity, len(rows))
        self._length[key] = tokens
        rows.append(key)
        return True

    def remove(self, key: Hashable) -> None:
        """Give a sequence's row back; another one of its capacity may move into it."""
        capacity, index = self._where.pop(key)
        del self._length[key]
        rows, pages = self._rows[capacity], self._pages[capacity]
        last = rows.pop()
        if index < len(rows):
            rows[index] = last
            self._where[last] = (capacity, index)
            source, target = self._place(capacity, len(rows)), self._place(capacity, index)
            self._moves.append(Move(source, target, self._length[last]))
        if len(rows) == (len(pages) - 1) * self._rows_of(capacity):
            first = pages.pop()
            self._free.update(range(first, first + self._span(capacity)))

    def take_moves(self) -> list[Move]:
        """What has to be copied and cleared since the last call."""
        moves, self._moves = self._moves, []
        return moves

    def _rows_of(self, capacity: int) -> int:
        """Rows of a page of that capacity; a row larger than a page has several to itself."""
        return max(self.page_tokens // capacity, 1)

    def _span(self, capacity: int) -> int:
        """Pages that belong together."""
        return max(capacity // self.page_tokens, 1)

    def _place(self, capacity: int, index: int) -> Place:
        page, row = divmod(index, self._rows_of(capacity))
        return Place(self._pages[capacity][page] * self.page_tokens + row * capacity, capacity)

    def _find(self, capacity: int) -> int | None:
        """The lowest free page that begins a run of enough free pages; right behind the last of its kind if free."""
        span = self._span(capacity)
        pages = self._pages[capacity]
        behind = [pages[-1] + span] if pages else []
        for first in behind + sorted(self._free):
            if all(page in self._free for page in range(first, first + span)):
                return first
        return None


def _capacity(tokens: int) -> int:
    capacity = SMALLEST_ROW
    while capacity < tokens:
        capacity *= 2
    return capacity
