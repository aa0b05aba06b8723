"""The two functions that the device runs, as pure functions of arrays: `forward` and `sample`.

    forward(leaves, kv, rows, packed) -> (kv, rows, done)      bucketed by tokens
    opening(leaves, kv, rows, packed) -> (kv, rows, opened)    first layers of a forward that then takes `opened`
    sample(head_leaves, rows)         -> (rows, token_ids [R]) bucketed by rows and variant
    sample_with_features(head_leaves, rows, processors, mask?) -> (rows, packed result), for requests that ask for more
    score(head_leaves, hidden, packed) -> packed result, log probabilities of a prompt
    pool(head_leaves, hidden, packed)  -> vectors, or sums of them, of a model that pools instead of sampling

`kv` and `rows` are donated: both functions update them in place. What the host alone knows arrives in `packed`; what
the device alone knows (the last sampled token, how far a row has come) never leaves it before it is used.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import AttentionPlan, plan_attention
from vjax.config.engine_config import DEFAULT_MAX_LOGPROBS
from vjax.errors import ConfigError
from vjax.logits_processor import LogitsProcessor, num_columns
from vjax.messages import StepLogprobs, mask_width
from vjax.models.decoder import Activations, AttentionMetadata
from vjax.models.functional import FunctionalModel
from vjax.runner.buckets import ForwardBucket
from vjax.runner.packing import HAS_ALLOWED_IDS, HAS_PROCESSOR_STATE, PackedLayout, UpdateLayout
from vjax.runner.processor_state import MAX_LOGPROB_TOKEN_IDS, ProcessorLayout, ProcessorState
from vjax.runner.rows import RowState, apply_updates, row_state_specs, sampling_column
from vjax.sample import processors
from vjax.sample.logprobs import TokenLogprobs, token_logprobs
from vjax.sample.sampler import Feature, Variant, sample_tokens

#: Prompt tokens that one call of `score` looks at.
SCORED_TOKENS = 256
#: Vectors that one call of `pool` or `pool_sums` gives.
POOLED_VECTORS = 256

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
        max_logprobs: Most probable ids beside each token of a program with log probabilities.
        logprobs_mode: "raw_logprobs", "processed_logprobs", "raw_logits" or "processed_logits".
    """

    num_blocks: int
    block_size: int
    max_num_seqs: int
    max_blocks_per_row: int
    kv_head_dim: int
    kv_dtype: str
    implementation: str
    max_logprobs: int = DEFAULT_MAX_LOGPROBS
    logprobs_mode: str = "raw_logprobs"


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Opened:
    """A forward whose first layers have run, none or an opening's.

    Attributes:
        activations: What the next layer takes.
        meta, last_meta: As `FunctionalModel.forward` takes them.
        last_token_index: i32 [num_seqs], of each sequence in the flat batch.
        num_tokens: i32 [], that count in the flat batch.
    """

    activations: Activations
    meta: AttentionMetadata
    last_meta: AttentionMetadata | None
    last_token_index: jax.Array
    num_tokens: jax.Array


