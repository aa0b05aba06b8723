"""The programs of one engine: what each computes, of which arrays, and what it gives away.

Knows nothing of when programs are lowered and compiled; see `executables.py` and `lowered.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from vjax.parallel.sharding import named_sharding
from vjax.runner.buckets import Buckets, ForwardBucket
from vjax.runner.packing import UpdateLayout
from vjax.runner.rows import MAX_MASKED_IDS
from vjax.runner.step import POOLED_VECTORS, SCORED_TOKENS, Step
from vjax.sample.sampler import NO_FEATURES, Feature, Variant


@dataclass(frozen=True)
class SampleBucket:
    """Shape of one sample executable."""

    num_rows: int
    variant: Variant
    #: Any of them: the variant is FULL.
    features: Feature = NO_FEATURES

    @property
    def name(self) -> str:
        parts = [self.variant, *self.features]
        return f"sample_{'_'.join((part.name or '').lower() for part in parts)}[{self.num_rows}]"


@dataclass(frozen=True)
class ScoreBucket:
    """Shape of one executable that scores tokens of prompts: tokens of the forward that it looks at."""

    num_tokens: int
    #: Whether it returns the log probabilities of the whole vocabulary as well.
    with_all: bool

    @property
    def name(self) -> str:
        return f"score{'_all' if self.with_all else ''}[{self.num_tokens}]"


@dataclass(frozen=True)
class PoolBucket:
    """Shape of one executable that pools: tokens of the forward that it looks at."""

    num_tokens: int
    #: Whether it gives sums over ranges of tokens, or vectors of single ones.
    sums: bool

    @property
    def name(self) -> str:
        return f"pool{'_sums' if self.sums else ''}[{self.num_tokens}]"


@dataclass(frozen=True)
class OpeningBucket:
    """Shape of the executable of a forward's first layers."""

    forward: ForwardBucket

    @property
    def name(self) -> str:
        return f"opening_{self.forward.name}"


#: A bucket, "write_rows", "write_masked_ids" or "write_processors".
Key = ForwardBucket | OpeningBucket | SampleBucket | ScoreBucket | PoolBucket | str


@dataclass(frozen=True, eq=False)
class Program:
    """A pure function of trees of arrays.

    Attributes:
        name: Of the compiled module, after "jit_".
        function: Takes `arguments`.
        donated: Positions of the arguments that it updates in place.
        arguments: Trees of ShapeDtypeStructs; placed, when the program was made for a mesh.
    """

    name: str
    function: Callable
    donated: tuple[int, ...]
    arguments: tuple


def sample_buckets(sizes: Sequence[int]) -> list[SampleBucket]:
    """Every sample program, by variant and then by size. Those that truncate take long to lower: every other size."""
    sparse = sizes[::-2][::-1]
    return [SampleBucket(n, v) for v in Variant for n in (sizes if v < Variant.FULL else sparse)]


@cache
def feature_bucket(sizes: tuple[int, ...], num_rows: int, features: Feature) -> SampleBucket:
    """The program that samples `num_rows` rows with these features, of the same sizes as those that truncate."""
    return SampleBucket(next(n for n in sizes[::-2][::-1] if n >= num_rows), Variant.FULL, features)


def all_keys(buckets: Buckets) -> list[Key]:
    """Every program of an engine, those that take longest to compile first, but those that the first request with such
    a feature brings: `feature_bucket`'s, "write_processors", `ScoreBucket`s and forwards that keep hidden states. Of
    sample programs of a size the greedy one comes long before the others, which then find the head's product tuned."""
    samples = sample_buckets(buckets.sample)[::-1]
    greedy = [key for key in samples if key.variant == Variant.GREEDY]
    if not buckets.sample:  # a model that pools
        pools = [PoolBucket(bucket.num_tokens, sums) for bucket in buckets.mixed[::-1] for sums in (True, False)]
        return [*buckets.mixed[::-1], *pools, "write_rows"]
    openings = [OpeningBucket(bucket) for bucket in buckets.mixed[::-1] if bucket.opening]
    forwards = [*buckets.mixed[::-1], *buckets.decode[::-1], *openings]
    return [*greedy, *forwards, *(k for k in samples if k not in greedy), *UPDATES]


#: What carries row writes that a step's own buffer cannot.
UPDATES = ("write_rows", "write_masked_ids")


