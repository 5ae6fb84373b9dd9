"""Rows of the key/value memory: never shared, moved without losing what they hold."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loraretriever.engine.pages import SMALLEST_ROW, PageTable
from loraretriever.errors import InvalidInputError

TOKENS = 64 * 64  # pages of 256 tokens, rows of 64 to 4096


def spread(table, keys):
    """The tokens that each key's row covers."""
    return {key: range(table[key].start, table[key].start + table[key].capacity) for key in keys}


def test_rows_of_one_capacity_lie_side_by_side():
    table = PageTable(TOKENS)
    for key in "abc":
        assert table.place(key, 100)
    assert [table[key].start for key in "abc"] == [0, 128, 256]


def test_a_row_is_kept_while_it_is_large_enough_and_grows_by_doubling():
    table = PageTable(TOKENS)
    table.place("a", 65)
    before = table["a"]
    assert [(m.source, m.target, m.tokens) for m in table.take_moves()] == [(None, before, 65)]
    table.place("a", 128)
    assert table["a"] == before
    table.place("a", 129)
    assert table["a"].capacity == 256
    assert [(m.source, m.target, m.tokens) for m in table.take_moves()] == [(before, table["a"], 128)]


def test_the_last_row_takes_the_place_of_one_that_leaves():
    table = PageTable(TOKENS)
    for key in "abc":
        table.place(key, 60)
    place = table["a"]
    table.remove("a")
    assert table["c"] == place
    assert "a" not in table


def test_no_room_changes_nothing():
    table = PageTable(TOKENS)
    assert table.place("a", TOKENS // 2)
    assert table.place("b", TOKENS // 2)
    table.take_moves()
    assert not table.place("c", 1)
    assert not table.place("a", TOKENS)
    assert "c" not in table
    assert not table.take_moves()
    table.remove("b")
    assert table.place("c", 1)


def test_all_pages_come_back():
    table = PageTable(TOKENS)
    for key, tokens in enumerate((1, 70, 300, 900, 64, 65)):
        assert table.place(key, tokens)
    for key in range(6):
        table.remove(key)
    assert table.used == 0
    assert table.place("whole", TOKENS)


def test_fits():
    table = PageTable(TOKENS)
    assert table.fits(TOKENS)
    assert not table.fits(TOKENS + 1)


def test_a_memory_without_room_for_a_row_is_refused():
    with pytest.raises(InvalidInputError, match="cache_mib"):
        PageTable(SMALLEST_ROW - 1)


@given(st.lists(st.tuples(st.integers(0, 11), st.integers(0, 900)), max_size=120))
def test_contents_follow_their_rows(steps):
    """Against a memory of labels: whatever comes, goes and grows, each row holds what was written for its key."""
    table = PageTable(TOKENS)
    memory: list[object] = [None] * TOKENS
    held: dict[int, int] = {}
    written: dict[int, int] = {}
    for key, tokens in steps:
        if tokens == 0:
            if key in held:
                table.remove(key)
                del held[key]
                written.pop(key, None)
        else:
            wanted = max(tokens, held.get(key, 0))
            placed = table.place(key, wanted)
            assert placed or table.used > 0
            if placed:
                held[key] = wanted
        for move in table.take_moves():
            if move.source is not None:
                kept = memory[move.source.start : move.source.start + move.tokens]
                memory[move.target.start : move.target.start + move.tokens] = kept
            rest = move.target.capacity - move.tokens
            memory[move.target.start + move.tokens : move.target.start + move.target.capacity] = [None] * rest
        rows = spread(table, held)
        covered = [position for row in rows.values() for position in row]
        assert len(covered) == len(set(covered))
        for other, length in held.items():
            known = written.get(other, 0)
            assert [memory[position] for position in rows[other][:known]] == [(other, i) for i in range(known)]
            assert [memory[position] for position in rows[other][length:]] == [None] * (len(rows[other]) - length)
            for i, position in enumerate(rows[other][:length]):
                memory[position] = (other, i)
            written[other] = length
