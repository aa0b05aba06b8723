from __future__ import annotations

import pytest

from tests.scheduler.simulation import make_request
from vjax.kv.manager import KVCacheManager
from vjax.request import Request


def request(prompt: list[int], salt: str | None = None) -> Request:
    return Request.from_engine_request(make_request("r", prompt, salt=salt), max_model_len=1000)


def prefill(kv: KVCacheManager, r: Request) -> int:
    """Admits and computes the whole request; returns the number of cached tokens."""
    hits, cached = kv.get_computed_blocks(r)
    kv.admit(r, hits)
    assert kv.allocate(r, r.num_tokens)
    r.num_computed_tokens = r.num_tokens
    kv.cache_full_blocks(r)
    return cached


@pytest.mark.parametrize(("length", "hit"), [(32, 16), (33, 32), (16, 0), (31, 16), (48, 32)])
def test_hit_is_at_most_all_but_one_token(length: int, hit: int) -> None:
    kv = KVCacheManager(32, 16, True)
    first, second = request(list(range(length))), request(list(range(length)))
    assert prefill(kv, first) == 0
    assert prefill(kv, second) == hit
    assert second.block_ids[: hit // 16] == first.block_ids[: hit // 16]
    assert not set(second.block_ids[hit // 16 :]) & set(first.block_ids)
    kv.check_integrity([first, second])


def test_blocks_outlive_their_request() -> None:
    kv = KVCacheManager(8, 4, True)
    first = request(list(range(10)))
    prefill(kv, first)
    blocks = first.block_ids
    kv.free(first)
    assert (first.block_ids, first.num_hashed_blocks) == ([], 0)
    assert kv.get_computed_blocks(request(list(range(9)))) == (blocks[:2], 8)
    assert kv.get_computed_blocks(request([5, *range(1, 9)])) == ([], 0)
    assert kv.get_computed_blocks(request(list(range(9)), salt="s")) == ([], 0)


def test_tail_of_a_prefix_is_evicted_before_its_head() -> None:
    kv = KVCacheManager(4, 4, True)
    first = request(list(range(12)))
    prefill(kv, first)
    head = first.block_ids[:2]
    kv.free(first)
    other = request([99])
    prefill(kv, other)
    assert kv.get_computed_blocks(request(list(range(12)))) == (head, 8)


def test_allocate_changes_nothing_when_it_fails() -> None:
    kv = KVCacheManager(4, 4, True)
    r = request(list(range(12)))
    assert kv.allocate(r, 8)
    held = list(r.block_ids)
    assert not kv.allocate(r, 17)
    assert r.block_ids == held
    assert kv.allocate(r, 8) and r.block_ids == held
    assert kv.allocate(r, 12) and r.block_ids[:2] == held


def test_fits_counts_free_hits_once() -> None:
    kv = KVCacheManager(4, 4, True)
    first = request(list(range(8)))
    prefill(kv, first)
    second = request(list(range(13)))
    hits, _ = kv.get_computed_blocks(second)
    assert len(hits) == 2
    assert kv.fits(12, hits) and not kv.fits(13, hits)
    kv.free(first)
    assert kv.fits(12, hits) and not kv.fits(13, hits)


def test_a_block_is_registered_when_it_is_known_and_computed() -> None:
    kv = KVCacheManager(8, 4, True)
    r = request([1, 2, 3])
    kv.allocate(r, 4)
    # The fourth token's computation is scheduled, but the host does not know it.
    r.num_computed_tokens, r.num_placeholders = 4, 1
    kv.cache_full_blocks(r)
    assert r.num_hashed_blocks == 0
    r.token_ids.append(4)
    kv.cache_full_blocks(r)
    assert r.num_hashed_blocks == 1
    kv.check_integrity([r])
    # The other way round: known, not computed.
    r.token_ids += [5, 6, 7, 8]
    kv.allocate(r, 8)
    r.num_computed_tokens = 7
    kv.cache_full_blocks(r)
    assert r.num_hashed_blocks == 1


def test_take_back() -> None:
    kv = KVCacheManager(8, 4, True)
    r = request(list(range(12)))
    prefill(kv, r)
    r.num_computed_tokens = 4
    kv.take_back(r, 2)
    assert len(r.block_ids) == 2 and r.num_hashed_blocks == 1
    assert kv.pool.block_hash(r.block_ids[1]) is None
    kv.check_integrity([r])


def test_integrity_check_sees_a_hash_that_was_not_earned() -> None:
    kv = KVCacheManager(8, 4, True)
    r = request(list(range(8)))
    prefill(kv, r)
    r.num_computed_tokens = 7
    with pytest.raises(AssertionError, match="hash too early"):
        kv.check_integrity([r])


def test_without_caching_nothing_is_hashed() -> None:
    kv = KVCacheManager(8, 4, False)
    first = request(list(range(9)))
    assert prefill(kv, first) == 0
    assert kv.get_computed_blocks(request(list(range(9)))) == ([], 0)
    assert first.block_hashes == []
    kv.check_integrity([first])


def scheduled(kv: KVCacheManager) -> Request:
    """One of nine tokens, 0 to 8, whose full blocks are noted."""
    r = request(list(range(9)))
    kv.allocate(r, 9)
    r.num_computed_tokens = 9
    kv.note_full_blocks(r)
    return r


@pytest.mark.parametrize("settle", [KVCacheManager.cache_noted_blocks, None], ids=["settled", "looked_for"])
def test_noted_blocks_are_found(settle) -> None:
    """By the next request too, which may be scheduled in the same step."""
    kv = KVCacheManager(32, 4, True)
    first, second = scheduled(kv), request(list(range(9)))
    assert first.num_hashed_blocks == 0 and first.block_hashes == []
    if settle is not None:
        settle(kv)
        assert first.num_hashed_blocks == 2
    assert kv.get_computed_blocks(second) == (first.block_ids[:2], 8)
    kv.check_integrity([first])


def test_noted_blocks_stay_when_their_request_ends() -> None:
    kv = KVCacheManager(32, 4, True)
    first = scheduled(kv)
    blocks = first.block_ids[:2]
    kv.free(first)
    kv.check_integrity([])
    assert kv.get_computed_blocks(request(list(range(9)))) == (blocks, 8)


def test_noted_blocks_that_are_taken_back_are_not_registered() -> None:
    kv = KVCacheManager(32, 4, True)
    first = scheduled(kv)
    first.num_computed_tokens = 4
    kv.take_back(first, 1)
    kv.check_integrity([first])
    assert kv.get_computed_blocks(request(list(range(9)))) == (first.block_ids[:1], 4)


def test_only_the_first_block_of_a_new_prompt_is_hashed_to_look_for_it() -> None:
    kv = KVCacheManager(32, 4, True)
    new = request(list(range(100, 120)))
    assert kv.get_computed_blocks(new) == ([], 0) and new.block_hashes == []
    prefill(kv, request(list(range(12))))
    assert kv.get_computed_blocks(new) == ([], 0) and len(new.block_hashes) == 1
    other = request(list(range(12)))
    assert kv.get_computed_blocks(other)[1] == 8 and len(other.block_hashes) == 3
