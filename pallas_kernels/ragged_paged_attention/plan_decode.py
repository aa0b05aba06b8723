"""The work of one decode step's attention, cut into equal streams on the device; built once a step, for every layer.

An item is one sequence and `heads` KV heads. Its keys come in tiles. The tiles of all items, one after the other, are
cut into as many nearly equal streams as there are warpgroups to work on them, wherever that cuts an item (stream-K,
Osama et al., arXiv 2301.03598): there are no waves and no tail. An item that lies in one stream is finished there.
The others leave a piece in each of their streams, and a second kernel combines those.

Neighbouring sequences whose block tables begin with the same blocks, such as samples of one prompt, have these keys in
an item of their own, a prefix, with the query tokens of all of them as rows: the keys are read once, and an item of one
token would leave most rows of its wgmma empty. The sequences' own items begin behind the prefix. Hydragen (Juravsky et
al., arXiv 2402.05099) and vLLM's cascade attention do so for one prefix of the whole batch.
"""

from __future__ import annotations

import dataclasses
import enum
from typing import Any

import jax
import jax.numpy as jnp

TILE_ROWS = 64
"""Rows (query tokens x query heads) of an item: the M of one wgmma."""

MIN_SHARED_KEYS = 256
"""Least length of a prefix. A sequence with a prefix pays for a piece of float32 that is written and read."""


class Seq(enum.IntEnum):
    """Columns of DecodePlan.seqs: tiles of an item, first cell that is read, keys, first token, tokens (of a prefix as
    many as may share it, some of which may be padding), table row; the row of `seqs` after this one, but for prefixes
    of nothing."""

    TILES = 0
    FIRST_CELL = 1
    KV_LEN = 2
    Q_START = 3
    Q_LEN = 4
    TABLE_ROW = 5
    NEXT = 6


class Stream(enum.IntEnum):
    """Columns of DecodePlan.streams: first item and its first tile, tiles and items, then the first item's Seq."""

    SEQ = 0
    GROUP = 1
    TILE = 2
    TILES = 3
    ITEMS = 4
    FIRST_ITEM = 5


class Piece(enum.IntEnum):
    """Columns of DecodePlan.pieces: slot of an item's first piece, its pieces (-1: padding token, 0: nothing), the
    token's first row in it, the token; the same of its prefix, which has 0 pieces where there is none.

    Pieces after the first one, of slot s, are in slots s + 1, s + 3, s + 5 and so on.
    """

    SLOT = 0
    COUNT = 1
    ROW = 2
    TOKEN = 3
    PREFIX_SLOT = 4
    PREFIX_COUNT = 5
    PREFIX_ROW = 6


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
        finds_prefixes: Look for prefixes that neighbours share. Only where max_q_len is 1 and there is no window, and
            token s is sequence s's.
    """

    num_tokens: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    max_q_len: int = 1
    sliding_window: int | None = None
    finds_prefixes: bool = False

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
        sharing: Neighbouring sequences that may share a prefix, as many as the rows of an item hold; 1: none.
        tile_keys: Keys of a tile.
    """

    groups: int
    token_rows: int
    box_rows: int
    cell: int
    parts: int
    boxes: int
    sharing: int

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
    if shape.finds_prefixes and (shape.max_q_len > 1 or shape.sliding_window is not None):
        raise ValueError(f"{shape}: prefixes are shared by sequences of one token, without a window")
    return Tiling(
        groups=shape.num_kv_heads // config.heads,
        token_rows=token_rows,
        box_rows=box_rows,
        cell=shape.block_size // parts,
        parts=parts,
        boxes=config.columns // box_rows,
        sharing=TILE_ROWS // token_rows if shape.finds_prefixes else 1,
    )


def num_slots(config: DecodeConfig, tiles: Tiling, num_rows: int) -> int:
    """Slots of pieces: two for each stream, and with prefixes one for each item of a plan of num_rows `seqs`."""
    return slot_of_whole(config, tiles, num_rows, 0) if tiles.sharing > 1 else 2 * config.num_streams


