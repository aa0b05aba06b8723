"""Persistent per-request state on the device. Donated to every executable and updated in place.

Row 0 is the null row: padding reads and writes it, nobody reads it back. Rows 1..max_num_seqs belong to running
requests.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from vjax.runner.packing import FLOAT_COLUMNS, RECORD_WIDTH, SAMPLING_COLUMNS, Updates

#: Most ids that min_tokens can mask for one request (EOS and stop_token_ids).
MAX_MASKED_IDS = 64


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class RowState:
    """Device rows. N = max_num_seqs + 1.

    Attributes:
        last_token: i32 [N], the token that the row sampled last.
        num_computed: i32 [N], tokens whose KV is written.
        block_table: i32 [N, max_blocks_per_row].
        block_tokens: i32 [num_blocks, block_size], the tokens whose KV the blocks hold, written as that is: what
            penalties and bad words look back on, for requests that share blocks too.
        sampling: i32 [N, len(SAMPLING_COLUMNS)], floats bit-cast.
        masked_ids: i32 [N, MAX_MASKED_IDS], ids that min_tokens masks; padding is out of the vocabulary.
        sampled_rows: i32 [max_num_seqs], rows that the last forward made ready to sample, 0 beyond them.
        hidden: [max_num_seqs, hidden], what those rows sample from.
    """

    last_token: jax.Array
    num_computed: jax.Array
    block_table: jax.Array
    block_tokens: jax.Array
    sampling: jax.Array
    masked_ids: jax.Array
    sampled_rows: jax.Array
    hidden: jax.Array

    def replace(self, **changes: jax.Array) -> RowState:
        return RowState(**{**{f: getattr(self, f) for f in self.__dataclass_fields__}, **changes})


def row_state_specs(
    *, max_num_seqs: int, max_blocks_per_row: int, num_blocks: int, block_size: int, hidden_size: int, dtype
) -> RowState:
    """Shapes and dtypes of the rows, as a RowState of ShapeDtypeStructs."""
    n = max_num_seqs + 1

    def i32(*shape: int) -> Any:
        return jax.ShapeDtypeStruct(shape, jnp.int32)

    hidden: Any = jax.ShapeDtypeStruct((max_num_seqs, hidden_size), dtype)
    return RowState(
        last_token=i32(n),
        num_computed=i32(n),
        block_table=i32(n, max_blocks_per_row),
        block_tokens=i32(num_blocks, block_size),
        sampling=i32(n, len(SAMPLING_COLUMNS)),
        masked_ids=i32(n, MAX_MASKED_IDS),
        sampled_rows=i32(max_num_seqs),
        hidden=hidden,
    )


def apply_updates(rows: RowState, updates: Updates) -> RowState:
    """Writes row records, then block-table entries. Entries past the counts are dropped."""
    num_rows = rows.last_token.shape[0]
    records = updates.row_records
    assert records.shape[1] == RECORD_WIDTH
    record_row = jnp.where(jnp.arange(records.shape[0]) < updates.num_row_records, records[:, 0], num_rows)
    row, column, block = updates.block_updates
    row = jnp.where(jnp.arange(row.shape[0]) < updates.num_block_updates, row, num_rows)
    return rows.replace(
        num_computed=rows.num_computed.at[record_row].set(records[:, 1], mode="drop"),
        sampling=rows.sampling.at[record_row].set(records[:, 2:], mode="drop"),
        block_table=rows.block_table.at[row, column].set(block, mode="drop"),
    )


def sampling_column(rows: RowState, row_ids: jax.Array, name: str) -> jax.Array:
    """One sampling parameter of `row_ids` [R]: f32 for FLOAT_COLUMNS, u32 for seeds, else i32."""
    values = rows.sampling[row_ids, SAMPLING_COLUMNS.index(name)]
    if name in FLOAT_COLUMNS:
        return lax.bitcast_convert_type(values, jnp.float32)
    if name.startswith("seed"):
        return lax.bitcast_convert_type(values, jnp.uint32)
    return values
