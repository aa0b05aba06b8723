"""Writes a model folder with the weights in another format: Orbax with the engine's leaves, or safetensors."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from vjax.errors import ConfigError
from vjax.models.functional import FunctionalModel, build_model
from vjax.models.hf_config import read_hf_config
from vjax.models.registry import arch_config_from_hf
from vjax.parallel.sharding import make_mesh
from vjax.weights.checkpoint import INDEX_FILE, SINGLE_FILE, Checkpoint
from vjax.weights.hub import ORBAX_FOLDER
from vjax.weights.kv_scales import kv_scale_tensors, read_kv_scales
from vjax.weights.loader import stored_leaves
from vjax.weights.manifest import Manifest, StoredLeaf, files_of, stored_format
from vjax.weights.mapping import LeafSources, as_stored, check_tensors, leaf_sources
from vjax.weights.orbax_parts import PART_BYTES, save_part
from vjax.weights.packing import PACKERS

FORMATS = ("orbax", "safetensors")

#: Bytes of a safetensors file, if it holds more than one leaf's tensors.
SHARD_BYTES = 2 << 30

#: Files of a model folder that are weights or name them: all others are copied.
_WEIGHTS = (".safetensors", ".bin", ".pth", ".pt", ".gguf", ".h5", ".msgpack", ".onnx", ".index.json")
#: Folders of a model folder that belong to the tokenizer and to sentence-transformers.
_FOLDERS = ("additional_chat_templates", "1_Pooling", "2_Normalize")

_DTYPES = {"BF16": "bfloat16", "F16": "float16"}

Leaves = Iterator[tuple[str, jax.Array]]


@dataclass(frozen=True)
class Converted:
    """What was written: `dtypes` are those of the parameters, `num_bytes` theirs alone."""

    architecture: str
    num_parameters: int
    num_bytes: int
    dtypes: tuple[str, ...]


def convert_model(
    source: Path, output: Path, to: str, *, overwrite: bool = False, progress: Callable[[int, int], None] | None = None
) -> Converted:
    """Writes `output`, a folder that loads like `source` and gives the same parameters, bit for bit.

    A leaf has the dtype of its tensors; float32 if that is float64, or they differ. The host holds one part or one file
    of the output at a time. `output` appears when it is complete.

    Args:
        source: Model folder with safetensors, or with an Orbax checkpoint of vjax.
        output: Folder to make.
        to: One of FORMATS.
        overwrite: Replace a model folder that is there.
        progress: Called with the bytes done and the bytes in all after each leaf.

    Raises:
        ConfigError: `output` is in use.
        ModelLoadError: `source` cannot be read, or is not supported.
        OSError: `output` cannot be written.
    """
    assert to in FORMATS, to
    _check_output(source, output, overwrite)
    arch = arch_config_from_hf(read_hf_config(source))
    model = build_model(arch, jnp.float32)
    dtypes = _leaf_dtypes(model, source)
    sizes = {name: spec.size * jnp.dtype(dtypes[name]).itemsize for name, spec in model.leaf_specs.items()}
    scales = read_kv_scales(source, arch) or {}
    with _replacing(output) as folder:
        _copy_other_files(source, folder)
        mesh = make_mesh(jax.devices("cpu")[:1])
        leaves = stored_leaves(model, source, mesh=mesh, dtypes=dtypes)
        if progress is not None:
            leaves = _reported(leaves, sizes, progress)
        if to == "orbax":
            _write_orbax(folder, model, leaves, scales)
        else:
            _write_safetensors(folder, model, leaves, scales)
    num_parameters = sum(spec.size for spec in model.leaf_specs.values())
    return Converted(arch.architecture, num_parameters, sum(sizes.values()), tuple(sorted(set(dtypes.values()))))


def _leaf_dtypes(model: FunctionalModel, source: Path) -> dict[str, str]:
    """name -> the narrowest dtype that holds the leaf exactly (float64 apart)."""
    shapes = {name: spec.shape for name, spec in model.leaf_specs.items()}
    if stored_format(source) == "orbax":
        manifest = Manifest.read(source)
        manifest.check(model.arch.architecture, shapes, str(source))
        return {name: manifest.leaves[name].dtype for name in shapes}
    sources = leaf_sources(model.weight_rules, shapes, model.arch.num_layers)
    with Checkpoint(source) as checkpoint:
        sources = as_stored(sources, checkpoint.tensors)
        check_tensors(sources, checkpoint.tensors, where=str(source))
        found = {name: {checkpoint.tensors[tensor].dtype for tensor in _tensors(sources[name])} for name in sources}
    return {
        name: _DTYPES.get(kinds.pop(), "float32") if len(kinds) == 1 else "float32" for name, kinds in found.items()
    }


def _tensors(sources: LeafSources) -> list[str]:
    return [name for group in sources.groups for name in group]


def _reported(leaves: Leaves, sizes: Mapping[str, int], progress: Callable[[int, int], None]) -> Leaves:
    done, total = 0, sum(sizes.values())
    for name, leaf in leaves:
        yield name, leaf
        done += sizes[name]
        progress(done, total)


def _batches(leaves: Leaves, limit: int) -> Iterator[dict[str, jax.Array]]:
    """Consecutive leaves together, as many as fit in `limit` bytes, at least one."""
    batch: dict[str, jax.Array] = {}
    num_bytes = 0
    for name, leaf in leaves:
        if batch and num_bytes + leaf.nbytes > limit:
            yield batch
            batch, num_bytes = {}, 0
        batch[name] = leaf
        num_bytes += leaf.nbytes
    if batch:
        yield batch


def _write_orbax(folder: Path, model: FunctionalModel, leaves: Leaves, scales: Mapping[str, np.ndarray]) -> None:
    parts = folder / ORBAX_FOLDER
    parts.mkdir()
    stored: dict[str, StoredLeaf] = {}
    for number, batch in enumerate(_batches(leaves, PART_BYTES)):
        part = f"part-{number:05d}"
        save_part(parts / part, batch, model.logical_axes)
        stored |= {name: StoredLeaf(leaf.shape, leaf.dtype.name, part) for name, leaf in batch.items()}
    kv_scales = {name: scale.tolist() for name, scale in scales.items()}
    Manifest(model.arch.architecture, stored, files_of(parts), kv_scales).write(folder)


def _write_safetensors(folder: Path, model: FunctionalModel, leaves: Leaves, scales: Mapping[str, np.ndarray]) -> None:
    shapes = {name: spec.shape for name, spec in model.leaf_specs.items()}
    sources = leaf_sources(model.weight_rules, shapes, model.arch.num_layers)
    shards: list[list[str]] = []
    total_size = 0
    extra = kv_scale_tensors(scales)
    for batch in _batches(leaves, SHARD_BYTES):
        tensors = {name: x for leaf in batch for name, x in _unpacked(sources[leaf], np.asarray(batch[leaf])).items()}
        tensors, extra = tensors | extra, {}
        save_file(tensors, folder / str(len(shards)), metadata={"format": "pt"})
        shutil.copymode(folder / "config.json", folder / str(len(shards)))  # save_file's is for the owner alone
        shards.append(list(tensors))
        total_size += sum(tensor.nbytes for tensor in tensors.values())
    if len(shards) == 1:
        (folder / "0").rename(folder / SINGLE_FILE)
        return
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards):
        file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        (folder / str(number)).rename(folder / file)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
    (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _unpacked(sources: LeafSources, leaf: np.ndarray) -> dict[str, np.ndarray]:
    """Tensors of the checkpoint, by name, that are packed into the leaf."""
    unpack = PACKERS[sources.packing].unpack
    return {
        name: np.ascontiguousarray(tensor)
        for group, packed in zip(sources.groups, leaf if sources.stacked else [leaf], strict=True)
        for name, tensor in zip(group, unpack(packed), strict=True)
    }


def _copy_other_files(source: Path, folder: Path) -> None:
    """Config, tokenizer, templates, licence: contents only, because a hub's cache holds read-only links."""
    for path in sorted(source.iterdir()):
        if path.is_file() and not path.name.startswith(".") and not path.name.endswith(_WEIGHTS):
            shutil.copyfile(path, folder / path.name)
    for name in _FOLDERS:
        if (source / name).is_dir():
            shutil.copytree(source / name, folder / name, copy_function=shutil.copyfile)


