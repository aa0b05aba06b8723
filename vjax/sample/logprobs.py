"""Log probabilities of drawn tokens, of the most probable ones and of ids that a request names."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

#: Ids of a group: of the most probable tokens, each is the largest of its group or shares one with a larger one.
_GROUP = 128


class TokenLogprobs(NamedTuple):
    """Of R tokens and the K most probable ids beside each."""

    logprob: jax.Array
    """f32 [R]."""
    rank: jax.Array
    """i32 [R], from 1: how many ids are at least as probable."""
    top_ids: jax.Array
    """i32 [R, K], most probable first; of equal ones the smaller id."""
    top_logprobs: jax.Array
    """f32 [R, K]."""


def token_logprobs(values: jax.Array, token_ids: jax.Array, num_top: int) -> TokenLogprobs:
    """Looks up `token_ids` i32 [R] in values f32 [R, V], log probabilities or logits."""
    logprob = jnp.take_along_axis(values, token_ids[:, None], axis=1)
    rank = (values >= logprob).sum(axis=1, dtype=jnp.int32)
    top_logprobs, top_ids = largest(values, num_top)
    return TokenLogprobs(logprob[:, 0], rank, top_ids, top_logprobs)


def largest(values: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """The k largest of each row of f32 [R, V] and their indices i32, as `lax.top_k`, without sorting all of a row.

    The groups with the k largest maxima hold them all; one pass over the values finds these groups.
    """
    num_rows, size = values.shape
    num_groups = -(-size // _GROUP)
    if k == 0 or num_groups <= k:
        return lax.top_k(values, k)
    padded = jnp.pad(values, ((0, 0), (0, num_groups * _GROUP - size)), constant_values=-jnp.inf)
    groups = padded.reshape(num_rows, num_groups, _GROUP)
    # In rising order, so that of equal values the one with the smaller index still comes first.
    chosen = jnp.sort(lax.top_k(groups.max(axis=2), k)[1], axis=1)
    candidates = jnp.take_along_axis(groups, chosen[:, :, None], axis=1).reshape(num_rows, k * _GROUP)
    top, position = lax.top_k(candidates, k)
    group = jnp.take_along_axis(chosen, position // _GROUP, axis=1)
    return top, group * _GROUP + position % _GROUP
