"""Dispatches scheduled steps to the device. Everything that touches a device array on the serving path is here.

The runner knows nothing of requests, blocks in use or policy: it turns a `SchedulerOutput` into two asynchronous calls
and gives back a handle that yields a `StepOutput` once the device is done.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from functools import reduce
from operator import or_
from typing import Any

import jax
import numpy as np

from vjax.errors import EngineAsleepError, EngineStepError
from vjax.messages import RowInit, SchedulerOutput, StepLogprobs, StepOutput
from vjax.parallel.sharding import named_sharding
from vjax.runner.buckets import ForwardBucket
from vjax.runner.executables import Executables
from vjax.runner.memory import allocate, room_for_small_arrays
from vjax.runner.packing import UpdateLayout, has_processor_state
from vjax.runner.programs import OpeningBucket, SampleBucket, ScoreBucket
from vjax.runner.rows import MAX_MASKED_IDS
from vjax.runner.step import SCORED_TOKENS, LogprobsLayout
from vjax.runner.weights import Weights
from vjax.sample.sampler import GREEDY_TEMPERATURE, NO_FEATURES, Feature, Variant

_VARIANT_BITS = 2

#: Writes a bit for each token that may be drawn, for the sampling rows of a step, in their order.
FillMask = Callable[[np.ndarray], None]


@dataclass(slots=True)
class StepMask:
    """A step's mask: i32 [rows of the largest sample program, mask_width(vocab_size)], of which the device may read the
    first ones in place until the step has run."""

    bits: np.ndarray
    is_read: bool = False


@dataclass(slots=True)
class StepHandle:
    """A dispatched step."""

    step_id: int
    num_sampled: int
    #: i32 [R] on the device, on its way to the host, or i32 [R, width] with log probabilities; None when the step
    #: samples nothing.
    tokens: Any
    #: Ready when the forward has run.
    done: Any
    #: Of `tokens` with log probabilities.
    layout: LogprobsLayout | None = None
    #: f32 [R, vocab_size] on the device, when a request asked for the log probabilities of all ids.
    all_logprobs: Any = None
    #: Of the prompt tokens that the step scores.
    scores: list[Scores] = field(default_factory=list)
    #: When a request of the step has a grammar.
    mask: StepMask | None = None

    def result(self) -> StepOutput:
        """Blocks until the step has run.

        Raises:
            EngineStepError: The device failed.
        """
        try:
            scored = StepLogprobs.joined([scores.result() for scores in self.scores]) if self.scores else None
            if self.tokens is None:
                self.done.block_until_ready()
                return StepOutput(self.step_id, [], scored=scored)
            result = np.asarray(self.tokens)[: self.num_sampled]
            if self.mask is not None:
                self.mask.is_read = True
            if self.layout is None:
                return StepOutput(self.step_id, result.tolist(), scored=scored)
            every = None if self.all_logprobs is None else np.asarray(self.all_logprobs)[: self.num_sampled]
            return StepOutput(self.step_id, *self.layout.split(result, every), scored)
        except jax.errors.JaxRuntimeError as e:
            raise EngineStepError(f"step {self.step_id} failed on the device: {e}") from e


@dataclass(slots=True)
class Scores:
    """Dispatched log probabilities of prompt tokens."""

    num_tokens: int
    layout: LogprobsLayout
    #: On the device, on their way to the host; see `Step.score`.
    packed: Any
    all_logprobs: Any = None

    def result(self) -> StepLogprobs:
        every = None if self.all_logprobs is None else np.asarray(self.all_logprobs)[: self.num_tokens]
        return self.layout.split(np.asarray(self.packed)[: self.num_tokens], every)[1]


class ModelRunner:
    """Weights, KV cache, rows and executables of one engine.

    Args:
        step: Functions and shapes.
        leaves: Weights in the order of `model.leaf_names`; the runner owns them from here on.
        executables: The compiled step; what is in it decides shapes and placement.
        load: Makes the leaves again, for who drops them.

    Attributes:
        walls: From `room_for_small_arrays`, where the caches were allocated in it.
    """

    def __init__(
        self,
        leaves: tuple[jax.Array, ...],
        executables: Executables,
        load: Callable[[], tuple[jax.Array, ...]] | None = None,
    ):
        self.executables = executables
        self.step = step = executables.step
        self.mesh = executables.mesh
        self.weights = Weights(step.model, leaves, self.mesh, load)
        self._leaves: tuple[jax.Array, ...] = ()
        self._head: tuple[jax.Array, ...] = ()
        #: By layers of an opening: the leaves that it and its forward take.
        self._parts: dict[int, tuple[tuple[jax.Array, ...], tuple[jax.Array, ...]]] = {}
        self.use_weights()
        # What each row asks of the sample program: its variant, and its features above that; row 0 never samples.
        self._row_code = [0] * (step.geometry.max_num_seqs + 1)
        self._kv: Any = None
        self._rows: Any = None
        self.walls: list[jax.Array] = []
        #: Allocated when the first request needs it.
        self._processors: Any = None
        #: Of steps, oldest first: one is written again when it has been read.
        self._masks: deque[StepMask] = deque()
        self.reset()

    def use_weights(self) -> None:
        """Steps run with the leaves that are in `weights` now."""
        self._leaves = self.weights.leaves() if self.weights.are_on_device else ()
        self._head = self.step.model.head_leaves(self._leaves) if self._leaves else ()
        self._parts = {
            n: self._cut_leaves(n) for n in {bucket.opening for bucket in self.executables.buckets.mixed} - {0}
        }

    def _cut_leaves(self, num_opened: int) -> tuple[tuple[jax.Array, ...], tuple[jax.Array, ...]]:
        """The leaves of an opening of so many layers, and those of the layers behind it."""
        model = self.step.model
        if not self._leaves:
            return (), ()
        num_others = model.arch.num_layers - num_opened
        first, others = (0, num_opened), (num_opened, num_others)
        return model.layer_leaves(self._leaves, *first), model.layer_leaves(self._leaves, *others)

    def reset(self) -> None:
        """Allocates an empty KV cache and empty rows; what was there is gone, whoever still refers to it."""
        self._free_cache()
        kv_sharding = named_sharding(self.mesh, (None, "kv_heads", None, None))
        self._kv = allocate(self.step.kv_specs(), kv_sharding, "the KV cache")
        self._rows = allocate(self.step.row_specs(), named_sharding(self.mesh, ()), "the rows of the batch")

    # ---- sleep --------------------------------------------------------------------------------------------------

    @property
    def asleep(self) -> frozenset[str]:
        """What is not on the device, of "weights" and "kv_cache"; steps need both."""
        there = {"weights": self.weights.are_on_device, "kv_cache": self._kv is not None}
        return frozenset(tag for tag, is_there in there.items() if not is_there)

    def sleep(self, level: int) -> None:
        """Frees the KV cache and the rows, and moves the weights to the host (1) or drops them (2). Nothing is in
        flight."""
        self._free_cache()
        self._free_walls()
        if level > 1:
            self.weights.drop()
        else:
            self.weights.to_host()
        self.use_weights()

    def wake_up(self, tags: Collection[str] = ("weights", "kv_cache")) -> None:
        """Brings back what `tags` name and what sleeps: the weights first and an empty KV cache behind them, as at the
        start.

        Raises:
            OutOfMemoryError: Something else has taken the memory; what is not back sleeps on.
        """
        if "weights" in tags:
            self.weights.restore()
            self.use_weights()
        if "kv_cache" in tags and self._kv is None:
            device = self.mesh.devices.flat[0]
            try:
                if self.executables.platform == "gpu":
                    with room_for_small_arrays(device) as walls:
                        self.reset()
                    self.walls = walls
                else:
                    self.reset()
            except BaseException:
                self._free_cache()
                raise

    def module(self) -> Any:
        """The Flax module, whose parameters are the engine's own arrays: to look at, and not to keep.

        Raises:
            EngineAsleepError: The weights are not on the device.
        """
        if not self._leaves:
            raise EngineAsleepError('The weights are not on the device: call wake_up(tags=["weights"]) first.')
        return self.step.model.module(self._leaves)

    def reload_weights(self) -> None:
        """Loads the checkpoint's weights anew, in place of those that are there: for `collective_rpc`."""
        self.weights.reload()
        self.use_weights()

    def warm_up(self, repeats: int = 3) -> None:
        """Runs every ready executable on an empty batch: command buffers record on the second run and replay from the
        third on. Only the null row and the null block are written."""
        for key, compiled in self.executables.ready():
            for _ in range(repeats):
                self._run_empty(key, compiled)
        jax.block_until_ready(self._rows)

    def execute(self, scheduled: SchedulerOutput, fill_mask: FillMask | None = None) -> StepHandle:
        """Dispatches one step and returns at once.

        Args:
            fill_mask: Given where a row that samples has a grammar. Called when the forward is on its way to the
                device, with i32 [at least num_sampled, mask_width(vocab_size)], in which anything may stand. It may
                wait for the steps before this one.

        Raises:
            EngineStepError: The dispatch failed; the device state is lost and `reset` is due.
        """
        bucket, forward = self.executables.forward_for(
            scheduled.num_tokens, len(scheduled.rows), keeps_hidden=bool(scheduled.scored_indices)
        )
        layout = self.step.layout(bucket)
        fits = layout.fits(scheduled)
        packed = layout.pack(scheduled, with_updates=fits)
        variant, features = self._track_rows(scheduled)
        sampling = mask = None
        if scheduled.num_sampled:
            sampling = self.executables.sample_for(scheduled.num_sampled, variant, features)
        try:
            self._write_ahead(scheduled, fits)
            done, *hidden = self._forward(bucket, forward, packed)
            scores = self._score(scheduled, hidden[0]) if hidden else []
            tokens, all_logprobs = None, []
            if sampling is not None:
                sample_bucket, sample = sampling
                state = (self._processor_state(),) if features else ()
                if fill_mask is not None:
                    mask = self._filled_mask(sample_bucket, fill_mask)
                    state += (mask.bits[: sample_bucket.num_rows],)
                self._rows, tokens, *all_logprobs = sample(self._head, self._rows, *state)
                for result in (tokens, *all_logprobs):
                    result.copy_to_host_async()
        except EngineStepError:
            raise
        except (jax.errors.JaxRuntimeError, RuntimeError) as e:
            raise EngineStepError(f"step {scheduled.step_id} could not be dispatched: {e}") from e
        layout = self.step.logprobs_layout if Feature.LOGPROBS in features else None
        handle = StepHandle(scheduled.step_id, scheduled.num_sampled, tokens, done, layout, *all_logprobs)
        handle.scores = scores
        if mask is not None:
            handle.mask = mask
            self._masks.append(mask)
        return handle

    def shutdown(self) -> None:
        """Frees every device array. The pool itself goes back to the driver when the process
        ends."""
        self.executables.shutdown()
        self.weights.delete()
        self._leaves = self._head = ()
        self._parts = {}
        self._free_cache()
        self._free_walls()

    # ---- details ------------------------------------------------------------------------------------------------

    def _free_cache(self) -> None:
        _delete((self._kv, self._rows, self._processors))
        self._kv = self._rows = self._processors = None
        self._masks.clear()

    def _free_walls(self) -> None:
        _delete(self.walls)
        self.walls = []

    def _write_ahead(self, scheduled: SchedulerOutput, fits: bool) -> None:
        """Row writes that the step's own buffer cannot carry."""
        if not fits:
            write = self.executables.update("write_rows")
            for buffer in UpdateLayout().pack(scheduled):
                self._rows = write(self._rows, buffer)
        for init in scheduled.new_rows:
            if init.masked_token_ids:
                buffer = np.full(1 + MAX_MASKED_IDS, np.iinfo(np.int32).max, np.int32)
                buffer[0] = init.row
                buffer[1 : 1 + len(init.masked_token_ids)] = init.masked_token_ids
                self._rows = self.executables.update("write_masked_ids")(self._rows, buffer)
            if has_processor_state(init):
                buffer = self.step.processor_layout.pack(init)
                self._processors = self.executables.update("write_processors")(self._processor_state(), buffer)

    def _filled_mask(self, bucket: SampleBucket, fill_mask: FillMask) -> StepMask:
        """A mask whose first rows, as many as the program takes, are filled; none of a step in flight."""
        assert Feature.MASK in bucket.features, bucket
        if self._masks and self._masks[0].is_read:
            mask = self._masks.popleft()
            mask.is_read = False
        else:
            mask = StepMask(np.empty(self.step.mask_spec(self.executables.buckets.sample[-1]).shape, np.int32))
        try:
            fill_mask(mask.bits[: bucket.num_rows])
        except EngineStepError:
            raise
        except Exception as e:  # the forward has run: the step cannot be taken back
            raise EngineStepError(f"the mask of a step could not be filled: {type(e).__name__}: {e}") from e
        return mask

    def _forward(self, bucket: ForwardBucket, forward: Any, packed: np.ndarray) -> list[jax.Array]:
        """Dispatches a forward, its opening first, and returns what it gives beside the caches and rows."""
        num_opened = bucket.opening
        if not num_opened:
            self._kv, self._rows, *others = forward(self._leaves, self._kv, self._rows, packed)
            return others
        first_leaves, other_leaves = self._parts[num_opened]
        opening = self.executables.opening_of(bucket)
        first_kv, self._rows, opened = opening(first_leaves, self._kv[:num_opened], self._rows, packed)
        other_kv, self._rows, *others = forward(other_leaves, self._kv[num_opened:], self._rows, opened)
        self._kv = (*first_kv, *other_kv)
        return others

    def _score(self, scheduled: SchedulerOutput, hidden: jax.Array) -> list[Scores]:
        layout = self.step.logprobs_layout
        with_all = not 0 <= scheduled.scored_num_top <= layout.num_top
        program = self.executables.score_for(hidden.shape[0], with_all=with_all)
        scores = []
        for start in range(0, len(scheduled.scored_indices), SCORED_TOKENS):
            part = slice(start, start + SCORED_TOKENS)
            n = len(scheduled.scored_indices[part])
            packed = np.zeros((2, SCORED_TOKENS), np.int32)
            packed[0, :n], packed[1, :n] = scheduled.scored_indices[part], scheduled.scored_token_ids[part]
            results = program(self._head, hidden, packed)
            for result in results:
                result.copy_to_host_async()
            scores.append(Scores(n, layout, *results))
        return scores

    def _track_rows(self, scheduled: SchedulerOutput) -> tuple[Variant, Feature]:
        """The least variant and the features that serve every sampling row of the step."""
        for init in scheduled.new_rows:
            features = row_features(init, self.step.logprobs_layout.num_top)
            self._row_code[init.row] = row_variant(init) | features << _VARIANT_BITS
        if not scheduled.num_sampled:
            return Variant.GREEDY, NO_FEATURES
        codes = {self._row_code[row] for row in scheduled.rows[: scheduled.num_sampled]}
        largest = max(codes)
        if largest < 1 << _VARIANT_BITS:
            return Variant(largest), NO_FEATURES
        return Variant.FULL, Feature(reduce(or_, codes) >> _VARIANT_BITS)

    def _processor_state(self) -> Any:
        if self._processors is None:
            sharding = named_sharding(self.mesh, ())
            self._processors = allocate(self.step.processor_specs(), sharding, "the state of logits processors")
        return self._processors

    def _run_empty(self, key: Any, compiled: Any) -> None:
        if isinstance(key, ForwardBucket):
            self._forward(key, compiled, self.step.layout(key).pack(SchedulerOutput(step_id=-1)))
        elif isinstance(key, OpeningBucket):
            pass  # runs with its forward
        elif key == "write_rows":
            self._rows = compiled(self._rows, np.zeros(UpdateLayout().size, np.int32))
        elif key == "write_masked_ids":
            self._rows = compiled(self._rows, np.zeros(1 + MAX_MASKED_IDS, np.int32))
        elif key == "write_processors":
            buffer = np.zeros(self.step.processor_layout.size, np.int32)
            self._processors = compiled(self._processor_state(), buffer)
        elif isinstance(key, ScoreBucket):
            arch = self.step.model.arch
            hidden = np.zeros((key.num_tokens, arch.hidden_size), self.step.model.dtype)
            compiled(self._head, hidden, np.zeros((2, SCORED_TOKENS), np.int32))
        elif isinstance(key, SampleBucket) and key.features:
            spec = self.step.mask_spec(key.num_rows)
            mask = (np.zeros(spec.shape, spec.dtype),) if Feature.MASK in key.features else ()
            self._rows, *_ = compiled(self._head, self._rows, self._processor_state(), *mask)
        else:
            self._rows, _ = compiled(self._head, self._rows)