def _check_output(source: Path, output: Path, overwrite: bool) -> None:
    """Raises: ConfigError if `output` cannot be made, or must not be replaced."""

    def refuse(reason: str) -> ConfigError:
        return ConfigError(f"OUTPUT {str(output)!r} {reason}", parameter="output", value=str(output))

    if output.exists() and not output.is_dir():
        raise refuse("is a file; name a folder that does not exist yet.")
    if source.resolve().is_relative_to(output.resolve()):
        raise refuse("is, or contains, the model to be converted; name another folder.")
    if not output.is_dir() or not any(output.iterdir()):
        return
    if not overwrite:
        raise refuse("is not empty; name another folder, or pass --overwrite to replace it.")
    if not (output / "config.json").is_file():
        raise refuse(
            "holds no config.json, so --overwrite does not take it for a model to be replaced; delete it first."
        )


@contextmanager
def _replacing(output: Path) -> Iterator[Path]:
    """A new folder beside `output` that takes its place when the block succeeds, and else is deleted."""
    output = output.absolute()
    output.parent.mkdir(parents=True, exist_ok=True)
    folder, old = (output.with_name(f".{output.name}.{os.getpid()}.{what}") for what in ("partial", "old"))
    folder.mkdir()
    try:
        yield folder
        if output.exists():
            output.rename(old)
        folder.rename(output)
    except BaseException:
        if old.exists() and not output.exists():
            old.rename(output)
        shutil.rmtree(folder, ignore_errors=True)
        raise
    shutil.rmtree(old, ignore_errors=True)
