"""The work of one decode step's attention, cut into equal streams on the device; built once a step, for every layer.

An item is one sequence and `heads` KV heads. Its keys come in tiles. The tiles of all items, one after the other, are
cut into as many nearly equal streams as there are warpgroups to work on them, wherever that cuts an item (stream-K,
Osama et al., arXiv 2301.03598): there are no waves and no tail. An item that lies in one stream is finished there.
The others leave a piece in each of their streams, and a second kernel combines those.
"""

from __future__ import annotations

import dataclasses
import enum

import jax
import jax.numpy as jnp

TILE_ROWS = 64
"""Rows (query tokens x query heads) of an item: the M of one wgmma."""


class Seq(enum.IntEnum):
    """Columns of DecodePlan.seqs: tiles of an item, first cell that is read, keys, first token, tokens, table row."""

    TILES = 0
    FIRST_CELL = 1
    KV_LEN = 2
    Q_START = 3
    Q_LEN = 4
    TABLE_ROW = 5


class Stream(enum.IntEnum):
    """Columns of DecodePlan.streams: first item and its first tile, tiles and items, then the first item's Seq."""

    SEQ = 0
    GROUP = 1
    TILE = 2
    TILES = 3
    ITEMS = 4
    FIRST_ITEM = 5


class Piece(enum.IntEnum):
    """Columns of DecodePlan.pieces: first stream of an item, its streams (-1: padding token, 0: nothing), the token's
    first row in it, the token."""

    STREAM = 0
    COUNT = 1
    ROW = 2
    TOKEN = 3


@dataclasses.dataclass(frozen=True)
class DecodeConfig:
    """How the decode kernel runs; what it computes does not depend on it.

    Attributes:
        heads: KV heads of an item. The blocks of neighbouring heads are contiguous, so one TMA brings them all.
        columns: Keys x heads of a tile: the N of the score wgmma, 64 or 128.
        stages: Tiles of K or V in the ring of a stream.
        streams: Streams of a CTA, each with a warpgroup of its own, 1 to 3.
        ctas: CTAs, one for each SM.
        min_tiles: Least tiles of a stream, so that short contexts are not cut into crumbs.
        unroll: Pieces that the combining kernel loads at once.
        staged: Columns of a float32 result that leave through shared memory at once.
        converted: Tiles of an fp8 cache that a stream has in f16: 1, which K and V take in turns, or 2, so that values
            are converted while scores are computed. Other caches need none.
    """

    heads: int
    columns: int = 128
    stages: int = 4
    streams: int = 1
    ctas: int = 132
    min_tiles: int = 2
    unroll: int = 4
    staged: int = 64
    converted: int = 1

    @property
    def num_streams(self) -> int:
        return self.streams * self.ctas


@dataclasses.dataclass(frozen=True)
class DecodeShape:
    """Static shape of a decode step.

    Attributes:
        num_tokens: T of q, padding included.
        num_q_heads, num_kv_heads, head_dim, block_size: Of the model and its cache.
        max_q_len: Most query tokens that a sequence may have here.
        sliding_window: As in the API; sets which tiles are read.
    """

    num_tokens: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    max_q_len: int = 1
    sliding_window: int | None = None

    @property
    def group_size(self) -> int:
        return self.num_q_heads // self.num_kv_heads


@dataclasses.dataclass(frozen=True)
class Tiling:
    """What a config makes of a shape.

    Attributes:
        groups: Groups of `heads` KV heads, items of a sequence.
        token_rows: Rows of one query token in an item, rounded up to a multiple of 8.
        box_rows: Rows (heads x keys) that one TMA brings.
        cell: Keys that one TMA brings: a block, or a part of one.
        parts: Cells of a block.
        boxes: TMA copies of a tile.
        tile_keys: Keys of a tile.
    """

    groups: int
    token_rows: int
    box_rows: int
    cell: int
    parts: int
    boxes: int

    @property
    def tile_keys(self) -> int:
        return self.cell * self.boxes


