"""What a smaller KV cache costs: logits, greedy tokens and bits per byte on held-out text, cache dtype by cache dtype.

    python examples/kv_cache_accuracy.py --model vjax-tiny --caches float32 bfloat16 float8_e4m3fn

The text is what the bundled model was not trained on: files of Python's standard library (examples/tiny_model). All
tokens of a window are computed in one step that reads every earlier key and value from the cache. The first cache is
what the others are compared with; scales of the checkpoint apply to float8_e4m3fn.
"""

from __future__ import annotations

import argparse
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from tiny_model.corpus import read_library, standard_library_root

import pallas_kernels
from vjax.layers.attention import AttentionMetadata
from vjax.models.functional import FunctionalModel, build_model
from vjax.models.registry import arch_config_from_hf, read_hf_config
from vjax.parallel.sharding import make_mesh
from vjax.text.load import load_tokenizer
from vjax.weights.hub import resolve_model_path
from vjax.weights.kv_scales import read_kv_scales
from vjax.weights.loader import load_weights

BLOCK_SIZE = 16
FP8 = "float8_e4m3fn"


def window_logits(model: FunctionalModel, cache_dtype: str, length: int):
    """A compiled function (leaves, token ids i32[length]) -> logits f32[length, vocab]."""
    arch = model.arch
    implementation = pallas_kernels.default_implementation(cache_dtype, arch.head_dim)
    head_dim = pallas_kernels.padded_head_dim(arch.head_dim, implementation)
    num_blocks = length // BLOCK_SIZE

    @jax.jit
    def logits(leaves: tuple[jax.Array, ...], ids: jax.Array) -> jax.Array:
        cache = jnp.zeros((num_blocks + 1, arch.num_kv_heads, BLOCK_SIZE, head_dim), cache_dtype)
        plan = pallas_kernels.plan_attention(
            jnp.arange(1, num_blocks + 1, dtype=jnp.int32)[None],
            jnp.zeros(1, jnp.int32),
            jnp.array([0, length], jnp.int32),
            jnp.array([length], jnp.int32),
            num_tokens=length,
            num_q_heads=arch.num_heads,
            num_kv_heads=arch.num_kv_heads,
            head_dim=head_dim,
            block_size=BLOCK_SIZE,
            dtype=cache_dtype,
            decode_only=False,
            sliding_windows=tuple(dict.fromkeys(arch.sliding_windows)),
            implementation=implementation,
        )
        positions = jnp.arange(length, dtype=jnp.int32)
        meta = AttentionMetadata(positions, positions + BLOCK_SIZE, plan)
        hidden, _ = model.forward(leaves, ids, ((cache, cache),) * arch.num_layers, meta)
        return model.logits(model.head_leaves(leaves), hidden)

    return logits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vjax-tiny")
    parser.add_argument("--dtype", default="float32" if jax.default_backend() == "cpu" else "bfloat16")
    parser.add_argument("--caches", nargs="+", default=["float32", "bfloat16", FP8])
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--window", type=int, default=1024, help="tokens, a multiple of 16")
    options = parser.parse_args()

    path, mesh = resolve_model_path(options.model), make_mesh()
    arch = arch_config_from_hf(read_hf_config(path))
    tokenizer = load_tokenizer(None, model_dir=path)
    text = "\n".join(file.text for file in read_library(standard_library_root()) if file.held_out)
    ids = tokenizer.encode(text)[: options.windows * options.window]
    windows = np.asarray(ids, np.int32)[: len(ids) // options.window * options.window].reshape(-1, options.window)
    num_bytes = sum(len(tokenizer.decode(window[1:].tolist()).encode()) for window in windows)

    functions = {}
    for cache in options.caches:
        scales = (read_kv_scales(path, arch) or {}) if cache == FP8 else {}
        model = build_model(arch, jnp.dtype(options.dtype), mesh=mesh, kv_scales=bool(scales))
        given = {f"vectors.{name}": value for name, value in scales.items()}
        leaves = load_weights(model, path, mesh=mesh, given=given)
        functions[cache] = functools.partial(window_logits(model, cache, options.window), leaves)

    sums = {cache: np.zeros(4) for cache in options.caches}
    for window in windows:
        logits = {cache: np.asarray(function(window), np.float64)[:-1] for cache, function in functions.items()}
        first = logits[options.caches[0]]
        for cache, values in logits.items():
            log_probs = values - np.log(np.sum(np.exp(values - values.max(-1, keepdims=True)), -1, keepdims=True))
            log_probs -= values.max(-1, keepdims=True)
            nll = -log_probs[np.arange(len(values)), window[1:]].sum()
            agree = (values.argmax(-1) == first.argmax(-1)).sum()
            sums[cache] += nll, agree, np.square(values - first).sum(), np.square(first - first.mean(-1)[:, None]).sum()

    tokens = windows.shape[0] * (options.window - 1)
    print(f"{options.model}, {options.dtype}, {tokens} tokens, {num_bytes} bytes, {jax.devices()[0].device_kind}")
    for cache, (nll, agree, error, spread) in sums.items():
        print(
            f"{cache:14s} {nll / math.log(2) / num_bytes:.4f} bits per byte | greedy agreement "
            f"{100 * agree / tokens:.2f} % | logit error {math.sqrt(error / spread):.2e} of their spread"
        )


if __name__ == "__main__":
    main()
