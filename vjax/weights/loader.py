"""Streams a checkpoint onto the mesh, one leaf at a time."""

from __future__ import annotations

import functools
import sys
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from tqdm import tqdm

from vjax.errors import ModelLoadError
from vjax.layers.param import initial_value
from vjax.models.functional import FunctionalModel
from vjax.parallel.sharding import named_sharding
from vjax.weights.checkpoint import Checkpoint
from vjax.weights.mapping import LeafSources, check_tensors, leaf_sources
from vjax.weights.packing import PACKERS

LOAD_FORMATS = ("auto", "safetensors", "dummy")


def load_weights(
    model: FunctionalModel,
    path: str | Path,
    *,
    mesh: Mesh,
    load_format: str = "auto",
    seed: int = 0,
    given: Mapping[str, np.ndarray] | None = None,
    show_progress: bool = True,
) -> tuple[jax.Array, ...]:
    """The model's leaves, in the order of `model.leaf_names`, each on its placement on the mesh.

    Host memory is bounded by the tensors of one leaf; device memory in excess of the weights, too.

    Args:
        model: From `build_model`.
        path: Model directory, see `vjax.weights.hub.resolve_model_path`. Not read for "dummy".
        mesh: From `vjax.parallel.sharding.make_mesh`.
        load_format: "auto" or "safetensors" reads safetensors files; "dummy" draws random weights on the device.
        seed: Of the random weights.
        given: Leaves whose values the caller has, by name.
        show_progress: Show a progress bar when stderr is a terminal.

    Raises:
        ModelLoadError: There are no weights, a file is damaged, or tensors are missing, unexpected, mis-shaped or of a
            dtype that is not supported (all of them in one message).
    """
    if load_format not in LOAD_FORMATS:
        raise ModelLoadError(
            f"load_format is {load_format!r}; it must be one of {', '.join(LOAD_FORMATS)}.",
            parameter="load_format",
            value=load_format,
        )
    shardings = {name: named_sharding(mesh, model.logical_axes[name]) for name in model.leaf_names}
    given = given or {}
    if load_format == "dummy":
        return _each_leaf(model, lambda name: _random_leaf(model, name, seed, shardings[name]), show_progress)
    shapes = {name: spec.shape for name, spec in model.leaf_specs.items() if name not in given}
    sources = leaf_sources(model.weight_rules, shapes, model.arch.num_layers)
    with Checkpoint(Path(path)) as checkpoint:
        check_tensors(sources, checkpoint.tensors, tied=model.arch.tie_word_embeddings, where=str(path))

        def make(name: str) -> jax.Array:
            if name in given:
                return jax.device_put(given[name], shardings[name])
            return _load_leaf(sources[name], checkpoint, model.leaf_specs[name].dtype, shardings[name])

        return _each_leaf(model, make, show_progress)


def _each_leaf(model: FunctionalModel, make: Callable[[str], jax.Array], show_progress: bool) -> tuple[jax.Array, ...]:
    hidden = not (show_progress and sys.stderr.isatty())
    leaves = []
    for name in tqdm(model.leaf_names, desc="Loading weights", unit="leaf", disable=hidden):
        # Waiting here is what bounds memory: the host does not run ahead of the transfers.
        leaves.append(jax.block_until_ready(make(name)))
    return tuple(leaves)


def _load_leaf(sources: LeafSources, checkpoint: Checkpoint, dtype, sharding: NamedSharding) -> jax.Array:
    tensors = [[checkpoint.read(name) for name in group] for group in sources.groups]
    if sources.stacked:
        # Small parameters: joined on the host.
        packing = PACKERS[sources.packing]
        stacked = np.stack([packing.pack(np, group, sources.packed_shape) for group in tensors])
        return jax.device_put(stacked.astype(dtype), sharding)
    # Transposing on the device is far faster than on the host.
    pack = _pack_on_device(sources.packing, sources.packed_shape, jnp.dtype(dtype).name, sharding)
    return pack(tensors[0])


@functools.cache
def _pack_on_device(packing: str, shape: tuple[int, ...], dtype: str, sharding: NamedSharding) -> Callable:
    """A jitted packing, shared by all layers."""

    def pack(sources: list[jax.Array]) -> jax.Array:
        return PACKERS[packing].pack(jnp, [source.astype(dtype) for source in sources], shape)

    return jax.jit(pack, out_shardings=sharding)


def _random_leaf(model: FunctionalModel, name: str, seed: int, sharding: NamedSharding) -> jax.Array:
    spec = model.leaf_specs[name]
    draw = _random_on_device(model.initialisers[name], spec.shape, jnp.dtype(spec.dtype).name, sharding)
    # The name, not the position, decides: a model keeps its values when leaves are added.
    return draw(np.uint32(seed % 2**32), np.uint32(zlib.crc32(name.encode())))


@functools.cache
def _random_on_device(init: str, shape: tuple[int, ...], dtype: str, sharding: NamedSharding) -> Callable:
    """A jitted initialiser, shared by leaves of the same shape."""

    def draw(seed: jax.Array, name_hash: jax.Array) -> jax.Array:
        return initial_value(init, jax.random.fold_in(jax.random.key(seed), name_hash), shape, dtype)

    return jax.jit(draw, out_shardings=sharding)
