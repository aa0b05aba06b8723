"""Run by test_streaming.py: moves a checkpoint through a process that may not hold all of it.

Safetensors are loaded and converted to Orbax, and that is loaded again; leaves are dropped as soon as they are made, as
if they had gone to another device.
"""

from __future__ import annotations

import json
import os
import resource
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from vjax.models.functional import build_model
from vjax.models.registry import arch_config_from_hf, read_hf_config
from vjax.parallel.sharding import make_mesh
from vjax.weights import convert, loader
from vjax.weights.loader import stored_leaves
from vjax.weights.mapping import leaf_sources

MIB = 1 << 20
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 8192,
    "hidden_size": 2048,
    "num_hidden_layers": 4,
    "num_attention_heads": 16,
    "intermediate_size": 5632,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
}


def data_bytes() -> int:
    """What RLIMIT_DATA limits."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmData"].split()[0]) << 10


def write_checkpoint(folder: Path) -> tuple[int, int]:
    """424 MiB of bfloat16 in two files; returns their bytes and the sum of all parameters, as 16-bit integers."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    model = build_model(arch_config_from_hf(CONFIG), jnp.bfloat16)
    shapes = {name: spec.shape for name, spec in model.leaf_specs.items()}
    values = np.random.default_rng(0).integers(0, 2**14, 17 * MIB, dtype=np.uint16)
    tensors = {
        name: values[i : i + int(np.prod(shape))].reshape(shape)
        for leaf in leaf_sources(model.weight_rules, shapes, model.arch.num_layers).values()
        for group in leaf.groups
        for i, (name, shape) in enumerate(zip(group, leaf.shapes, strict=True))
    }
    for i in range(2):
        names = sorted(tensors)[i::2]
        save_file({name: tensors[name].view(jnp.bfloat16) for name in names}, folder / f"{i}.safetensors")
    return sum(x.nbytes for x in tensors.values()), sum(map(total, tensors.values()))


def total(x: np.ndarray) -> int:
    return int(x.view(np.uint16).sum(dtype=np.uint64))


def restored_total(path: Path) -> int:
    model = build_model(arch_config_from_hf(read_hf_config(path)), jnp.bfloat16)
    return sum(total(np.asarray(leaf)) for _, leaf in stored_leaves(model, path, mesh=make_mesh()))


if __name__ == "__main__":
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])  # so that as many threads run on every machine
    folder, allowed = Path(sys.argv[1]), int(sys.argv[2]) * MIB
    num_bytes, expected = write_checkpoint(folder / "source")
    jnp.zeros(1).block_until_ready()
    limit = data_bytes() + allowed
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    try:
        np.ones(num_bytes, np.uint8)
    except MemoryError:
        whole_fits = False
    else:
        whole_fits = True
    convert.PART_BYTES = loader.IN_FLIGHT_BYTES = 64 * MIB
    convert.convert_model(folder / "source", folder / "orbax", "orbax")
    equal = restored_total(folder / "orbax") == expected
    print(json.dumps({"num_bytes": num_bytes, "whole_fits": whole_fits, "equal": equal}))
