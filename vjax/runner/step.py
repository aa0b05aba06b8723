"""The two functions that the device runs, as pure functions of arrays: `forward` and `sample`.

    forward(leaves, kv, rows, packed) -> (kv, rows, done)      bucketed by tokens
    sample(head_leaves, rows)         -> (rows, token_ids [R]) bucketed by rows and variant

`kv` and `rows` are donated: both functions update them in place. What the host alone knows arrives in `packed`; what
the device alone knows (the last sampled token, how far a row has come) never leaves it before it is used.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from pallas_kernels import plan_attention
from vjax.models.decoder import AttentionMetadata
from vjax.models.functional import FunctionalModel
from vjax.runner.buckets import ForwardBucket
from vjax.runner.packing import PackedLayout, UpdateLayout
from vjax.runner.rows import RowState, apply_updates, row_state_specs, sampling_column
from vjax.sample.sampler import Variant, sample_tokens

#: One K and one V array per layer, each [num_blocks, kv_heads, block_size, head_dim].
KVCache = tuple[tuple[jax.Array, jax.Array], ...]


@dataclass(frozen=True)
class StepGeometry:
    """Sizes that are the same in every bucket.

    Attributes:
        num_blocks: KV blocks, the null block included.
        block_size: Tokens a block.
        max_num_seqs: Rows that can run at once.
        max_blocks_per_row: Width of the block table.
        kv_head_dim: Head dim of the cache; larger than the model's where a kernel pads it.
        kv_dtype: Name of the cache's dtype.
        implementation: Kernel implementation, "xla" or "mosaic_gpu".
    """

    num_blocks: int
    block_size: int
    max_num_seqs: int
    max_blocks_per_row: int
    kv_head_dim: int
    kv_dtype: str
    implementation: str


@dataclass(frozen=True, eq=False)
class Step:
    """The functions and argument shapes of one engine's step."""

    model: FunctionalModel
    geometry: StepGeometry

    # ---- shapes -------------------------------------------------------------------------------------------------

    def kv_specs(self) -> KVCache:
        g, arch = self.geometry, self.model.arch
        spec = jax.ShapeDtypeStruct((g.num_blocks, arch.num_kv_heads, g.block_size, g.kv_head_dim), g.kv_dtype)
        return tuple((spec, spec) for _ in range(arch.num_layers))  # pyright: ignore[reportReturnType]

    def row_specs(self) -> RowState:
        g = self.geometry
        return row_state_specs(
            max_num_seqs=g.max_num_seqs,
            max_blocks_per_row=g.max_blocks_per_row,
            hidden_size=self.model.arch.hidden_size,
            dtype=self.model.dtype,
        )

    def layout(self, bucket: ForwardBucket) -> PackedLayout:
        return PackedLayout.for_bucket(bucket, self.geometry.block_size)

    def least_bytes_read(self, num_keys: int) -> dict[str, int]:
        """Bytes that a decode step over num_keys keys has to read: "weights" (an embedding table only if it is the head
        too) and "KV cache"."""
        unread = () if self.model.arch.tie_word_embeddings else ("embed",)
        weights = [spec for name, spec in self.model.leaf_specs.items() if name not in unread]
        per_block = sum(map(_num_bytes, jax.tree.leaves(self.kv_specs()))) // self.geometry.num_blocks
        return {
            "weights": sum(map(_num_bytes, weights)),
            "KV cache": num_keys * per_block // self.geometry.block_size,
        }

    # ---- functions ----------------------------------------------------------------------------------------------

    def forward(self, bucket: ForwardBucket, leaves: tuple, kv: KVCache, rows: RowState, packed: jax.Array):
        """Computes the KV of every token of the flat batch and leaves in `rows.hidden` what the sampling rows need.

        Returns:
            kv and rows, updated in place, and a tiny array that is ready when the step has run.
        """
        layout = self.layout(bucket)
        batch = layout.unpack(packed)
        rows = apply_updates(rows, batch.updates)

        in_batch = jnp.arange(layout.num_seqs) < batch.num_seqs
        seq_rows = jnp.where(in_batch, batch.rows, 0)
        start = rows.num_computed[seq_rows]
        kv_lens = jnp.where(in_batch, start + batch.cu_tokens[1:] - batch.cu_tokens[:-1], 0)
        meta, token_ids = self._metadata(bucket, batch, rows, seq_rows, start, kv_lens)

        hidden, kv = self.model.forward(leaves, token_ids, kv, meta)

        num_rows = rows.num_computed.shape[0]
        last_token_index = jnp.maximum(batch.cu_tokens[1:] - 1, 0)
        sampled = jnp.where(jnp.arange(layout.num_seqs) < batch.num_sampled, seq_rows, 0)
        # Nothing of an earlier step stays: a sample program may read more rows than this bucket has, and a row left
        # there would get that step's token again.
        sampled_rows = jax.lax.dynamic_update_slice(rows.sampled_rows * 0, sampled, (0,))
        rows = rows.replace(
            num_computed=rows.num_computed.at[jnp.where(in_batch, seq_rows, num_rows)].set(kv_lens, mode="drop"),
            sampled_rows=sampled_rows,
            hidden=jax.lax.dynamic_update_slice(rows.hidden, hidden[last_token_index], (0, 0)),
        )
        return kv, rows, batch.num_tokens + 0

    def _metadata(self, bucket: ForwardBucket, batch, rows: RowState, seq_rows, start, kv_lens):
        """Positions, slots and the attention plan of the flat batch, and its token ids."""
        g = self.geometry
        token = jnp.arange(bucket.num_tokens, dtype=jnp.int32)
        in_batch = token < batch.num_tokens
        if bucket.decode_only:
            seq = token
        else:  # how many sequences end at or before the token; a comparison table, no search loop
            ended = batch.cu_tokens[None, 1:] <= token[:, None]
            seq = jnp.minimum(ended.sum(axis=1, dtype=jnp.int32), bucket.num_seqs - 1)
        row = jnp.where(in_batch, seq_rows[seq], 0)
        position = jnp.where(in_batch, start[seq] + token - batch.cu_tokens[seq], 0)
        block = rows.block_table[row, position // g.block_size]
        token_ids = jnp.where(batch.token_ids < 0, rows.last_token[row], batch.token_ids)
        plan = plan_attention(
            rows.block_table,
            seq_rows,
            batch.cu_tokens,
            kv_lens,
            num_tokens=bucket.num_tokens,
            num_q_heads=self.model.arch.num_heads,
            num_kv_heads=self.model.arch.num_kv_heads,
            head_dim=g.kv_head_dim,
            block_size=g.block_size,
            dtype=g.kv_dtype,
            decode_only=bucket.decode_only,
            sliding_windows=tuple(dict.fromkeys(self.model.arch.sliding_windows)),
            implementation=g.implementation,
        )
        meta = AttentionMetadata(
            positions=position,
            slots=jnp.where(in_batch, block * g.block_size + position % g.block_size, -1),
            plan=plan,
        )
        return meta, jnp.where(in_batch, token_ids, 0)

    def sample(self, num_rows: int, variant: Variant, head_leaves: tuple, rows: RowState):
        """Samples one token for each of the first `num_rows` rows that the last forward made ready.

        Returns:
            rows with `last_token` written, and the tokens i32 [num_rows].
        """
        row_ids = rows.sampled_rows[:num_rows]
        logits = self.model.logits(head_leaves, rows.hidden[:num_rows])
        tokens = sample_tokens(
            logits,
            variant=variant,
            **{
                name: sampling_column(rows, row_ids, name)
                for name in ("temperature", "top_k", "top_p", "min_p", "seed_low", "seed_high", "min_position")
            },
            position=rows.num_computed[row_ids],
            masked_ids=rows.masked_ids[row_ids],
            implementation=self.geometry.implementation,
        )
        return rows.replace(last_token=rows.last_token.at[row_ids].set(tokens)), tokens

    def write_rows(self, rows: RowState, packed: jax.Array) -> RowState:
        """Row and block-table writes that do not fit a step's own buffer."""
        return apply_updates(rows, UpdateLayout().unpack(packed))

    def write_masked_ids(self, rows: RowState, packed: jax.Array) -> RowState:
        """Sets the ids that min_tokens masks for one row: packed is [row, ids...]."""
        return rows.replace(masked_ids=rows.masked_ids.at[packed[0]].set(packed[1:]))


def _num_bytes(spec: jax.ShapeDtypeStruct) -> int:
    return math.prod(spec.shape) * spec.dtype.itemsize
