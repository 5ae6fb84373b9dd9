"""Which beginnings of prompts are known: exact match of tokens and composition, least recently used out."""

from hypothesis import given
from hypothesis import strategies as st

from loraretriever.engine.prefixes import BLOCK, PrefixTable


def tokens(*blocks):
    """A token list of whole blocks, each of one repeated number."""
    return [number for number in blocks for _ in range(BLOCK)]


def test_only_whole_blocks_of_the_same_composition_match():
    table = PrefixTable(8)
    added = table.add("sql", tokens(1, 2) + [9] * (BLOCK - 1))
    assert [index for index, _ in added] == [0, 1]
    assert table.find("sql", tokens(1, 2, 9)) == [block for _, block in added]
    assert table.find("sql", tokens(1, 3)) == [added[0][1]]
    assert table.find("sql", tokens(1)[:-1]) == []
    assert table.find("german", tokens(1, 2)) == []


def test_a_block_is_found_only_behind_its_own_beginning():
    table = PrefixTable(8)
    table.add("sql", tokens(1, 2))
    assert table.find("sql", tokens(2)) == []
    assert table.find("sql", tokens(3, 2)) == []


def test_a_shared_beginning_is_kept_once():
    table = PrefixTable(8)
    first = table.add("sql", tokens(1, 2))
    second = table.add("sql", tokens(1, 3))
    assert [index for index, _ in second] == [1]
    assert table.find("sql", tokens(1, 3)) == [first[0][1], second[0][1]]


def test_the_least_recently_used_leaves():
    table = PrefixTable(2)
    table.add("a", tokens(1))
    table.add("b", tokens(1))
    table.find("a", tokens(1))
    table.add("c", tokens(1))
    assert table.find("a", tokens(1))
    assert not table.find("b", tokens(1))


def test_a_prompt_longer_than_the_table_keeps_its_beginning():
    table = PrefixTable(2)
    table.add("a", tokens(1, 2, 3, 4))
    assert len(table.find("a", tokens(1, 2, 3, 4))) == 2


def test_no_room_at_all():
    table = PrefixTable(0)
    assert table.add("a", tokens(1)) == []
    assert table.find("a", tokens(1)) == []


@given(st.lists(st.tuples(st.sampled_from("ab"), st.lists(st.integers(0, 2), max_size=5)), max_size=40))
def test_found_blocks_hold_what_was_asked_for(steps):
    """Against the contents of the blocks."""
    table = PrefixTable(6)
    contents: dict[int, tuple[str, tuple[int, ...]]] = {}
    for composition, blocks in steps:
        for index, block in table.add(composition, tokens(*blocks)):
            contents[block] = (composition, tuple(blocks[: index + 1]))
        for i, block in enumerate(table.find(composition, tokens(*blocks))):
            assert contents[block] == (composition, tuple(blocks[: i + 1]))
        assert len(table) <= 6