def slot_of_whole(config: DecodeConfig, tiles: Tiling, row: Any, group: Any) -> Any:
    """The slot of an item that lies in one stream, but has a prefix or is one."""
    return 2 * config.num_streams + row * tiles.groups + group


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodePlan:
    """Streams of one step.

    Attributes:
        block_tables: i32[N, B], as passed to plan_decode.
        streams: i32[num_streams, 16], columns Stream.
        seqs: i32[S, 8], columns Seq. With prefixes each `sharing` sequences follow a row for theirs, which has no
            tiles where they share nothing; S is rounded up to a multiple of `sharing` then.
        pieces: i32[S * max_q_len, groups, 8], columns Piece: the item that a token is in. The i-th token of sequence s
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
    tiles = tiling(config, shape)
    q_lens = cu_q_lens[1:] - cu_q_lens[:-1]
    serves = (q_lens > 0) & (q_lens <= shape.max_q_len)
    first_key = jnp.zeros_like(kv_lens)
    if shape.sliding_window is not None:
        first_key = jnp.maximum(kv_lens - q_lens - (shape.sliding_window - 1), 0)
    num_seqs, q_starts, shared = serves.shape[0], cu_q_lens[:-1], None
    if tiles.sharing > 1:
        padding = (0, -num_seqs % tiles.sharing)
        serves, q_starts, q_lens, kv_lens, table_rows = (
            jnp.pad(x, padding) for x in (serves, q_starts, q_lens, kv_lens, table_rows)
        )
        shared = _shared_keys(block_tables[table_rows], serves, kv_lens, tiles, shape.block_size)
        first_key = jnp.repeat(shared, tiles.sharing)
    first_cell = first_key // tiles.cell
    cells = (kv_lens + (tiles.cell - 1)) // tiles.cell - first_cell
    seq_tiles = jnp.where(serves, (cells + (tiles.boxes - 1)) // tiles.boxes, 0)
    seqs = [seq_tiles, first_cell, kv_lens, q_starts, q_lens, table_rows]
    if shared is None:
        next_row = jnp.arange(1, num_seqs + 1, dtype=jnp.int32)
        seqs = _columns([*seqs, next_row], 8)
    else:
        seqs = _with_prefixes(seqs, shared, tiles)

    ends = jnp.cumsum(seqs[:, Seq.TILES] * tiles.groups, dtype=jnp.int32)
    begins = ends - seqs[:, Seq.TILES] * tiles.groups
    cut = _Cut(ends[-1], config)
    of_items = _item_pieces(cut, seqs, begins, tiles)
    if shared is None:
        own, of_prefix = of_items, None
    else:
        of_items = of_items.reshape(-1, 1 + tiles.sharing, *of_items.shape[1:])
        own = of_items[:, 1:].reshape(-1, *of_items.shape[2:])[:num_seqs]
        of_prefix = jnp.repeat(of_items[:, 0], tiles.sharing, axis=0)[:num_seqs]
    return DecodePlan(
        block_tables=block_tables,
        streams=_streams(cut, seqs, begins, ends, tiles),
        seqs=seqs,
        pieces=_pieces(own, of_prefix, cu_q_lens, serves[:num_seqs], tiles, shape),
        config=config,
        shape=shape,
    )


def _shared_keys(tables: jax.Array, serves: jax.Array, kv_lens: jax.Array, tiles: Tiling, block_size: int) -> jax.Array:
    """i32[S / sharing]: keys of whole tiles in the blocks with which the tables of these neighbours all begin, and
    which all of them see whole; 0 where they are few, or only one sequence is served.

    Args:
        tables: i32[S, B].
        serves: bool[S]; of `sharing` neighbours the first ones.
        kv_lens: i32[S].
        tiles: Of the step.
        block_size: Tokens of a block.
    """
    tables = tables.reshape(-1, tiles.sharing, tables.shape[-1])
    index = jnp.arange(tables.shape[-1], dtype=jnp.int32)
    equal_blocks = jnp.where(tables != tables[:, :1], index, tables.shape[-1]).min(axis=2)
    limit = (kv_lens - 1) // block_size  # at least one key is left for the sequence's own item
    served = serves.reshape(equal_blocks.shape)
    blocks = jnp.where(served, jnp.minimum(equal_blocks, limit.reshape(served.shape)), tables.shape[-1]).min(axis=1)
    unit = max(tiles.tile_keys, block_size)
    keys = blocks * block_size // unit * unit
    return jnp.where((served.sum(axis=1) > 1) & (keys >= MIN_SHARED_KEYS), keys, 0)


def _with_prefixes(columns: list[jax.Array], shared: jax.Array, tiles: Tiling) -> jax.Array:
    """DecodePlan.seqs: a row for the prefix, of `shared` keys, before those of the sequences that may have it.

    Args:
        columns: Each i32[S], the sequences' first columns up to Seq.TABLE_ROW.
        shared: i32[S / sharing], from _shared_keys.
        tiles: Of the step.
    """
    members = [column.reshape(-1, tiles.sharing) for column in columns]
    all_rows = jnp.full_like(shared, tiles.sharing)
    first = [members[column][:, 0] for column in (Seq.Q_START, Seq.TABLE_ROW)]
    prefix = [shared // tiles.tile_keys, jnp.zeros_like(shared), shared, first[0], all_rows, first[1]]
    rows = [jnp.concatenate([p[:, None], m], axis=1) for p, m in zip(prefix, members, strict=True)]
    row = jnp.arange(rows[0].size, dtype=jnp.int32).reshape(rows[0].shape)
    is_last = jnp.arange(1 + tiles.sharing, dtype=jnp.int32) == tiles.sharing
    next_is_empty = jnp.pad(shared[1:] == 0, (0, 1))
    next_row = jnp.where(is_last & next_is_empty[:, None], row + 2, row + 1)
    return _columns([*rows, next_row], 8).reshape(-1, 8)


class _Cut:
    """`total` tiles in nearly equal shares: `rest` streams of `share` + 1, then streams of `share`, then idle ones."""

    def __init__(self, total: jax.Array, config: DecodeConfig) -> None:
        self.total, self.config, self.num_streams = total, config, config.num_streams
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


def _streams(cut: _Cut, seqs: jax.Array, begins: jax.Array, ends: jax.Array, tiles: Tiling) -> jax.Array:
    stream = jnp.arange(cut.num_streams, dtype=jnp.int32)
    begin, end = cut.begin(stream), cut.begin(stream + 1)
    last_row = jnp.int32(seqs.shape[0] - 1)

    def item(tile: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        seq = jnp.minimum(jnp.sum(tile[:, None] >= ends[None, :], axis=1, dtype=jnp.int32), last_row)
        offset, length = tile - begins[seq], jnp.maximum(seqs[seq, Seq.TILES], 1)
        return seq, offset // length, offset % length

    seq, group, tile = item(begin)
    last_seq, last_group, _ = item(end - 1)
    passed = last_seq - seq
    if tiles.sharing > 1:  # rows of prefixes of nothing are passed over
        row = jnp.arange(seqs.shape[0], dtype=jnp.int32)
        empty = (row % (1 + tiles.sharing) == 0) & (seqs[:, Seq.TILES] == 0)
        between = (row > seq[:, None]) & (row < last_seq[:, None]) & empty
        passed -= between.sum(axis=1, dtype=jnp.int32)
    items = jnp.where(end > begin, passed * tiles.groups + last_group - group + 1, 0)
    return _columns([seq, group, tile, end - begin, items, *jnp.moveaxis(seqs[seq, : len(Seq)], 1, 0)], 16)


def _item_pieces(cut: _Cut, seqs: jax.Array, begins: jax.Array, tiles: Tiling) -> jax.Array:
    """i32[rows of seqs, groups, 2]: slot of an item's first piece and the number of its pieces."""
    group = jnp.arange(tiles.groups, dtype=jnp.int32)
    length = seqs[:, Seq.TILES, None]
    begin = begins[:, None] + length * group
    first, last = cut.stream(begin), cut.stream(begin + length - 1)
    slot = 2 * first + 1
    if tiles.sharing > 1:  # of an item without a prefix, which leaves no piece, it is not read
        row = jnp.arange(len(seqs), dtype=jnp.int32)[:, None]
        slot = jnp.where(last == first, slot_of_whole(cut.config, tiles, row, group), slot)
    return jnp.stack([slot, jnp.where(length > 0, last - first + 1, 0)], axis=-1)


