"""Hopper decode attention, its plan and its kernels, against the dense float32 definition."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.ragged_paged_attention import reference
from pallas_kernels.ragged_paged_attention.plan_decode import (
    MIN_SHARED_KEYS,
    DecodeConfig,
    DecodePlan,
    DecodeShape,
    Piece,
    Seq,
    Stream,
    num_slots,
    plan_decode,
    slot_of_whole,
    tiling,
)
from pallas_kernels.ragged_paged_attention.shapes import MODELS
from tests.kernels.cases import (
    INTERPRET,
    RaggedBatch,
    assert_no_races,
    assert_tokens_close,
    batch_of_heads,
    decode_plan,
    needs_mosaic,
    on_gpu,
)


def run(batch: RaggedBatch, plan: DecodePlan, *, interpret: bool = True, **options: Any) -> np.ndarray:
    (got,) = runs(1, batch, plan, interpret=interpret, **options)
    return got


def runs(
    count: int, batch: RaggedBatch, plan: DecodePlan, *, interpret: bool = True, **options: Any
) -> list[np.ndarray]:
    """The results of several calls, compiled once."""
    from pallas_kernels.ragged_paged_attention.mosaic_decode import decode_attention

    attend = functools.partial(decode_attention, interpret=interpret, **{"scale": batch.q.shape[-1] ** -0.5, **options})
    attend = attend if interpret else jax.jit(attend)
    results = [np.asarray(attend(batch.q, batch.k_cache, batch.v_cache, plan), np.float32) for _ in range(count)]
    if interpret:
        assert_no_races()
    return results


def check(batch: RaggedBatch, plan: DecodePlan, *, interpret: bool = True, count: int = 1, **options: Any) -> None:
    """Against the reference; several calls agree to the bit."""
    got, *again = runs(count, batch, plan, interpret=interpret, **options)
    options = {"scale": batch.q.shape[-1] ** -0.5, **options}
    inputs = (batch.q, batch.k_cache, batch.v_cache, *batch.metadata)
    window = plan.shape.sliding_window
    wanted = np.asarray(reference.ragged_paged_attention(*inputs, sliding_window=window, **options))
    assert_tokens_close(got, wanted, batch.q.dtype.name)
    assert not got[batch.num_real_tokens :].any()
    for other in again:
        np.testing.assert_array_equal(other, got)


# (query heads, KV heads, head dim), block size, config
SHAPES = {
    "two_heads_a_box": ((8, 2, 64), 16, {"heads": 2, "columns": 64, "stages": 3, "ctas": 2}),
    "one_head_four_boxes": ((8, 1, 64), 16, {"heads": 1, "columns": 64, "stages": 2, "ctas": 3}),
    "groups_and_streams": ((32, 4, 64), 16, {"heads": 2, "columns": 64, "stages": 4, "streams": 2, "ctas": 2}),
    "three_streams": ((8, 8, 64), 16, {"heads": 8, "columns": 128, "stages": 2, "streams": 3, "ctas": 1}),
    "rows_of_seven": ((14, 2, 128), 32, {"heads": 2, "columns": 64, "stages": 3, "ctas": 2}),
    "part_of_a_block": ((8, 1, 128), 128, {"heads": 1, "columns": 64, "stages": 3, "ctas": 3, "staged": 128}),
    "wide_heads": ((8, 4, 256), 16, {"heads": 4, "columns": 64, "stages": 3, "ctas": 2, "unroll": 2}),
    "one_stream": ((8, 2, 64), 16, {"heads": 2, "columns": 64, "stages": 3, "ctas": 1}),
    "many_pieces": ((8, 2, 64), 16, {"heads": 2, "columns": 64, "stages": 3, "ctas": 7, "min_tiles": 1}),
}


@pytest.mark.parametrize("interpret", INTERPRET)
@pytest.mark.parametrize("name", SHAPES)
def test_decode(name: str, interpret: bool):
    heads, block_size, config = SHAPES[name]
    batch = batch_of_heads(1, [1, 1, 1], [200, 1, 64], heads, block_size, padding_seqs=2, padding_tokens=2)
    check(batch, decode_plan(batch, **config), interpret=interpret)


@pytest.mark.parametrize("interpret", INTERPRET)
@pytest.mark.parametrize("sliding_window", [None, 5, 70])
def test_several_tokens(sliding_window: int | None, interpret: bool):
    batch = batch_of_heads(2, [1, 5, 3, 2], [40, 139, 3, 200], (8, 2, 64), 16, padding_seqs=1, padding_tokens=3)
    config = {"heads": 2, "columns": 64, "stages": 3, "ctas": 3}
    check(batch, decode_plan(batch, max_q_len=5, sliding_window=sliding_window, **config), interpret=interpret)


@pytest.mark.parametrize("interpret", INTERPRET)
@pytest.mark.parametrize(("sliding_window", "soft_cap"), [(1, None), (70, 2.0), (None, 2.0)])
def test_options(sliding_window: int | None, soft_cap: float | None, interpret: bool):
    batch = batch_of_heads(3, [1, 1], [150, 40], (8, 2, 64), 16, dtype="float16")
    plan = decode_plan(batch, sliding_window=sliding_window, heads=2, columns=64, ctas=3, min_tiles=1)
    check(batch, plan, interpret=interpret, soft_cap=soft_cap, scale=0.5)


@pytest.mark.parametrize("interpret", INTERPRET)
def test_sinks(interpret: bool):
    """A sink adds its weight to the sum: the output shrinks by the share that the keys keep."""
    batch = batch_of_heads(4, [1, 1], [150, 20], (8, 2, 64), 16, poison=False)
    plan = decode_plan(batch, heads=2, columns=64, stages=3, ctas=2)
    sinks = np.linspace(-2, 8, 8, dtype=np.float32)
    got = run(batch, plan, interpret=interpret, sinks=jnp.asarray(sinks))
    wanted = np.array(
        reference.ragged_paged_attention(batch.q, batch.k_cache, batch.v_cache, *batch.metadata, scale=0.125)
    )
    for token, length in enumerate((150, 20)):
        blocks = batch.block_tables[batch.table_rows[token]]
        keys = np.asarray(batch.k_cache, np.float32)[blocks].swapaxes(0, 1).reshape(2, -1, 64)[:, :length]
        logits = np.einsum("hd,hkd->hk", np.asarray(batch.q, np.float32)[token], keys.repeat(4, axis=0)) * 0.125
        weight = np.exp(logits).sum(-1)
        wanted[token] *= (weight / (weight + np.exp(sinks)))[:, None]
    assert_tokens_close(got, wanted)


@needs_mosaic
def test_longer_sequences_are_left_out():
    """A sequence with more tokens is another kernel's, as are the padding tokens."""
    batch = batch_of_heads(5, [1, 9, 2], [100, 30, 50], (8, 2, 64), 16, padding_seqs=1, padding_tokens=2)
    plan = decode_plan(batch, max_q_len=2, heads=2, columns=64, stages=3, ctas=3)
    got = run(batch, plan, zero_padding=False)
    wanted = np.array(
        reference.ragged_paged_attention(batch.q, batch.k_cache, batch.v_cache, *batch.metadata, scale=0.125)
    )
    ours = [0, 10, 11]
    assert_tokens_close(got[ours], wanted[ours])


