"""Seconds and host memory that loading takes, from safetensors and from Orbax; run by hand on a GPU.

    python -m tests.gpu.measure_loading FOLDER [LAYERS]

Makes a checkpoint of Llama-3-8B's shapes in FOLDER, random bfloat16 (16 GB, and as much again as Orbax), unless it is
there. Files are in the page cache when they are read, so that it is the loader that is timed, not the disk.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from pathlib import Path

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 128256,
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
    "max_position_embeddings": 8192,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
TIMES = 3


def make_checkpoint(folder: Path, num_layers: int) -> None:
    """A file per layer, as safetensors."""
    import ml_dtypes
    import numpy as np
    from safetensors.numpy import save_file

    from vjax.models.functional import build_model
    from vjax.models.registry import arch_config_from_hf
    from vjax.weights.mapping import leaf_sources

    config = {**CONFIG, "num_hidden_layers": num_layers}
    model = build_model(arch_config_from_hf(config), ml_dtypes.bfloat16)
    shapes = {name: spec.shape for name, spec in model.leaf_specs.items()}
    sources = leaf_sources(model.weight_rules, shapes, num_layers).values()
    files: dict[str, dict[str, tuple[int, ...]]] = {}
    for leaf in sources:
        for group in leaf.groups:
            for name, shape in zip(group, leaf.shapes, strict=True):
                layer = name.split(".")[2] if name.startswith("model.layers.") else "rest"
                files.setdefault(layer, {})[name] = shape
    block = np.random.default_rng(0).integers(0, 2**14, 1 << 24, np.uint16)
    folder.mkdir(parents=True)
    for layer, tensors in files.items():
        values = {name: np.resize(block, shape).view(ml_dtypes.bfloat16) for name, shape in tensors.items()}
        save_file(values, folder / f"layer-{layer}.safetensors")
    (folder / "config.json").write_text(json.dumps(config))


def anonymous_bytes() -> int:
    """Memory of this process that is no file's."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) << 10 for line in status if line.startswith("RssAnon"))


def measure(folder: Path) -> None:
    """Prints seconds, GB/s and the most host memory above that at the start."""
    import jax
    import jax.numpy as jnp

    from vjax.models.functional import build_model
    from vjax.models.registry import arch_config_from_hf, read_hf_config
    from vjax.parallel.sharding import make_mesh
    from vjax.weights.loader import load_weights

    model = build_model(arch_config_from_hf(read_hf_config(folder)), jnp.bfloat16)
    mesh = make_mesh()
    jax.block_until_ready(jnp.zeros(1) + 1)
    start, most, done = anonymous_bytes(), 0, threading.Event()

    def watch() -> None:
        nonlocal most
        while not done.wait(0.005):
            most = max(most, anonymous_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    for _ in range(TIMES):
        began = time.perf_counter()
        leaves = load_weights(model, folder, mesh=mesh)
        seconds = time.perf_counter() - began
        num_bytes = sum(leaf.nbytes for leaf in leaves)
        largest = max(leaf.nbytes for leaf in leaves)
        print(
            f"{folder.name}: {seconds:.2f} s, {num_bytes / seconds / 1e9:.2f} GB/s, host memory at most "
            f"{(most - start) / 2**20:.0f} MiB above the start (largest leaf {largest / 2**20:.0f} MiB)",
            flush=True,
        )
        for leaf in leaves:
            leaf.delete()
    done.set()
    watcher.join()


if __name__ == "__main__":
    if sys.argv[1] == "--measure":
        measure(Path(sys.argv[2]))
        raise SystemExit
    root, layers = Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 32
    if not (root / "safetensors").exists():
        make_checkpoint(root / "safetensors", layers)
    if not (root / "orbax").exists():
        command = ["convert", str(root / "safetensors"), str(root / "orbax"), "--to", "orbax"]
        subprocess.run([sys.executable, "-m", "vjax", *command], check=True)
    for name in ("safetensors", "orbax"):
        subprocess.run([sys.executable, "-m", "tests.gpu.measure_loading", "--measure", str(root / name)], check=True)
