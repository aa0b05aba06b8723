"""Blocks of requests: allocation, prefix-cache hits and registration."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from vjax.kv.block_pool import BlockPool
from vjax.kv.hashing import extend_block_hashes
from vjax.request import Request


class KVCacheManager:
    """Keeps `request.block_ids`, `block_hashes` and `num_hashed_blocks` in step with the pool.

    A block is registered in the prefix cache when it is full of tokens that the host knows and the step that computes
    the last of them is scheduled: steps run in order and write all KV before attention reads, so a request scheduled
    later, in the same step too, can share it. Hashing a long prompt takes longer than all else that is done to
    schedule it: it waits until the step is on its way (`cache_noted_blocks`), or until somebody looks.

    Args:
        num_blocks: Blocks that exist, the null block included.
        block_size: Tokens per block.
        enable_caching: False: nothing is hashed, and nothing is ever found.
    """

    def __init__(self, num_blocks: int, block_size: int, enable_caching: bool):
        self.block_size = block_size
        self.pool = BlockPool(num_blocks, enable_caching)
        #: Requests with blocks that may be full and are not registered yet, in the order of their scheduling.
        self._noted: list[Request] = []

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def get_computed_blocks(self, request: Request) -> tuple[list[int], int]:
        """The longest cached prefix: its blocks (not held yet), and its number of tokens.

        At most `num_tokens - 1` tokens, floored to blocks: the last token is always computed, to have something to
        sample from. None for a request that must not read the cache.
        """
        if not self.pool.enable_caching or not request.reads_prefix_cache:
            return [], 0
        self.cache_noted_blocks()
        num_blocks = (request.num_tokens - 1) // self.block_size
        if not num_blocks or not self.pool.has_cached_blocks:
            return [], 0
        extend_block_hashes(request, self.block_size, 1)
        if self.pool.get_cached_block(request.block_hashes[0]) is None:
            return [], 0  # Most prompts are new: the rest of them need not be hashed now.
        extend_block_hashes(request, self.block_size)
        blocks: list[int] = []
        for block_hash in request.block_hashes[:num_blocks]:
            block = self.pool.get_cached_block(block_hash)
            if block is None:
                break
            blocks.append(block)
        return blocks, len(blocks) * self.block_size

    def fits(self, num_tokens: int, hit_blocks: Sequence[int]) -> bool:
        """Whether a request that holds nothing could get blocks for `num_tokens`, `hit_blocks` among them."""
        new = self.blocks_for(num_tokens) - len(hit_blocks)
        return new + self.pool.num_unheld(hit_blocks) <= self.pool.num_free

    def admit(self, request: Request, hit_blocks: Sequence[int]) -> None:
        """Makes the request a holder of cached blocks as its first ones."""
        assert not request.block_ids
        self.pool.touch(hit_blocks)
        request.block_ids = list(hit_blocks)
        request.num_hashed_blocks = len(hit_blocks)

    def allocate(self, request: Request, num_tokens: int) -> bool:
        """Extends the request's blocks until they hold `num_tokens`. False, and no change, when the pool cannot."""
        missing = self.blocks_for(num_tokens) - len(request.block_ids)
        if missing > self.pool.num_free:
            return False
        if missing > 0:
            request.block_ids += self.pool.get_new_blocks(missing)
        return True

    def note_full_blocks(self, request: Request) -> None:
        """As `cache_full_blocks`, with the next `cache_noted_blocks` or when it makes a difference."""
        if self.pool.enable_caching:
            self._noted.append(request)

    def cache_noted_blocks(self) -> None:
        """`cache_full_blocks` of what was noted."""
        if self._noted:
            noted, self._noted = self._noted, []
            for request in noted:
                self.cache_full_blocks(request)

    def cache_full_blocks(self, request: Request) -> None:
        """Registers the blocks that are full of known and scheduled tokens. Call it when a block may have filled."""
        full = min(request.num_computed_tokens, request.num_tokens) // self.block_size
        first = request.num_hashed_blocks
        if full <= first or not self.pool.enable_caching:
            return
        extend_block_hashes(request, self.block_size)
        for block, block_hash in zip(request.block_ids[first:full], request.block_hashes[first:full], strict=True):
            self.pool.cache_block(block, block_hash)
        request.num_hashed_blocks = full

    def take_back(self, request: Request, num_blocks: int) -> None:
        """After `num_computed_tokens` went back: forgets the hashes of blocks that are no longer full, and lets go of
        all blocks after the first `num_blocks`."""
        self.cache_noted_blocks()
        full = request.num_computed_tokens // self.block_size
        for block in request.block_ids[full : request.num_hashed_blocks]:
            self.pool.uncache(block)
        request.num_hashed_blocks = min(request.num_hashed_blocks, full)
        self.pool.free(reversed(request.block_ids[num_blocks:]))
        del request.block_ids[num_blocks:]

    def free(self, request: Request) -> None:
        """Lets go of all blocks, the last one first, so that the tail of a prefix is evicted before its head."""
        self.cache_noted_blocks()
        self.pool.free(reversed(request.block_ids))
        request.block_ids = []
        request.num_hashed_blocks = 0

    def check_integrity(self, requests: Iterable[Request]) -> None:
        """Asserts that `requests` are the holders of the pool's blocks, and that every hash was earned.

        A registered block is full of known tokens whose computation is scheduled.
        """
        holders = [0] * self.pool.num_blocks
        for request in requests:
            for block in request.block_ids:
                holders[block] += 1
            hashed = request.num_hashed_blocks
            assert len(set(request.block_ids)) == len(request.block_ids), "a request holds a block twice"
            assert request.num_computed_tokens <= len(request.block_ids) * self.block_size, "tokens without a block"
            assert hashed * self.block_size <= min(request.num_computed_tokens, request.num_tokens), "hash too early"
            for block, block_hash in zip(request.block_ids[:hashed], request.block_hashes, strict=False):
                assert self.pool.block_hash(block) == block_hash, "a block's hash is not its request's"
            for block in request.block_ids[hashed:]:
                assert self.pool.block_hash(block) is None, "a block has a hash that its request does not know of"
        self.pool.check_integrity(holders)