@pytest.mark.parametrize("interpret", INTERPRET)
@pytest.mark.parametrize("lengths", [[], [5]])
def test_little_or_no_work(lengths: list[int], interpret: bool):
    batch = batch_of_heads(6, [1] * max(len(lengths), 1), lengths or [5], (8, 2, 64), 16)
    if not lengths:
        zeros = {name: np.zeros_like(getattr(batch, name)) for name in ("table_rows", "cu_q_lens", "kv_lens")}
        batch = dataclasses.replace(batch, **zeros)
    check(batch, decode_plan(batch, heads=2, columns=64, stages=3, ctas=3), interpret=interpret)


@pytest.mark.parametrize("interpret", INTERPRET)
@pytest.mark.parametrize("columns", [64, 128])
def test_exact_weights_and_values(columns: int, interpret: bool):
    """Integer scores (base 2) and values: sums are exact, so that a wrong operand of P.V shows."""
    keys, heads, head_dim = 300, 8, 128
    batch = batch_of_heads(7, [1], [keys], (heads, 2, head_dim), 16)
    rng = np.random.default_rng(7)
    exponent, values = rng.integers(0, 7, (heads, keys)), rng.integers(-8, 9, (2, keys, head_dim))
    k_cache, v_cache = np.zeros(batch.k_cache.shape, np.float32), np.zeros(batch.v_cache.shape, np.float32)
    position = np.arange(keys)
    block, offset = batch.block_tables[batch.table_rows[0]][position // 16], position % 16
    for head in range(heads):
        k_cache[block, head // 4, offset, head] = -exponent[head]
    for kv_head in range(2):
        v_cache[block, kv_head, offset] = values[kv_head]
    q = np.eye(heads, head_dim, dtype=np.float32)[None]
    arrays = {"q": q, "k_cache": k_cache, "v_cache": v_cache}
    batch = dataclasses.replace(batch, **{name: jnp.asarray(x, jnp.bfloat16) for name, x in arrays.items()})
    weights = 2.0**-exponent
    wanted = np.einsum("hk,hkd->hd", weights, values.repeat(4, axis=0)) / weights.sum(-1, keepdims=True)
    for ctas in (1, 3):
        plan = decode_plan(batch, heads=2, columns=columns, stages=4, ctas=ctas)
        got = run(batch, plan, interpret=interpret, scale=math.log(2))[0]
        np.testing.assert_allclose(got, wanted, rtol=2.0**-8, atol=1e-6)


# (blocks that sequences share with the one before), keys, query heads, KV heads, head dim, config
PREFIXES = {
    "all": ([0] + [20] * 9, list(range(330, 350, 2)), (8, 2, 64), {"heads": 2, "columns": 64, "stages": 3, "ctas": 3}),
    "some": (
        [0, 20, 17, 30, 4, 18, 18, 18, 18, 0, 30, 30],
        [600, 350, 280, 500, 600, 300, 700, 300, 290, 40, 500, 490],
        (16, 4, 64),
        {"heads": 4, "stages": 2, "streams": 2, "ctas": 2},
    ),
    "uncut": ([0] + [16] * 3, [257, 260, 272, 290], (16, 4, 64), {"heads": 4, "stages": 2, "ctas": 1}),
    "crumbs": (
        [0] + [40] * 6,
        [641] * 7,
        (8, 2, 64),
        {"heads": 2, "columns": 64, "stages": 3, "ctas": 13, "min_tiles": 1, "unroll": 8},
    ),
}


def prefix_batch(seed: int, shared: list[int], kv_lens: list[int], heads: tuple[int, ...], **options: Any):
    """A batch of one token a sequence, each of which begins with so many of the blocks of the one before."""
    batch = batch_of_heads(seed, [1] * len(shared), kv_lens, heads, 16, poison=False, **options)
    tables = batch.block_tables.copy()
    for i, count in enumerate(shared):
        if count:
            tables[batch.table_rows[i], :count] = tables[batch.table_rows[i - 1], :count]
    owned = np.zeros((batch.k_cache.shape[0], 16), bool)
    for i, length in enumerate(kv_lens):
        position = np.arange(length)
        owned[tables[batch.table_rows[i]][position // 16], position % 16] = True
    caches = {
        name: jnp.where(owned[:, None, :, None], getattr(batch, name), jnp.nan).astype(batch.q.dtype)
        for name in ("k_cache", "v_cache")
    }
    return dataclasses.replace(batch, block_tables=tables, **caches)


@pytest.mark.parametrize("interpret", INTERPRET)
@pytest.mark.parametrize("name", PREFIXES)
def test_shared_prefixes(name: str, interpret: bool):
    *arguments, config = PREFIXES[name]
    batch = prefix_batch(10, *arguments, padding_seqs=3, padding_tokens=3)
    plan = decode_plan(batch, finds_prefixes=True, **config)
    assert (np.asarray(plan.pieces)[..., Piece.PREFIX_COUNT] > 0).any()
    check(batch, plan, interpret=interpret)


@pytest.mark.parametrize("seed", range(6))
def test_plan_finds_prefixes(seed: int):
    """Neighbours' common blocks are read once, every other key by its own sequence; every piece has its slot."""
    rng = np.random.default_rng(seed)
    count = int(rng.integers(20, 60))
    kv_lens = np.where(rng.random(count) < 0.95, rng.integers(300, 1500, count), 17).astype(np.int32)
    tables, names = np.zeros((count + 3, 100), np.int32), iter(range(1, 100_000))
    for row in range(count):
        shared = int(rng.choice([0, 20, 60], p=[0.05, 0.25, 0.7])) if row else 0
        tables[row] = [*tables[row - 1, :shared], *(next(names) for _ in range(100 - shared))]
    padded = count + 3
    kv_lens, cu_q_lens = np.pad(kv_lens, (0, 3)), np.minimum(np.arange(padded + 1), count).astype(np.int32)
    config = DecodeConfig(heads=2 + 2 * (seed % 2), streams=1 + seed % 2, ctas=5 + 20 * seed, min_tiles=1 + seed)
    shape = DecodeShape(padded, 32, 8, 128, 16, finds_prefixes=True)
    tiles = tiling(config, shape)
    make = functools.partial(plan_decode, shape=shape, config=config)
    plan = jax.jit(make)(tables, np.arange(padded, dtype=np.int32), cu_q_lens, kv_lens)
    seqs, pieces = np.asarray(plan.seqs), np.asarray(plan.pieces)
    assert tiles.sharing == (8 if seed % 2 == 0 else 4)

    served: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for number, stream in enumerate(np.asarray(plan.streams)):
        seq, group, tile, left = stream[: Stream.ITEMS]
        for _ in range(stream[Stream.ITEMS]):
            tiles_here = min(seqs[seq, Seq.TILES] - tile, left)
            whole = tiles_here == seqs[seq, Seq.TILES]
            if tiles_here:
                in_pieces = seq % (1 + tiles.sharing) == 0 or seqs[seq, Seq.FIRST_CELL] > 0
                slot = 2 * number + (tile == 0)
                if whole:
                    slot = slot_of_whole(config, tiles, seq, group) if in_pieces else 0
                served.setdefault((seq, group), []).append((slot, tiles_here))
            left, tile = left - tiles_here, 0
            seq, group = (seqs[seq, Seq.NEXT], 0) if group == tiles.groups - 1 else (seq, group + 1)
        assert left == 0
    slots = [slot for parts in served.values() for slot, _ in parts if slot]
    assert len(set(slots)) == len(slots)
    assert max(slots, default=0) < num_slots(config, tiles, len(seqs))
    for (seq, _), parts in served.items():
        assert sum(length for _, length in parts) == seqs[seq, Seq.TILES]

    shared_some = False
    for first in range(0, count, tiles.sharing):
        neighbours = range(first, min(first + tiles.sharing, count))
        common = 0
        while len(neighbours) > 1 and len({int(tables[s, common]) for s in neighbours}) == 1:
            common += 1
        keys = (
            min(common * 16, min((kv_lens[s] - 1) // 16 * 16 for s in neighbours)) // tiles.tile_keys * tiles.tile_keys
        )
        keys = keys if keys >= MIN_SHARED_KEYS else 0
        prefix = first // tiles.sharing * (1 + tiles.sharing)
        assert seqs[prefix, Seq.TILES] * tiles.tile_keys == keys
        shared_some |= keys > 0
        for i, s in enumerate(neighbours):
            row = prefix + 1 + i
            assert seqs[row, Seq.FIRST_CELL] * tiles.cell == keys
            assert seqs[row, Seq.TILES] == -(-(kv_lens[s] - keys) // tiles.tile_keys)
            for group in range(tiles.groups):
                piece = pieces[s, group]
                for of, slot, number in (
                    (row, piece[Piece.SLOT], piece[Piece.COUNT]),
                    (prefix, piece[Piece.PREFIX_SLOT], piece[Piece.PREFIX_COUNT]),
                ):
                    parts = served.get((of, group), [])
                    assert number == len(parts)
                    if number > 1 or (number and keys):
                        assert [slot, *(slot + 2 * j - 1 for j in range(1, number))] == [part for part, _ in parts]
                assert piece[Piece.PREFIX_ROW] == i * tiles.token_rows and piece[Piece.TOKEN] == s
    assert shared_some
    np.testing.assert_array_equal(pieces[count:, 0, Piece.COUNT], -1)


@pytest.mark.parametrize("seed", range(6))
def test_plan_covers_every_tile_once(seed: int):
    rng = np.random.default_rng(seed)
    q_lens = rng.integers(0, 4, 9)
    kv_lens = np.where(q_lens > 0, q_lens + rng.integers(0, 3000, 9), 0)
    shape = DecodeShape(int(q_lens.sum()) + 3, 32, 8, 128, 16, 3, None if seed % 2 else 700)
    config = DecodeConfig(heads=2, streams=1 + seed % 2, ctas=5 + 20 * seed, min_tiles=1 + seed)
    cu_q_lens = np.concatenate([[0], np.cumsum(q_lens)]).astype(np.int32)
    tables = np.zeros((10, 200), np.int32)
    rows = np.arange(9, dtype=np.int32)
    make = functools.partial(plan_decode, shape=shape, config=config)
    plan = jax.jit(make)(tables, rows, cu_q_lens, kv_lens.astype(np.int32))
    tiles, seqs, pieces = tiling(config, shape), np.asarray(plan.seqs), np.asarray(plan.pieces)

    first_key = 0 * kv_lens if shape.sliding_window is None else np.maximum(kv_lens - q_lens - 699, 0)
    cells = -(-kv_lens // tiles.cell) - first_key // tiles.cell
    np.testing.assert_array_equal(seqs[:, Seq.TILES], np.where(q_lens > 0, -(-cells // tiles.boxes), 0))
    served = {(s, g): [] for s in range(9) for g in range(tiles.groups)}
    for number, stream in enumerate(np.asarray(plan.streams)):
        seq, group, tile, left = stream[: Stream.ITEMS]
        for _ in range(stream[Stream.ITEMS]):
            count = min(seqs[seq, Seq.TILES] - tile, left)
            served[seq, group] += [(number, tile, count)] if count else []
            left, tile = left - count, 0
            seq, group = (seq + 1, 0) if group == tiles.groups - 1 else (seq, group + 1)
        assert left == 0
    for (seq, group), parts in served.items():
        assert sum(count for _, _, count in parts) == seqs[seq, Seq.TILES]
        for i in range(q_lens[seq]):
            piece = pieces[seq * shape.max_q_len + i, group]
            assert piece[Piece.COUNT] == len(parts)
            assert len(parts) == 1 or piece[Piece.SLOT] == 2 * parts[0][0] + 1
            assert piece[Piece.ROW] == i * tiles.token_rows and piece[Piece.TOKEN] == cu_q_lens[seq] + i
    padding = pieces[pieces[:, 0, Piece.COUNT] == -1]
    np.testing.assert_array_equal(padding[:, 0, Piece.TOKEN], np.arange(cu_q_lens[-1], shape.num_tokens))
    assert (padding[:, :, Piece.COUNT] == -1).all()
    assert (pieces[:, :, Piece.COUNT] != 0).all(axis=1).sum() == shape.num_tokens
    lengths = np.asarray(plan.streams)[:, Stream.TILES]
    assert lengths[lengths > 0].max() - lengths[lengths > 0].min() <= 1


def test_configs_that_do_not_fit():
    shape = DecodeShape(1, 32, 8, 128, 16)
    for config in ({"heads": 3}, {"heads": 8, "columns": 64}, {"heads": 8, "streams": 4}):
        with pytest.raises(ValueError, match="does not fit"):
            tiling(DecodeConfig(**config), shape)
    with pytest.raises(ValueError, match="fewer heads"):
        tiling(DecodeConfig(heads=8), dataclasses.replace(shape, max_q_len=5))


GPU_CASES = {
    "llama3_8b_b1_32k": ("llama3_8b", 16, [32768], {"heads": 2, "columns": 64, "stages": 10, "unroll": 32}),
    "llama3_8b_b1_short": ("llama3_8b", 16, [3], {"heads": 2, "columns": 64, "stages": 10}),
    "llama3_8b_b8": ("llama3_8b", 16, [8192, 1, 700, 64, 65, 8000, 4095, 129], {"heads": 8, "stages": 6}),
    "llama3_8b_b64": ("llama3_8b", 64, list(range(1, 4097, 64)), {"heads": 2, "stages": 2, "streams": 2}),
    "llama2_7b_b16": ("llama2_7b", 16, list(range(100, 3300, 200)), {"heads": 8, "stages": 6}),
    "llama2_7b_block128": ("llama2_7b", 128, list(range(100, 3300, 200)), {"heads": 1, "stages": 6}),
    "head_64_b4": ("llama3_1b", 16, [5000, 1, 64, 777], {"heads": 8, "stages": 5, "streams": 2}),
    "head_256_b4": ("gemma2_9b", 16, [5000, 1, 64, 777], {"heads": 4, "columns": 64, "stages": 5}),
}


@pytest.mark.parametrize("name", [pytest.param(name, marks=on_gpu) for name in GPU_CASES])
@pytest.mark.parametrize("window", [None, 1000])
def test_real_sizes(name: str, window: int | None):
    model, block_size, kv_lens, config = GPU_CASES[name]
    batch = batch_of_heads(8, [1] * len(kv_lens), kv_lens, MODELS[model], block_size, padding_seqs=1, padding_tokens=1)
    plan = decode_plan(batch, sliding_window=window, **config)
    check(batch, plan, interpret=False, count=21, soft_cap=None if window is None else 30.0)


@pytest.mark.parametrize("interpret", INTERPRET)
def test_several_tokens_as_tuned(interpret: bool):
    """The H200's entry for five tokens a sequence: staged and unrolled otherwise than the one-token entries."""
    q_lens, kv_lens = ([5, 1, 4], [300, 130, 4]) if interpret else ([5, 5, 1, 4, 3] * 13, [2048, 700, 130, 4, 66] * 13)
    batch = batch_of_heads(9, q_lens, kv_lens, MODELS["llama3_8b"], 16, padding_seqs=1, padding_tokens=2)
    config = {"heads": 2, "columns": 128, "stages": 4, "unroll": 2, "staged": 128, "ctas": 2 if interpret else 128}
    check(batch, decode_plan(batch, max_q_len=5, **config), interpret=interpret, count=1 if interpret else 21)