def _pieces(
    own: jax.Array,
    of_prefix: jax.Array | None,
    cu_q_lens: jax.Array,
    serves: jax.Array,
    tiles: Tiling,
    shape: DecodeShape,
) -> jax.Array:
    """DecodePlan.pieces.

    Args:
        own: i32[S, groups, 2], _item_pieces of the sequences.
        of_prefix: The same of their prefixes; None: no prefixes.
        cu_q_lens: i32[S + 1].
        serves: bool[S].
        tiles, shape: Of the step.
    """
    index = jnp.arange(shape.max_q_len, dtype=jnp.int32)
    used = serves[:, None] & (index < (cu_q_lens[1:] - cu_q_lens[:-1])[:, None])
    place = jnp.arange(used.size, dtype=jnp.int32).reshape(used.shape)
    padding = place - cu_q_lens[1:, None] + cu_q_lens[-1]  # the places not taken, where every sequence is served
    token = jnp.where(used, cu_q_lens[:-1, None] + index, jnp.minimum(padding, shape.num_tokens - 1))
    unused = jnp.where(padding < shape.num_tokens, -1, 0)

    def by_place(x: jax.Array) -> jax.Array:
        return jnp.broadcast_to(x, (*used.shape, tiles.groups)).reshape(-1, tiles.groups)

    counts = jnp.where(used[..., None], own[:, None, :, 1], unused[..., None])
    rows = (index * tiles.token_rows)[:, None]
    columns = [by_place(x) for x in (own[:, None, :, 0], counts, rows, token[..., None])]
    if of_prefix is not None:
        sharer = jnp.arange(len(own), dtype=jnp.int32) % tiles.sharing
        columns += [*jnp.moveaxis(of_prefix, -1, 0), by_place((sharer * tiles.token_rows)[:, None, None])]
    return _columns(columns, 8)