def make_program(step: Step, key: Key, mesh: Mesh | None) -> Program:
    """The program of `key`, its arguments placed on `mesh` (None: not placed)."""
    model = step.model

    def placed(spec: Any, axes: tuple[str | None, ...]) -> jax.ShapeDtypeStruct:
        sharding = None if mesh is None else named_sharding(mesh, axes)
        return jax.ShapeDtypeStruct(spec.shape, spec.dtype, sharding=sharding)

    def leaves(names: Sequence[str]) -> tuple[jax.ShapeDtypeStruct, ...]:
        return tuple(placed(model.leaf_specs[name], model.logical_axes[name]) for name in names)

    def buffer(size: int) -> jax.ShapeDtypeStruct:
        return placed(jax.ShapeDtypeStruct((size,), jnp.int32), (None,))

    rows = jax.tree.map(lambda s: placed(s, (None,) * len(s.shape)), step.row_specs())
    processors = jax.tree.map(lambda s: placed(s, (None, None)), step.processor_specs())
    caches = jax.tree.map(lambda s: placed(s, (None, "kv_heads", None, None)), step.kv_specs())
    if isinstance(key, ForwardBucket):

        def forward(leaves, kv, rows, given):
            return step.forward(key, leaves, kv, rows, given)

        if key.opening:
            given = jax.tree.map(lambda s: placed(s, (None,) * len(s.shape)), step.opened_specs(key))
        else:
            given = buffer(step.layout(key).size)
        kv = caches[key.opening :]
        names = model.layer_leaf_names(key.opening, len(kv))
        return Program("forward", forward, (1, 2), (leaves(names), kv, rows, given))
    if isinstance(key, OpeningBucket):
        bucket = key.forward

        def opening(leaves, kv, rows, packed):
            return step.opening(bucket, leaves, kv, rows, packed)

        kv, names = caches[: bucket.opening], model.layer_leaf_names(0, bucket.opening)
        arguments = (leaves(names), kv, rows, buffer(step.layout(bucket).size))
        return Program("opening", opening, (1, 2), arguments)
    if isinstance(key, SampleBucket):
        head_leaves = leaves(model.head_leaf_names)
        if key.features:

            def sample_with_features(head, rows, state, *mask):
                return step.sample_with_features(key.num_rows, key.features, head, rows, state, *mask)

            arguments = (head_leaves, rows, processors)
            if Feature.MASK in key.features:
                arguments += (placed(step.mask_spec(key.num_rows), (None, None)),)
            return Program("sample_with_features", sample_with_features, (1,), arguments)

        def sample(head, rows):
            return step.sample(key.num_rows, key.variant, head, rows)

        return Program("sample", sample, (1,), (head_leaves, rows))
    if isinstance(key, ScoreBucket):

        def score(head, hidden, packed):
            return step.score(key.with_all, head, hidden, packed)

        hidden = placed(jax.ShapeDtypeStruct((key.num_tokens, model.arch.hidden_size), model.dtype), (None, None))
        packed = placed(jax.ShapeDtypeStruct((2, SCORED_TOKENS), jnp.int32), (None, None))
        return Program("score", score, (), (leaves(model.head_leaf_names), hidden, packed))
    if isinstance(key, PoolBucket):
        function = step.pool_sums if key.sums else step.pool
        hidden = placed(jax.ShapeDtypeStruct((key.num_tokens, model.arch.hidden_size), model.dtype), (None, None))
        shape = (2, POOLED_VECTORS) if key.sums else (POOLED_VECTORS,)
        packed = placed(jax.ShapeDtypeStruct(shape, jnp.int32), (None,) * len(shape))
        return Program("pool", function, (), (leaves(model.head_leaf_names), hidden, packed))
    if key == "write_processors":
        return Program(key, step.write_processors, (0,), (processors, buffer(step.processor_layout.size)))
    if key == "write_rows":
        return Program(key, step.write_rows, (0,), (rows, buffer(UpdateLayout().size)))
    assert key == "write_masked_ids", key
    return Program(key, step.write_masked_ids, (0,), (rows, buffer(1 + MAX_MASKED_IDS)))


def lower(program: Program, mesh: Mesh) -> Any:
    """The lowered (not yet compiled) program; its arguments are placed on `mesh`."""

    def function(*arguments):
        return program.function(*arguments)

    function.__name__ = program.name
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        return jax.jit(function, donate_argnums=program.donated).lower(*program.arguments)