@dataclass(frozen=True, eq=False)
class Step:
    """The functions and argument shapes of one engine's step."""

    model: FunctionalModel
    geometry: StepGeometry
    #: Of the engine's user, for programs with `Feature.CUSTOM`.
    logits_processors: tuple[LogitsProcessor, ...] = ()
    #: Token ids that begin and end reasoning, for programs with `Feature.THINKING`.
    thinking: tuple[tuple[int, ...], tuple[int, ...]] | None = None

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
            num_blocks=g.num_blocks,
            block_size=g.block_size,
            hidden_size=self.model.arch.hidden_size,
            dtype=self.model.dtype,
        )

    @property
    def processor_layout(self) -> ProcessorLayout:
        return ProcessorLayout(self.model.arch.vocab_size, num_columns(self.logits_processors))

    def processor_specs(self) -> ProcessorState:
        return self.processor_layout.specs(self.geometry.max_num_seqs)

    def mask_spec(self, num_rows: int) -> jax.ShapeDtypeStruct:
        """Of the mask that MASK programs of so many rows take."""
        return jax.ShapeDtypeStruct((num_rows, mask_width(self.model.arch.vocab_size)), jnp.int32)

    @property
    def logprobs_layout(self) -> LogprobsLayout:
        return LogprobsLayout(min(self.geometry.max_logprobs, self.model.arch.vocab_size))

    def layout(self, bucket: ForwardBucket) -> PackedLayout:
        return PackedLayout.for_bucket(bucket, self.geometry.block_size)

    def opened_specs(self, bucket: ForwardBucket) -> Opened:
        """What the opening of a bucket leaves: as much as is there before the first layer."""
        leaves = tuple(self.model.leaf_specs[name] for name in self.model.layer_leaf_names(0, bucket.opening))
        packed = jax.ShapeDtypeStruct((self.layout(bucket).size,), jnp.int32)
        return jax.eval_shape(partial(self._begin, bucket), leaves, self.row_specs(), packed)[1]

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

    def forward(self, bucket: ForwardBucket, leaves: tuple, kv: KVCache, rows: RowState, given: jax.Array | Opened):
        """Computes the KV of every token of the flat batch and leaves in `rows.hidden` what the sampling rows need.

        Args:
            leaves, kv: Of a bucket with an opening those of the layers behind it.
            given: The packed step, or what the opening left.

        Returns:
            kv and rows, updated in place, and a tiny array that is ready when the step has run; if the bucket keeps
            them, the hidden states [num_tokens, hidden] as well.
        """
        if isinstance(given, Opened):
            opened = given
        else:
            rows, opened = self._begin(bucket, leaves, rows, given)
        activations, kv = self.model.run_layers(
            leaves, opened.activations, kv, opened.meta, opened.last_meta, first=bucket.opening
        )
        hidden = activations.x
        selected = hidden if bucket.selects_last else hidden[opened.last_token_index]
        rows = rows.replace(hidden=jax.lax.dynamic_update_slice(rows.hidden, selected, (0, 0)))
        done = opened.num_tokens + 0
        return (kv, rows, done, hidden) if bucket.keeps_hidden else (kv, rows, done)

    def opening(self, bucket: ForwardBucket, leaves: tuple, kv: KVCache, rows: RowState, packed: jax.Array):
        """The first `bucket.opening` layers, whose leaves and caches these are, and all that comes before them.

        Returns:
            kv and rows, updated in place, and what `forward` goes on with.
        """
        rows, opened = self._begin(bucket, leaves, rows, packed)
        activations, kv = self.model.run_layers(leaves, opened.activations, kv, opened.meta)
        return kv, rows, replace(opened, activations=activations)

    def _begin(
        self, bucket: ForwardBucket, leaves: tuple, rows: RowState, packed: jax.Array
    ) -> tuple[RowState, Opened]:
        """All that comes before the first layer, and what is known before it of the rows after the step."""
        layout = self.layout(bucket)
        batch = layout.unpack(packed)
        rows = apply_updates(rows, batch.updates)

        in_batch = jnp.arange(layout.num_seqs) < batch.num_seqs
        seq_rows = jnp.where(in_batch, batch.rows, 0)
        start = rows.num_computed[seq_rows]
        kv_lens = jnp.where(in_batch, start + batch.cu_tokens[1:] - batch.cu_tokens[:-1], 0)
        meta, token_ids = self._metadata(bucket, batch, rows, seq_rows, start, kv_lens)
        last_token_index = jnp.maximum(batch.cu_tokens[1:] - 1, 0)
        last_meta = None
        if bucket.selects_last:
            sampled_lens = jnp.where(jnp.arange(layout.num_seqs) < batch.num_sampled, kv_lens, 0)
            plan = self._plan_last(rows, seq_rows, sampled_lens, batch.num_sampled)
            last_meta = replace(meta, plan=plan, queries=last_token_index)

        num_layers = bucket.opening or self.model.arch.num_layers
        activations = self.model.begin(leaves, token_ids, meta, num_layers=num_layers)

        num_rows = rows.num_computed.shape[0]
        sampled = jnp.where(jnp.arange(layout.num_seqs) < batch.num_sampled, seq_rows, 0)
        # Nothing of an earlier step stays: a sample program may read more rows than this bucket has, and a row left
        # there would get that step's token again.
        sampled_rows = jax.lax.dynamic_update_slice(rows.sampled_rows * 0, sampled, (0,))
        slots = jnp.where(meta.slots < 0, rows.block_tokens.size, meta.slots)
        block_tokens = rows.block_tokens.reshape(-1).at[slots].set(token_ids, mode="drop", unique_indices=True)
        rows = rows.replace(
            block_tokens=block_tokens.reshape(rows.block_tokens.shape),
            num_computed=rows.num_computed.at[jnp.where(in_batch, seq_rows, num_rows)].set(kv_lens, mode="drop"),
            sampled_rows=sampled_rows,
        )
        return rows, Opened(activations, meta, last_meta, last_token_index, batch.num_tokens)

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
        plan = self._plan(
            rows,
            seq_rows,
            batch.cu_tokens,
            kv_lens,
            num_tokens=bucket.num_tokens,
            decode_only=bucket.decode_only,
            sliding_windows=tuple(dict.fromkeys(self.model.arch.sliding_windows)),
        )
        meta = AttentionMetadata(
            positions=position,
            slots=jnp.where(in_batch, block * g.block_size + position % g.block_size, -1),
            plan=plan,
        )
        return meta, jnp.where(in_batch, token_ids, 0)

    def _plan_last(self, rows: RowState, seq_rows, sampled_lens, num_sampled) -> AttentionPlan:
        """For the last layer of a bucket that `selects_last`: the last token of each sampled sequence attends."""
        num_seqs = seq_rows.shape[0]
        cu_tokens = jnp.minimum(jnp.arange(num_seqs + 1, dtype=jnp.int32), num_sampled)
        window = self.model.arch.sliding_windows[-1]
        return self._plan(
            rows,
            seq_rows,
            cu_tokens,
            sampled_lens,
            num_tokens=num_seqs,
            decode_only=True,
            sliding_windows=(window,),
        )

    def _plan(self, rows: RowState, seq_rows, cu_tokens, kv_lens, **shape: Any) -> AttentionPlan:
        g, arch = self.geometry, self.model.arch
        return plan_attention(
            rows.block_table,
            seq_rows,
            cu_tokens,
            kv_lens,
            num_q_heads=arch.num_heads,
            num_kv_heads=arch.num_kv_heads,
            head_dim=g.kv_head_dim,
            block_size=g.block_size,
            dtype=g.kv_dtype,
            implementation=g.implementation,
            **shape,
        )

    def sample(self, num_rows: int, variant: Variant, head_leaves: tuple, rows: RowState):
        """Samples one token for each of the first `num_rows` rows that the last forward made ready.

        Returns:
            rows with `last_token` written, and the tokens i32 [num_rows].
        """
        logits = self.model.logits(head_leaves, rows.hidden[:num_rows])
        rows, tokens, _ = self._draw(variant, rows, logits)
        return rows, tokens

    def sample_with_features(
        self,
        num_rows: int,
        features: Feature,
        head_leaves: tuple,
        rows: RowState,
        state: ProcessorState,
        mask: jax.Array | None = None,
    ):
        """As `sample`, with a mask, processors and log probabilities as `features` says. "Raw" logits and log
        probabilities are those behind the mask, as in vLLM.

        Args:
            mask: With MASK: of `mask_spec`, see `processors.keep_allowed`; all bits set for rows without a grammar.

        Returns:
            rows with `last_token` written; the tokens i32 [num_rows], or with LOGPROBS a `LogprobsLayout` i32
            [num_rows, width]; with ALL_LOGPROBS also f32 [num_rows, vocab_size].
        """
        raw = logits = self.model.logits(head_leaves, rows.hidden[:num_rows])
        row_ids = rows.sampled_rows[:num_rows]
        min_position = sampling_column(rows, row_ids, "min_position")
        if mask is not None:
            raw = logits = processors.keep_allowed(logits, mask, row_ids >= 0)
        if features & (Feature.PROCESSORS | Feature.CUSTOM | Feature.THINKING):
            history = self._history(rows, row_ids)
            if Feature.PROCESSORS in features:
                logits = self._process(rows, state, logits, history)
            if Feature.CUSTOM in features:
                logits = self._process_custom(rows, state, logits, history)
            if Feature.THINKING in features:
                logits, min_position = self._end_thinking(rows, state, logits, history, mask)
        if mask is not None:
            logits, min_position = self._grammar_first(rows, raw, logits, min_position)
        rows, tokens, final = self._draw(Variant.FULL, rows, logits, min_position)
        if Feature.LOGPROBS not in features:
            return rows, tokens
        values = self._logprob_values(raw if self.geometry.logprobs_mode.startswith("raw") else final)
        found = token_logprobs(values, tokens, self.logprobs_layout.num_top)
        named = jnp.take_along_axis(values, state.logprob_ids[row_ids], axis=1)
        result = self.logprobs_layout.join(tokens, found, named)
        return (rows, result, values) if Feature.ALL_LOGPROBS in features else (rows, result)

    def score(self, with_all: bool, head_leaves: tuple, hidden: jax.Array, packed: jax.Array):
        """Log probabilities of tokens of the prompt (logprobs_mode's raw or processed ones are the same here).

        Args:
            hidden: [num_tokens, hidden], from a forward that keeps them.
            packed: i32 [2, SCORED_TOKENS], indices of the tokens before the scored ones in `hidden`, and their ids.

        Returns:
            A `LogprobsLayout` i32 [SCORED_TOKENS, width], and `with_all` f32 [SCORED_TOKENS, vocab_size].
        """
        index, token_ids = packed
        values = self._logprob_values(self.model.logits(head_leaves, hidden[index]))
        found = token_logprobs(values, token_ids, self.logprobs_layout.num_top)
        named = jnp.zeros((SCORED_TOKENS, MAX_LOGPROB_TOKEN_IDS), jnp.float32)
        result = self.logprobs_layout.join(token_ids, found, named)
        return (result, values) if with_all else (result,)

    def pool(self, head_leaves: tuple, hidden: jax.Array, packed: jax.Array) -> jax.Array:
        """What the model gives for single tokens.

        Args:
            hidden: [num_tokens, hidden], from a forward.
            packed: i32 [POOLED_VECTORS], indices in `hidden`.

        Returns:
            f32 [POOLED_VECTORS, arch.pooled_width].
        """
        return self.model.pooled_values(head_leaves, hidden[packed])

    def pool_sums(self, head_leaves: tuple, hidden: jax.Array, packed: jax.Array) -> jax.Array:
        """Sums, over ranges of tokens, of what the model gives for each.

        Args:
            hidden: [num_tokens, hidden], from a forward.
            packed: i32 [2, POOLED_VECTORS], the first token of each range and the one behind its last.

        Returns:
            f32 [POOLED_VECTORS, arch.pooled_width]; 0 for empty ranges.
        """
        start, end = packed
        token = jnp.arange(hidden.shape[0], dtype=jnp.int32)
        is_in = (token >= start[:, None]) & (token < end[:, None])
        values = self.model.pooled_values(head_leaves, hidden)
        # As a product: scattered additions have no order of their own on a GPU, so results would differ by the run.
        return jnp.dot(is_in.astype(jnp.float32), values, precision=jax.lax.Precision.HIGHEST)

    def _logprob_values(self, logits: jax.Array) -> jax.Array:
        return jax.nn.log_softmax(logits, axis=-1) if self.geometry.logprobs_mode.endswith("logprobs") else logits

    @staticmethod
    def _grammar_first(rows: RowState, allowed: jax.Array, logits: jax.Array, min_position: jax.Array):
        """Where processors and min_tokens leave nothing of what a grammar allows, such as EOS alone, the grammar has
        its way: the text is complete and can only end.

        Returns:
            The logits to draw from and the position from which EOS may be drawn.
        """
        row_ids = rows.sampled_rows[: logits.shape[0]]
        # Counted, not masked: min_tokens' ids are few, and no two of a row are the same.
        ids = rows.masked_ids[row_ids]
        taken = jnp.take_along_axis(logits, ids, axis=1, mode="fill", fill_value=-jnp.inf) > -jnp.inf
        taken &= (rows.num_computed[row_ids] < min_position)[:, None]
        some_left = (logits > -jnp.inf).sum(axis=1) > taken.sum(axis=1)
        return jnp.where(some_left[:, None], logits, allowed), jnp.where(some_left, min_position, 0)

    def _draw(self, variant: Variant, rows: RowState, logits: jax.Array, min_position: jax.Array | None = None):
        """Rows with the tokens written, the tokens, and the logits that they were drawn from.

        Args:
            min_position: i32 [R] instead of the rows' own.
        """
        row_ids = rows.sampled_rows[: logits.shape[0]]
        names = ("temperature", "top_k", "top_p", "min_p", "seed_low", "seed_high", "min_position")
        columns = {name: sampling_column(rows, row_ids, name) for name in names}
        if min_position is not None:
            columns["min_position"] = min_position
        tokens, final = sample_tokens(
            logits,
            variant=variant,
            **columns,
            position=rows.num_computed[row_ids],
            masked_ids=rows.masked_ids[row_ids],
            implementation=self.geometry.implementation,
        )
        return rows.replace(last_token=rows.last_token.at[row_ids].set(tokens)), tokens, final

    def check_logits_processors(self) -> None:
        """Traces what the engine's user wrote, on shapes alone.

        Raises:
            ConfigError: A processor cannot be traced, or its result is no new logits.
        """
        logits = jax.ShapeDtypeStruct((2, self.model.arch.vocab_size), jnp.float32)
        count = jax.ShapeDtypeStruct((2,), jnp.int32)
        length = self.geometry.max_blocks_per_row * self.geometry.block_size
        history = processors.History(jax.ShapeDtypeStruct((2, length), jnp.int32), count, count)  # pyright: ignore
        for processor in self.logits_processors:
            name = type(processor).__name__
            try:
                values = jax.ShapeDtypeStruct((2, processor.num_values), jnp.float32)
                result = jax.eval_shape(processor.apply, logits, values, history)
            except Exception as e:  # whatever a user's function raises
                what = f"{name}.apply cannot be traced by JAX: {type(e).__name__}: {e}"
                raise ConfigError(what, parameter="logits_processors", value=name) from e
            if getattr(result, "shape", None) != logits.shape or result.dtype != logits.dtype:
                what = f"{name}.apply gave {result} for logits of shape {logits.shape}; return new ones, float32."
                raise ConfigError(what, parameter="logits_processors", value=name)

    def _history(self, rows: RowState, row_ids: jax.Array) -> processors.History:
        blocks = rows.block_tokens[rows.block_table[row_ids]]
        return processors.History(
            blocks.reshape(row_ids.shape[0], -1),
            rows.num_computed[row_ids],
            sampling_column(rows, row_ids, "num_prompt_tokens"),
        )

    def _process_custom(
        self, rows: RowState, state: ProcessorState, logits: jax.Array, history: processors.History
    ) -> jax.Array:
        assert state.custom is not None
        row_ids = rows.sampled_rows[: logits.shape[0]]
        has_state = (sampling_column(rows, row_ids, "flags") & HAS_PROCESSOR_STATE) != 0
        columns = jax.lax.bitcast_convert_type(state.custom[row_ids], jnp.float32)
        first = 0
        for processor in self.logits_processors:
            end = first + 1 + processor.num_values
            used = has_state & (columns[:, first] > 0)
            values = jnp.where(used[:, None], columns[:, first + 1 : end], jnp.float32(0))
            logits = jnp.where(used[:, None], processor.apply(logits, values, history), logits)
            first = end
        return logits

    def _end_thinking(
        self,
        rows: RowState,
        state: ProcessorState,
        logits: jax.Array,
        history: processors.History,
        mask: jax.Array | None,
    ) -> tuple[jax.Array, jax.Array]:
        """Logits, and each row's position from which every token may be drawn: what is forced is not masked. A row
        that its grammar holds does not think any more, whatever it writes."""
        assert self.thinking is not None
        row_ids = rows.sampled_rows[: logits.shape[0]]
        has_state = (sampling_column(rows, row_ids, "flags") & HAS_PROCESSOR_STATE) != 0
        budget = jnp.where(has_state, state.thinking_budget[row_ids, 0], -1)
        if mask is not None:
            budget = jnp.where((mask == -1).all(axis=1), budget, -1)
        start, end = self.thinking
        logits, forced = processors.end_thinking(logits, history, budget, start=start, end=end)
        return logits, jnp.where(forced, 0, sampling_column(rows, row_ids, "min_position"))

    def _process(
        self, rows: RowState, state: ProcessorState, logits: jax.Array, history: processors.History
    ) -> jax.Array:
        num_rows, vocab_size = logits.shape
        row_ids = rows.sampled_rows[:num_rows]
        flags = sampling_column(rows, row_ids, "flags")
        has_state = (flags & HAS_PROCESSOR_STATE) != 0
        logits = processors.keep_allowed(logits, state.allowed[row_ids], (flags & HAS_ALLOWED_IDS) != 0)
        bias_ids = jnp.where(has_state[:, None], state.bias_ids[row_ids], vocab_size)
        bias = jax.lax.bitcast_convert_type(state.bias[row_ids], jnp.float32)
        logits = processors.add_bias(logits, bias_ids, bias)
        logits = processors.penalize(
            logits,
            history,
            repetition=sampling_column(rows, row_ids, "repetition_penalty"),
            frequency=sampling_column(rows, row_ids, "frequency_penalty"),
            presence=sampling_column(rows, row_ids, "presence_penalty"),
        )
        words = state.bad_words(row_ids)
        words = words._replace(last=jnp.where(has_state[:, None], words.last, -1))
        return processors.mask_bad_words(logits, history, words)

    def write_rows(self, rows: RowState, packed: jax.Array) -> RowState:
        """Row and block-table writes that do not fit a step's own buffer."""
        return apply_updates(rows, UpdateLayout().unpack(packed))

    def write_processors(self, state: ProcessorState, packed: jax.Array) -> ProcessorState:
        """Replaces a row of the processors' state."""
        return self.processor_layout.write(state, packed)

    def write_masked_ids(self, rows: RowState, packed: jax.Array) -> RowState:
        """Sets the ids that min_tokens masks for one row: packed is [row, ids...]."""
        return rows.replace(masked_ids=rows.masked_ids.at[packed[0]].set(packed[1:]))


