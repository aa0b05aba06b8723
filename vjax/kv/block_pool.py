"""The physical KV blocks: who is free, in which order free ones are taken, and which hash each of them holds."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

#: Never allocated: padding writes and reads go there.
NULL_BLOCK = 0


class BlockPool:
    """Reference counts, the free list and the prefix-cache table of `num_blocks` blocks.

    A block without holders is on the free list, whether or not it still holds a hash. A free block with a hash is the
    prefix cache: a request may take it back (`touch`) until `get_new_blocks` takes it for something else and evicts
    the hash. Every operation is O(1) per block, among blocks of different content.

    The free list is a circular doubly linked list of block ids in two lists; the null block, which is never free,
    is its sentinel: next[0] is taken first, prev[0] last.

    Args:
        num_blocks: Blocks that exist, the null block included; at least 2.
        enable_caching: False: no block ever gets a hash.
    """

    def __init__(self, num_blocks: int, enable_caching: bool):
        assert num_blocks >= 2, "a pool holds the null block and at least one other"
        self.num_blocks = num_blocks
        self.enable_caching = enable_caching
        self.num_free = num_blocks - 1
        self._next = [*range(1, num_blocks), 0]
        self._prev = [num_blocks - 1, *range(num_blocks - 1)]
        self._ref_count = [0] * num_blocks
        self._hash: list[bytes | None] = [None] * num_blocks
        #: Blocks with a hash, oldest first: more than one where requests computed the same content side by side.
        self._cached: dict[bytes, list[int]] = {}

    @property
    def usage(self) -> float:
        """Fraction of the blocks that requests hold, in [0, 1]."""
        return (self.num_blocks - 1 - self.num_free) / (self.num_blocks - 1)

    def get_new_blocks(self, n: int) -> list[int]:
        """Takes `n` blocks from the front of the free list, with one holder each, and evicts their hashes."""
        assert n <= self.num_free, f"{n} blocks asked for, {self.num_free} are free"
        blocks, block = [], NULL_BLOCK
        following, hashes, ref_count = self._next, self._hash, self._ref_count
        for _ in range(n):
            block = following[block]
            blocks.append(block)
            ref_count[block] = 1
            if hashes[block] is not None:
                self.uncache(block)
        # All at once: they are neighbours, at the front.
        after = following[block]
        following[NULL_BLOCK], self._prev[after] = after, NULL_BLOCK
        self.num_free -= n
        return blocks

    def touch(self, block_ids: Iterable[int]) -> None:
        """Adds a holder to each block; a free one leaves the free list."""
        for block in block_ids:
            if self._ref_count[block] == 0:
                self._unlink(block)
            self._ref_count[block] += 1

    def free(self, block_ids: Iterable[int]) -> None:
        """Removes a holder from each block, in the order given.

        A block that loses its last holder goes to the back of the free list if it has a hash (least recently used is
        evicted first), else to the front (its content is worthless, and its memory was used last).
        """
        following, before, hashes, ref_count = self._next, self._prev, self._hash, self._ref_count
        for block in block_ids:
            count = ref_count[block]
            assert count > 0, f"block {block} is freed and has no holder"
            ref_count[block] = count - 1
            if count > 1:
                continue
            if hashes[block] is None:
                left, right = NULL_BLOCK, following[NULL_BLOCK]
            else:
                left, right = before[NULL_BLOCK], NULL_BLOCK
            following[left] = before[right] = block
            before[block], following[block] = left, right
            self.num_free += 1

    def num_unheld(self, block_ids: Iterable[int]) -> int:
        """How many of the blocks are on the free list: `touch` would take these from `num_free`."""
        ref_count = self._ref_count
        return sum(ref_count[block] == 0 for block in block_ids)

    @property
    def has_cached_blocks(self) -> bool:
        """Whether any block has a hash."""
        return bool(self._cached)

    def cache_block(self, block_id: int, block_hash: bytes) -> None:
        """Registers a held block under its hash. Equal blocks are not merged: a hash may have several."""
        assert self.enable_caching and self._hash[block_id] is None and self._ref_count[block_id] > 0
        self._hash[block_id] = block_hash
        self._cached.setdefault(block_hash, []).append(block_id)

    def get_cached_block(self, block_hash: bytes) -> int | None:
        """A block with this hash, held or free."""
        blocks = self._cached.get(block_hash)
        return blocks[0] if blocks else None

    def uncache(self, block_id: int) -> None:
        """Forgets the block's hash, if it has one."""
        block_hash = self._hash[block_id]
        if block_hash is None:
            return
        self._hash[block_id] = None
        blocks = self._cached[block_hash]
        blocks.remove(block_id)
        if not blocks:
            del self._cached[block_hash]

    def reset(self) -> bool:
        """Forgets all hashes. False, and no change, while a request holds a block."""
        if self.num_free != self.num_blocks - 1:
            return False
        self._hash = [None] * self.num_blocks
        self._cached.clear()
        return True

    def block_hash(self, block_id: int) -> bytes | None:
        return self._hash[block_id]

    def cached_block_ids(self) -> frozenset[int]:
        """Every block with a hash, held or free."""
        return frozenset(block for blocks in self._cached.values() for block in blocks)

    def check_integrity(self, holders: Sequence[int]) -> None:
        """Asserts that the pool is consistent. `holders[block]` is the number of requests that hold the block."""
        assert self._ref_count == list(holders), "reference counts differ from the holders"
        free, block = [], self._next[NULL_BLOCK]
        while block != NULL_BLOCK:
            assert self._prev[self._next[block]] == block and len(free) < self.num_blocks, "free list is broken"
            free.append(block)
            block = self._next[block]
        assert len(free) == self.num_free, "num_free differs from the free list"
        assert set(free) == {b for b in range(1, self.num_blocks) if not holders[b]}, "the free list is not the unheld"
        table = {(h, b) for h, blocks in self._cached.items() for b in blocks}
        assert len(table) == sum(map(len, self._cached.values())) and all(self._cached.values())
        assert table == {(h, b) for b, h in enumerate(self._hash) if h is not None}, "hash table and blocks differ"
        assert not holders[NULL_BLOCK] and self._hash[NULL_BLOCK] is None, "the null block is in use"

    def _unlink(self, block: int) -> None:
        before, after = self._prev[block], self._next[block]
        self._next[before] = after
        self._prev[after] = before
        self.num_free -= 1
