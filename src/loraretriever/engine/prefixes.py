"""Which beginnings of prompts have been computed under which key. Bookkeeping only; see `attention.py`.

A prefix is kept in blocks of a few tokens, each found by the tokens before it: an exact match of tokens and key, with
no hashing that could collide. The key is what the keys and values depend on besides, the composition, and who may know
of them: how soon an answer comes tells whether its prompt's beginning was known.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Sequence
from itertools import count

BLOCK = 16  # tokens

_Key = tuple[Hashable, tuple[int, ...]]  # (the key or the number of the block before, the block's tokens)


class PrefixTable:
    """Blocks by what they hold; the least recently used leave when there is no room."""

    def __init__(self, blocks: int) -> None:
        self._free = list(range(blocks - 1, -1, -1))
        self._entries: OrderedDict[_Key, tuple[int, int]] = OrderedDict()  # -> (number, block), oldest use first
        self._numbers = count()  # never used twice, so a block whose predecessor has left is never found again

    def __len__(self) -> int:
        return len(self._entries)

    def find(self, under: Hashable, tokens: Sequence[int]) -> list[int]:
        """The blocks that hold the longest known beginning of `tokens`, in order."""
        chain: list[tuple[_Key, int]] = []
        before: Hashable = (under,)
        for block in _blocks(tokens):
            key = (before, block)
            entry = self._entries.get(key)
            if entry is None:
                break
            before = entry[0]
            chain.append((key, entry[1]))
        for key, _ in reversed(chain):  # a beginning is younger than what follows it, which would be lost with it
            self._entries.move_to_end(key)
        return [place for _, place in chain]

    def add(self, under: Hashable, tokens: Sequence[int]) -> list[tuple[int, int]]:
        """Make room for the whole blocks of `tokens` that are not known: (the block's place among them, block)."""
        added: list[tuple[int, int]] = []
        chain: list[_Key] = []
        before: Hashable = (under,)
        for index, block in enumerate(_blocks(tokens)):
            key = (before, block)
            entry = self._entries.get(key)
            if entry is None:
                place = self._room(chain)
                if place is None:
                    break
                entry = self._entries[key] = (next(self._numbers), place)
                added.append((index, place))
            before = entry[0]
            chain.append(key)
        for key in reversed(chain):
            self._entries.move_to_end(key)
        return added

    def _room(self, keep: list[_Key]) -> int | None:
        if self._free:
            return self._free.pop()
        oldest = next(iter(self._entries), None)
        if oldest is None or oldest in keep:
            return None
        return self._entries.pop(oldest)[1]


def _blocks(tokens: Sequence[int]) -> list[tuple[int, ...]]:
    return [tuple(tokens[i : i + BLOCK]) for i in range(0, len(tokens) - BLOCK + 1, BLOCK)]
