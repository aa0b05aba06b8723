"""From logits to tokens, for a fixed number of rows.

Order of operations as in vLLM: min_tokens mask, argmax for greedy rows; temperature, min_p, top_k, top_p, Gumbel-max
for the others. Randomness is a pure function of (seed, position, purpose): a draw does not depend on the batch, on
preemption or on the mode.
"""

from __future__ import annotations

import enum

import jax
import jax.numpy as jnp

from pallas_kernels import truncate_logits

#: Below this a temperature means greedy.
GREEDY_TEMPERATURE = 1e-5

#: Purposes that keep draws for different ends apart.
PURPOSE_SAMPLE = 0


class Variant(enum.IntEnum):
    """The finite list of sample programs. Each does all that the ones before it do; a step runs the least that serves
    every row of it."""

    GREEDY = 0
    RANDOM = 1  # temperature
    FULL = 2  # top_k, top_p, min_p and min_tokens


class Feature(enum.IntFlag):
    """What a sample program does beside drawing tokens. Programs with features are all of the variant FULL, and are
    compiled when the first request asks for the combination."""

    #: Allowed ids, biases, penalties and bad words.
    PROCESSORS = 1
    #: Log probabilities of the tokens drawn, of the most probable ones and of named ids.
    LOGPROBS = 2
    #: Those of the whole vocabulary as well.
    ALL_LOGPROBS = 4
    #: The end of reasoning, forced when a budget is spent.
    THINKING = 8
    #: Logits processors of the engine's user.
    CUSTOM = 16
    #: The tokens that grammars allow.
    MASK = 32


NO_FEATURES = Feature(0)


def gumbel_noise(seed_low: jax.Array, seed_high: jax.Array, position: jax.Array, vocab_size: int) -> jax.Array:
    """Standard Gumbel noise f32 [R, vocab_size] for seeds u32 [R], [R] and positions i32 [R]."""

    def one(low, high, pos):
        key = jax.random.wrap_key_data(jnp.stack([high, low]), impl="threefry2x32")
        key = jax.random.fold_in(jax.random.fold_in(key, pos), PURPOSE_SAMPLE)
        return jax.random.gumbel(key, (vocab_size,), jnp.float32)

    return jax.vmap(one)(seed_low, seed_high, position)


def mask_ids(logits: jax.Array, ids: jax.Array, active: jax.Array) -> jax.Array:
    """-inf at `ids` i32 [R, K] of the rows where `active` bool [R]; ids out of the vocabulary are dropped."""
    ids = jnp.where(active[:, None], ids, logits.shape[1])
    return logits.at[jnp.arange(logits.shape[0])[:, None], ids].set(-jnp.inf, mode="drop")


def sample_tokens(
    logits: jax.Array,
    *,
    variant: Variant,
    temperature: jax.Array,
    top_k: jax.Array,
    top_p: jax.Array,
    min_p: jax.Array,
    seed_low: jax.Array,
    seed_high: jax.Array,
    position: jax.Array,
    min_position: jax.Array,
    masked_ids: jax.Array,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Tokens i32 [R] from logits f32 [R, V], and the logits that they were drawn from; every parameter is [R] but
    masked_ids [R, K].

    Args:
        position: Index in the sequence of the token being drawn.
        min_position: First index at which `masked_ids` may be drawn.
    """
    if variant == Variant.FULL:
        logits = mask_ids(logits, masked_ids, position < min_position)
    greedy = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    if variant == Variant.GREEDY:
        return greedy, logits
    is_greedy = temperature < GREEDY_TEMPERATURE
    scaled = logits / jnp.where(is_greedy, jnp.float32(1), temperature)[:, None]
    if variant == Variant.FULL:
        scaled = truncate_logits(scaled, top_k, top_p, min_p, implementation=implementation)
    noise = gumbel_noise(seed_low, seed_high, position, logits.shape[1])
    tokens = jnp.where(is_greedy, greedy, jnp.argmax(scaled + noise, axis=-1).astype(jnp.int32))
    return tokens, jnp.where(is_greedy[:, None], logits, scaled)