def _delete(arrays: Any) -> None:
    """Frees device memory now: a traceback or a user may hold references for long."""
    for array in jax.tree.leaves(arrays):
        if not array.is_deleted():
            array.delete()


def row_features(init: RowInit, num_top: int) -> Feature:
    """What one request asks for beside a token, of programs that find the `num_top` most probable ones."""
    p = init.sampling_params
    features = NO_FEATURES
    if p.has_penalties or p.logit_bias or p.allowed_token_ids or init.bad_words_token_ids:
        features |= Feature.PROCESSORS
    if p.thinking_token_budget is not None:
        features |= Feature.THINKING
    if init.processor_values:
        features |= Feature.CUSTOM
    if p.wants_logprobs:
        features |= Feature.LOGPROBS
        if p.logprobs is not None and not 0 <= p.logprobs <= num_top:
            features |= Feature.ALL_LOGPROBS
    if init.has_grammar:
        features |= Feature.MASK
    return features


def row_variant(init: RowInit) -> Variant:
    """The least sample program for one request."""
    p = init.sampling_params
    if p.min_tokens:
        return Variant.FULL
    if p.temperature < GREEDY_TEMPERATURE:
        return Variant.GREEDY
    if p.top_k > 0 or p.top_p < 1 or p.min_p > 0:
        return Variant.FULL
    return Variant.RANDOM
