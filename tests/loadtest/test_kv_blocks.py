"""Blocks of KV memory: what a prefix finds, who holds what, and what is forgotten first."""

from loadtest.simulator.kv_blocks import KvBlocks, block_hashes

NAMELESS = KvBlocks.NAMELESS


def filled(blocks: KvBlocks, *ids: int) -> list[int]:
    """A sequence takes so many blocks and fills them."""
    blocks.take(len(ids))
    return [blocks.name(block) for block in ids]


def test_only_full_blocks_of_equal_beginnings_are_found() -> None:
    blocks = KvBlocks(100)
    filled(blocks, *block_hashes([1, 2, 3, 4, 5, 6, 7, 8, 9], 4))
    assert blocks.known(block_hashes([1, 2, 3, 4, 5, 6, 7, 8, 9, 10], 4)) == 2
    assert blocks.known(block_hashes([1, 2, 3, 4, 0, 6, 7, 8], 4)) == 1
    assert blocks.known(block_hashes([0, 2, 3, 4, 5, 6, 7, 8], 4)) == 0


def test_what_was_let_go_of_longest_ago_is_forgotten_first() -> None:
    blocks = KvBlocks(3)
    for one in (1, 2, 3):
        blocks.let_go(filled(blocks, one))
    blocks.hold([1])
    blocks.let_go([1])
    blocks.take(1)
    assert [blocks.known([one]) for one in (1, 2, 3)] == [1, 0, 1]


def test_a_sequences_last_blocks_are_forgotten_before_its_first_and_nameless_ones_before_all() -> None:
    blocks = KvBlocks(3)
    blocks.let_go([*filled(blocks, 1, 2), *filled(blocks)])
    blocks.take(1)  # the third, which was never used
    blocks.let_go([NAMELESS])
    blocks.take(1)
    assert blocks.known([1, 2]) == 2
    blocks.take(1)
    assert blocks.known([1, 2]) == 1


def test_a_block_of_two_holders_is_free_when_both_have_let_go() -> None:
    blocks = KvBlocks(2)
    first = filled(blocks, 1)
    blocks.hold(first)
    assert blocks.free == 1 and blocks.idle([1]) == 0
    blocks.let_go(first)
    assert blocks.free == 1
    blocks.let_go(first)
    assert blocks.free == 2 and blocks.idle([1]) == 1


def test_a_twin_of_a_known_block_stays_nameless() -> None:
    blocks = KvBlocks(2)
    assert filled(blocks, 1) == [1]
    assert filled(blocks, 1) == [NAMELESS]


def test_what_was_taken_beyond_all_there_is_comes_back() -> None:
    blocks = KvBlocks(1)
    blocks.take(3)
    assert blocks.free == -2
    blocks.let_go([NAMELESS] * 3)
    assert blocks.free == 1
