"""Streams a checkpoint onto the mesh, one leaf at a time."""

from __future__ import annotations

import functools
import math
import sys
import zlib
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from tqdm import tqdm

from vjax.models.functional import FunctionalModel
from vjax.parallel.sharding import named_sharding
from vjax.weights.checkpoint import Checkpoint
from vjax.weights.manifest import stored_format
from vjax.weights.mapping import LeafSources, as_stored, check_tensors, leaf_sources
from vjax.weights.orbax_parts import restore_leaves
from vjax.weights.packing import PACKERS

#: Bytes of the leaves that may be under way from a file to the devices.
IN_FLIGHT_BYTES = 512 << 20
#: "dummy" draws uniformly from -DUMMY_LIMIT to DUMMY_LIMIT, as vLLM does: a product's energy, and with it the clock of
#: a GPU at its power limit, depends on the values.
DUMMY_LIMIT = 1e-3


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

    Host memory is bounded by the leaves that are under way, IN_FLIGHT_BYTES or the largest one (Orbax: by two parts of
    the checkpoint); device memory in excess of the weights, too.

    Args:
        model: From `build_model`.
        path: Model directory, see `vjax.weights.hub.resolve_model_path`. Not read for "dummy".
        mesh: From `vjax.parallel.sharding.make_mesh`.
        load_format: See `vjax.weights.manifest.stored_format`; "dummy" draws random weights on the device.
        seed: Of the random weights.
        given: Leaves whose values the caller has, by name.
        show_progress: Show a progress bar when stderr is a terminal.

    Raises:
        ModelLoadError: There are no weights, a file is damaged, or tensors are missing, unexpected, mis-shaped or of a
            dtype that is not supported (all of them in one message).
    """
    given = given or {}
    if stored_format(path, load_format) == "dummy":
        stored = _random_leaves(model, seed, mesh)
    else:
        stored = stored_leaves(model, path, mesh=mesh, load_format=load_format, exclude=given.keys())
    hidden = not (show_progress and sys.stderr.isatty())
    leaves: dict[str, jax.Array] = {}
    with tqdm(total=len(model.leaf_names), desc="Loading weights", unit="leaf", disable=hidden) as bar:
        for name, leaf in stored:
            leaves[name] = leaf
            bar.update()
        for name in given.keys() - leaves.keys():
            leaves[name] = jax.device_put(given[name], named_sharding(mesh, model.logical_axes[name]))
            bar.update()
    return tuple(leaves[name] for name in model.leaf_names)


def stored_leaves(
    model: FunctionalModel,
    path: str | Path,
    *,
    mesh: Mesh,
    load_format: str = "auto",
    dtypes: Mapping[str, Any] | None = None,
    exclude: Collection[str] = (),
) -> Iterator[tuple[str, jax.Array]]:
    """(name, leaf) of every leaf of the checkpoint, but for those to `exclude`, as they become ready, in the order of
    `model.leaf_names`. Arguments and errors as for `load_weights`.

    Args:
        dtypes: name -> dtype; None is the model's.
    """
    specs = {name: spec for name, spec in model.leaf_specs.items() if name not in exclude}
    targets = {
        name: jax.ShapeDtypeStruct(
            spec.shape,
            spec.dtype if dtypes is None else dtypes[name],
            sharding=named_sharding(mesh, model.logical_axes[name]),
        )
        for name, spec in specs.items()
    }
    if stored_format(path, load_format) == "orbax":
        yield from restore_leaves(Path(path), targets, model.arch.architecture)
        return
    shapes = {name: spec.shape for name, spec in specs.items()}
    sources = leaf_sources(model.weight_rules, shapes, model.arch.num_layers)
    with Checkpoint(Path(path)) as checkpoint:
        sources = as_stored(sources, checkpoint.tensors)
        check_tensors(sources, checkpoint.tensors, where=str(path))
        # Waiting for the oldest is what bounds memory; beginning the next ones before overlaps reading with transfers.
        begun: deque[tuple[str, jax.Array]] = deque()
        for name, target in targets.items():
            begun.append((name, _load_leaf(sources[name], checkpoint, target.dtype, target.sharding)))
            while sum(leaf.nbytes for _, leaf in begun) > IN_FLIGHT_BYTES:
                yield _ready(*begun.popleft())
        while begun:
            yield _ready(*begun.popleft())


def _ready(name: str, leaf: jax.Array) -> tuple[str, jax.Array]:
    return name, jax.block_until_ready(leaf)


def _load_leaf(sources: LeafSources, checkpoint: Checkpoint, dtype, sharding: NamedSharding) -> jax.Array:
    tensors = [[checkpoint.read(name) for name in group] for group in sources.groups]
    return pack_leaf(sources, tensors, dtype, sharding)


def pack_leaf(sources: LeafSources, tensors: list[list[Any]], dtype, sharding: NamedSharding) -> jax.Array:
    """A leaf on its placement, from the numpy or jax arrays of its groups; its memory is its own."""
    if sources.stacked:
        # Small parameters: joined on the host.
        packing = PACKERS[sources.packing]
        cast = [[np.asarray(tensor).astype(dtype) for tensor in group] for group in tensors]
        return jax.device_put(np.stack([packing.pack(np, group, sources.packed_shape) for group in cast]), sharding)
    if sources.packing == "copy" and tensors[0][0].dtype == dtype:
        # The largest leaves; a program would hold them twice.
        return place(tensors[0][0], sharding)
    # Transposing on the device is far faster than on the host.
    pack = _pack_on_device(sources.packing, sources.packed_shape, jnp.dtype(dtype).name, sharding)
    return pack(tensors[0])


def place(array: Any, sharding: NamedSharding) -> jax.Array:
    """A numpy or jax array on its placement, in memory of its own."""
    if isinstance(array, jax.Array):
        return jax.device_put(array, sharding, may_alias=False)
    if next(iter(sharding.device_set)).platform == "cpu":
        # The CPU takes numpy's memory as it is where that is aligned, whatever may_alias says: a file's, or the user's.
        array = array.copy()
    # A GPU reads a file's pages as they are transferred: told not to alias, JAX might copy a leaf on the host first.
    return jax.device_put(array, sharding)


@functools.cache
def _pack_on_device(packing: str, shape: tuple[int, ...], dtype: str, sharding: NamedSharding) -> Callable:
    """A jitted packing, shared by all layers."""

    def pack(sources: list[jax.Array]) -> jax.Array:
        return PACKERS[packing].pack(jnp, [source.astype(dtype) for source in sources], shape)

    return jax.jit(pack, out_shardings=sharding)


def _random_leaves(model: FunctionalModel, seed: int, mesh: Mesh) -> Iterator[tuple[str, jax.Array]]:
    for name, spec in model.leaf_specs.items():
        sharding = named_sharding(mesh, model.logical_axes[name])
        draw = _random_on_device(model.initialisers[name], spec.shape, jnp.dtype(spec.dtype).name, sharding)
        # The name, not the position, decides: a model keeps its values when leaves are added.
        leaf = draw(np.uint32(seed % 2**32), np.uint32(zlib.crc32(name.encode())))
        yield name, jax.block_until_ready(leaf)


@functools.cache
def _random_on_device(init: str, shape: tuple[int, ...], dtype: str, sharding: NamedSharding) -> Callable:
    """A jitted generator, shared by leaves of the same shape."""

    def draw(seed: jax.Array, name_hash: jax.Array) -> jax.Array:
        if init == "ones":
            return jnp.ones(shape, dtype)
        key = jax.random.fold_in(jax.random.key(seed), name_hash)
        # Drawn flat: XLA takes seconds to compile the generator over several dimensions.
        flat = jax.random.uniform(key, (math.prod(shape),), jnp.float32, -DUMMY_LIMIT, DUMMY_LIMIT)
        return flat.astype(dtype).reshape(shape)

    return jax.jit(draw, out_shardings=sharding)