@dataclass(frozen=True)
class LogprobsLayout:
    """Tokens and their log probabilities as one int32 array, so that one copy brings them to the host.

    token | logprob | rank | top ids [K] | top logprobs [K] | named logprobs [MAX_LOGPROB_TOKEN_IDS]
    """

    num_top: int

    def join(self, tokens: jax.Array, found: TokenLogprobs, named: jax.Array) -> jax.Array:
        bits = partial(jax.lax.bitcast_convert_type, new_dtype=jnp.int32)
        first = jnp.stack([tokens, bits(found.logprob), found.rank], axis=1)
        return jnp.concatenate([first, found.top_ids, bits(found.top_logprobs), bits(named)], axis=1)

    def split(self, result: np.ndarray, all_logprobs: np.ndarray | None) -> tuple[list[int], StepLogprobs]:
        """Of i32 [N, width]."""
        named = 3 + 2 * self.num_top
        floats = result.view(np.float32)
        return result[:, 0].tolist(), StepLogprobs(
            logprobs=floats[:, 1],
            ranks=result[:, 2],
            top_ids=result[:, 3 : 3 + self.num_top],
            top_logprobs=floats[:, 3 + self.num_top : named],
            named_logprobs=floats[:, named:],
            all_logprobs=all_logprobs,
        )


def _num_bytes(spec: jax.ShapeDtypeStruct) -> int:
    return math.prod(spec.shape) * spec.dtype.itemsize
