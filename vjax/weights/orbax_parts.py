"""Saves and restores leaves with Orbax, a part of the checkpoint at a time.

A part is an Orbax checkpoint of its own, so that no more than one part is on the host; restoring, the next one too if
it is at most PART_BYTES. Files are mapped when they are restored, so that they take no memory themselves.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax

from vjax.errors import ModelLoadError
from vjax.parallel.sharding import AXIS_RULES
from vjax.weights.hub import ORBAX_FOLDER
from vjax.weights.manifest import Manifest

if TYPE_CHECKING:
    import orbax.checkpoint as ocp

#: Bytes of the leaves of a part, if they are more than one.
PART_BYTES = 256 << 20

#: Bytes of a chunk: small enough that several threads read a leaf, and that a device reads little but its own share.
CHUNK_BYTES = 16 << 20


def save_part(folder: Path, leaves: Mapping[str, jax.Array], logical_axes: Mapping[str, Sequence[str | None]]) -> None:
    """Writes one part.

    Args:
        folder: Must not exist.
        leaves: By name.
        logical_axes: name -> logical axes of its dimensions; chunks follow those that are split.

    Raises:
        OSError: It cannot be written.
    """
    import orbax.checkpoint as ocp

    save_args = {name: _save_args(leaf, logical_axes[name]) for name, leaf in leaves.items()}
    try:
        with _checkpointer() as checkpointer:
            checkpointer.save(folder.absolute(), args=ocp.args.PyTreeSave(dict(leaves), save_args))
    except Exception as error:  # TensorStore has a type for every reason
        raise OSError(f"{folder} cannot be written: {error}") from error


def restore_leaves(
    model_dir: Path, targets: Mapping[str, jax.ShapeDtypeStruct], architecture: str
) -> Iterator[tuple[str, jax.Array]]:
    """(name, leaf) in the order of the checkpoint; every device reads its own share from disk.

    Args:
        model_dir: Folder that `vjax convert --to orbax` wrote.
        targets: name -> shape, dtype and placement of every leaf.
        architecture: As config.json names it.

    Raises:
        ModelLoadError: The checkpoint is not of these leaves, is of another layout, or cannot be read.
    """
    import orbax.checkpoint as ocp

    manifest = Manifest.read(model_dir)
    manifest.check(architecture, {name: target.shape for name, target in targets.items()}, str(model_dir))
    manifest.check_files(model_dir)
    with _checkpointer(type_handler_registry=_mapped_arrays()) as checkpointer, ThreadPoolExecutor(1) as ahead:

        def restore(part: str, names: Sequence[str]) -> dict[str, jax.Array]:
            folder = (model_dir / ORBAX_FOLDER / part).absolute()
            wanted = {name: targets[name] for name in names}
            restore_args = {
                name: ocp.ArrayRestoreArgs(
                    restore_type=jax.Array, dtype=target.dtype, sharding=target.sharding, global_shape=target.shape
                )
                for name, target in wanted.items()
            }
            try:
                return checkpointer.restore(folder, args=ocp.args.PyTreeRestore(item=wanted, restore_args=restore_args))
            except Exception as error:  # TensorStore has a type for every reason
                raise ModelLoadError(
                    f"{folder} cannot be restored: {' '.join(str(error).split())} It may be damaged; copy or download "
                    "the folder again, or repeat `vjax convert`."
                ) from error

        def fits_beside_another(names: Sequence[str]) -> bool:
            return sum(math.prod(targets[name].shape) * targets[name].dtype.itemsize for name in names) <= PART_BYTES

        parts = list(manifest.parts().items())
        coming: Future[dict[str, jax.Array]] | None = None
        for (part, names), following in zip_longest(parts, parts[1:]):
            restored = coming.result() if coming is not None else restore(part, names)
            # Read while this part is handed over.
            coming = None
            if following is not None and fits_beside_another(following[1]):
                coming = ahead.submit(restore, following[0], following[1])
            for name in names:
                yield name, jax.block_until_ready(restored.pop(name))


def _checkpointer(**options: Any) -> ocp.Checkpointer:
    import orbax.checkpoint as ocp

    # Trained weights hardly compress, and decompressing them would take longer than reading them.
    return ocp.Checkpointer(
        ocp.PyTreeCheckpointHandler(use_ocdbt=True, use_zarr3=False, use_compression=False, **options)
    )


def _mapped_arrays() -> ocp.type_handlers.TypeHandlerRegistry:
    """Restores arrays with host memory of little more than their own bytes.

    As Orbax sets it, TensorStore reads up to 128 chunks at a time, which may be all of a leaf, into buffers that malloc
    keeps afterwards: twice the leaf and more. From a mapped file it copies a chunk straight into the leaf; as it asks
    for the pages ahead of that, this is no slower, in the page cache or not.
    """
    import orbax.checkpoint as ocp
    import tensorstore as ts

    class MappedArrayHandler(ocp.type_handlers.ArrayHandler):
        async def deserialize(self, infos, args=None):
            # JAX keeps the host memory of a finished transfer until its next one, which here comes after the next leaf
            # has been read, or until Python collects garbage, of any generation.
            gc.collect(0)
            context = ts.Context({"file_io_mode": {"mode": "memmap"}}, infos[0].ts_context)
            return await super().deserialize([info.replace(ts_context=context) for info in infos], args)

    return ocp.type_handlers.create_type_handler_registry((jax.Array, MappedArrayHandler()))


def _save_args(leaf: jax.Array, logical_axes: Sequence[str | None]) -> Any:
    """Chunks that no placement splits: Orbax cuts along the longest axis, unless the split one is named to it, and then
    down to single rows, which only the few heads are good for."""
    import orbax.checkpoint as ocp

    split = [axis for axis, name in enumerate(logical_axes) if name is not None and AXIS_RULES[name] is not None]
    few = tuple(axis for axis in split if leaf.shape[axis] <= 64 and leaf.nbytes > CHUNK_BYTES)
    return ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES, shard_axes=few)
