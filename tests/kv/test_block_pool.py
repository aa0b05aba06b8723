from __future__ import annotations

import random
from collections import Counter

import pytest

from vjax.kv.block_pool import NULL_BLOCK, BlockPool


def h(n: int) -> bytes:
    return n.to_bytes(32, "little")


def check(pool: BlockPool, *held: list[int]) -> None:
    counts = Counter(block for blocks in held for block in blocks)
    pool.check_integrity([counts[block] for block in range(pool.num_blocks)])


def test_null_block_is_never_given_out() -> None:
    pool = BlockPool(5, True)
    assert pool.num_free == 4
    blocks = pool.get_new_blocks(4)
    assert sorted(blocks) == [1, 2, 3, 4] and NULL_BLOCK not in blocks
    assert pool.usage == 1.0
    check(pool, blocks)
    with pytest.raises(AssertionError):
        pool.get_new_blocks(1)
    pool.free(blocks)
    assert pool.usage == 0.0
    check(pool)


def test_unhashed_blocks_are_taken_first_latest_first() -> None:
    pool = BlockPool(8, True)
    held = pool.get_new_blocks(4)
    pool.free(held[:2])
    pool.free(held[2:])
    assert pool.get_new_blocks(4) == held[::-1]


def test_hashed_blocks_are_evicted_least_recently_used_first() -> None:
    pool = BlockPool(5, True)
    blocks = pool.get_new_blocks(4)
    for block in blocks:
        pool.cache_block(block, h(block))
    pool.free([blocks[2], blocks[0], blocks[3], blocks[1]])
    assert all(pool.get_cached_block(h(block)) == block for block in blocks)
    # A hit makes a block the most recently used one.
    pool.touch([blocks[2]])
    pool.free([blocks[2]])
    assert pool.get_new_blocks(2) == [blocks[0], blocks[3]]
    assert pool.get_cached_block(h(blocks[0])) is None
    assert pool.get_cached_block(h(blocks[2])) == blocks[2]
    check(pool, [blocks[0], blocks[3]])


def test_unhashed_are_taken_before_hashed() -> None:
    pool = BlockPool(4, True)
    blocks = pool.get_new_blocks(3)
    pool.cache_block(blocks[0], h(1))
    pool.free(blocks)
    assert pool.get_new_blocks(2) == [blocks[2], blocks[1]]
    assert pool.get_cached_block(h(1)) == blocks[0]


def test_touch_shares_and_revives() -> None:
    pool = BlockPool(4, True)
    (block,) = pool.get_new_blocks(1)
    pool.cache_block(block, h(1))
    pool.touch([block])
    assert pool.num_unheld([block]) == 0
    pool.free([block])
    assert pool.num_free == 2
    pool.free([block])
    assert pool.num_free == 3 and pool.num_unheld([block, block]) == 2
    pool.touch([block])
    assert pool.num_free == 2
    check(pool, [block])


def test_duplicates_are_not_merged() -> None:
    pool = BlockPool(4, True)
    a, b = pool.get_new_blocks(2)
    pool.cache_block(a, h(1))
    pool.cache_block(b, h(1))
    assert pool.get_cached_block(h(1)) == a
    pool.uncache(a)
    assert pool.get_cached_block(h(1)) == b
    pool.uncache(b)
    pool.uncache(b)
    assert pool.get_cached_block(h(1)) is None
    check(pool, [a, b])


def test_reset_needs_all_blocks() -> None:
    pool = BlockPool(4, True)
    a, b = pool.get_new_blocks(2)
    pool.cache_block(a, h(1))
    pool.free([a])
    assert not pool.reset()
    assert pool.get_cached_block(h(1)) == a
    pool.free([b])
    assert pool.reset()
    assert pool.get_cached_block(h(1)) is None
    check(pool)


def test_integrity_check_sees_damage() -> None:
    pool = BlockPool(6, True)
    blocks = pool.get_new_blocks(2)
    check(pool, blocks)
    with pytest.raises(AssertionError, match="reference counts"):
        check(pool, blocks, blocks)
    pool.num_free -= 1
    with pytest.raises(AssertionError, match="num_free"):
        check(pool, blocks)


def test_random_operations() -> None:
    r = random.Random(0)
    pool = BlockPool(20, True)
    held: list[list[int]] = []
    for _ in range(3000):
        known = [block for n in range(12) if (block := pool.get_cached_block(h(n))) is not None]
        choice = r.randrange(5)
        if choice == 0 and pool.num_free:
            held.append(pool.get_new_blocks(r.randint(1, pool.num_free)))
        elif choice == 1 and held:
            pool.free(held.pop(r.randrange(len(held))))
        elif choice == 2 and known:
            held.append([r.choice(known)])
            pool.touch(held[-1])
        elif choice == 3 and held:
            block = r.choice(r.choice(held))
            if pool.block_hash(block) is None:
                pool.cache_block(block, h(r.randrange(12)))
        elif choice == 4 and known:
            pool.uncache(r.choice(known))
        check(pool, *held)