def tiling(config: DecodeConfig, shape: DecodeShape) -> Tiling:
    """ValueError when the config does not fit the shape."""
    block_rows = config.heads * shape.block_size
    token_rows = -(-config.heads * shape.group_size // 8) * 8
    parts = max(1, block_rows // config.columns) if config.heads == 1 else 1
    box_rows = block_rows // parts
    if shape.num_kv_heads % config.heads or config.columns % box_rows or config.streams not in (1, 2, 3):
        raise ValueError(f"{config} does not fit {shape}")
    if token_rows * shape.max_q_len > TILE_ROWS:
        raise ValueError(
            f"{shape.max_q_len} tokens x {token_rows} rows are more than the {TILE_ROWS} of a tile: fewer heads than "
            f"{config.heads} to an item, or fewer tokens"
        )
    return Tiling(
        groups=shape.num_kv_heads // config.heads,
        token_rows=token_rows,
        box_rows=box_rows,
        cell=shape.block_size // parts,
        parts=parts,
        boxes=config.columns // box_rows,
    )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodePlan:
    """Streams of one step.

    Attributes:
        block_tables: i32[N, B], as passed to plan_decode.
        streams: i32[num_streams, 16], columns Stream.
        seqs: i32[S, 8], columns Seq.
        pieces: i32[S * max_q_len, groups, 4], columns Piece: the item that a token is in. The i-th token of sequence s
            is at s * max_q_len + i; places that no token takes have padding tokens, as long as there are any.
        config, shape: static.
    """

    block_tables: jax.Array
    streams: jax.Array
    seqs: jax.Array
    pieces: jax.Array
    config: DecodeConfig = dataclasses.field(metadata={"static": True})
    shape: DecodeShape = dataclasses.field(metadata={"static": True})


def plan_decode(
    block_tables: jax.Array,
    table_rows: jax.Array,
    cu_q_lens: jax.Array,
    kv_lens: jax.Array,
    shape: DecodeShape,
    config: DecodeConfig,
) -> DecodePlan:
    """Cuts a step's decode rows into streams, on the device, by comparison with prefix sums: no sort and no loop.

    The arrays are those of plan_attention. Sequences with more than shape.max_q_len tokens are left out: another
    kernel serves them. Work must stay below 2**31 / num_streams tiles for each stream, which any cache does.
    """
    tiles_of = tiling(config, shape)
    q_lens = cu_q_lens[1:] - cu_q_lens[:-1]
    serves = (q_lens > 0) & (q_lens <= shape.max_q_len)
    first_key = jnp.zeros_like(kv_lens)
    if shape.sliding_window is not None:
        first_key = jnp.maximum(kv_lens - q_lens - (shape.sliding_window - 1), 0)
    first_cell = first_key // tiles_of.cell
    cells = (kv_lens + (tiles_of.cell - 1)) // tiles_of.cell - first_cell
    seq_tiles = jnp.where(serves, (cells + (tiles_of.boxes - 1)) // tiles_of.boxes, 0)
    ends = jnp.cumsum(seq_tiles * tiles_of.groups, dtype=jnp.int32)
    begins = ends - seq_tiles * tiles_of.groups
    seqs = _columns([seq_tiles, first_cell, kv_lens, cu_q_lens[:-1], q_lens, table_rows], 8)
    cut = _Cut(ends[-1], config)
    return DecodePlan(
        block_tables=block_tables,
        streams=_streams(cut, seqs, begins, ends, tiles_of.groups),
        seqs=seqs,
        pieces=_pieces(cut, cu_q_lens, serves, seq_tiles, begins, tiles_of, shape),
        config=config,
        shape=shape,
    )


class _Cut:
    """`total` tiles in nearly equal shares: `rest` streams of `share` + 1, then streams of `share`, then idle ones."""

    def __init__(self, total: jax.Array, config: DecodeConfig) -> None:
        self.total, self.num_streams = total, config.num_streams
        self.active = jnp.clip(total // config.min_tiles, 1, config.num_streams)
        self.share = total // self.active
        self.rest = total - self.share * self.active

    def begin(self, stream: jax.Array) -> jax.Array:
        return jnp.minimum(stream * self.share + jnp.minimum(stream, self.rest), self.total)

    def stream(self, tile: jax.Array) -> jax.Array:
        """The stream of a tile; anything when there is no such tile."""
        longer = self.rest * (self.share + 1)
        return jnp.where(
            tile < longer,
            tile // (self.share + 1),
            self.rest + (tile - longer) // jnp.maximum(self.share, 1),
        )


def _columns(columns: list[jax.Array], width: int) -> jax.Array:
    """i32[..., width] of up to `width` i32[...]."""
    zeros = [jnp.zeros_like(columns[0])] * (width - len(columns))
    return jnp.stack(columns + zeros, axis=-1)


def _streams(cut: _Cut, seqs: jax.Array, begins: jax.Array, ends: jax.Array, groups: int) -> jax.Array:
    stream = jnp.arange(cut.num_streams, dtype=jnp.int32)
    begin, end = cut.begin(stream), cut.begin(stream + 1)
    last_row = jnp.int32(seqs.shape[0] - 1)

    def item(tile: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        seq = jnp.minimum(jnp.sum(tile[:, None] >= ends[None, :], axis=1, dtype=jnp.int32), last_row)
        offset, length = tile - begins[seq], jnp.maximum(seqs[seq, Seq.TILES], 1)
        return seq, offset // length, offset % length

    seq, group, tile = item(begin)
    last_seq, last_group, _ = item(end - 1)
    items = jnp.where(end > begin, (last_seq - seq) * groups + last_group - group + 1, 0)
    return _columns([seq, group, tile, end - begin, items, *jnp.moveaxis(seqs[seq, : len(Seq)], 1, 0)], 16)


def _pieces(
    cut: _Cut,
    cu_q_lens: jax.Array,
    serves: jax.Array,
    seq_tiles: jax.Array,
    begins: jax.Array,
    tiles: Tiling,
    shape: DecodeShape,
) -> jax.Array:
    begin = begins[:, None] + seq_tiles[:, None] * jnp.arange(tiles.groups, dtype=jnp.int32)
    first = cut.stream(begin)
    count = cut.stream(begin + seq_tiles[:, None] - 1) - first + 1

    index = jnp.arange(shape.max_q_len, dtype=jnp.int32)
    used = serves[:, None] & (index < (cu_q_lens[1:] - cu_q_lens[:-1])[:, None])
    place = jnp.arange(used.size, dtype=jnp.int32).reshape(used.shape)
    padding = place - cu_q_lens[1:, None] + cu_q_lens[-1]  # the places not taken, where every sequence is served
    token = jnp.where(used, cu_q_lens[:-1, None] + index, jnp.minimum(padding, shape.num_tokens - 1))
    unused = jnp.where(padding < shape.num_tokens, -1, 0)

    def by_place(x: jax.Array) -> jax.Array:
        return jnp.broadcast_to(x, (*used.shape, tiles.groups)).reshape(-1, tiles.groups)

    counts = jnp.where(used[..., None], count[:, None], unused[..., None])
    rows = (index * tiles.token_rows)[:, None]
    return jnp.stack([by_place(x) for x in (first[:, None], counts, rows, token[..., None])], axis=-1)
