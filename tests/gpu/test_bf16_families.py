"""Tiny random models of every family and head dim in bfloat16: the Mosaic kernels against plain XLA, step by step.

Both run the engine's own step on the same weights and tokens: ragged prompts in two mixed steps, then decode steps with
given tokens. A float32 run of the same weights says how far off bfloat16 is anyway.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import padded_head_dim
from pallas_kernels.implementation import MOSAIC_GPU, MOSAIC_GPU_INTERPRET, XLA, mosaic_unavailable_reason
from tests.gpu.engines import on_gpu
from vjax.messages import RowInit, SchedulerOutput
from vjax.models.functional import FunctionalModel, build_model
from vjax.models.registry import arch_config_from_hf
from vjax.parallel.sharding import make_mesh, named_sharding
from vjax.runner.buckets import Buckets, ForwardBucket
from vjax.runner.executables import Executables
from vjax.runner.runner import ModelRunner
from vjax.runner.step import Step, StepGeometry
from vjax.sampling_params import SamplingParams

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(mosaic_unavailable_reason() is not None, reason=str(mosaic_unavailable_reason())),
]

VOCAB_SIZE = 160
_BASE: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def _config(architecture: str, **fields: Any) -> dict[str, Any]:
    name = f"{architecture}ForCausalLM"
    return {**_BASE, "architectures": [name], "model_type": architecture.lower(), **fields}


CONFIGS = {
    "llama-head64": _config("Llama"),
    "llama-head64-mqa": _config("Llama", num_attention_heads=8, num_key_value_heads=1),
    "llama-head80": _config("Llama", head_dim=80),
    "llama-head96": _config("Llama", head_dim=96, num_key_value_heads=4),
    "llama-head128": _config("Llama", head_dim=128, num_attention_heads=8),
    "llama-head256": _config("Llama", head_dim=256, num_attention_heads=2, num_key_value_heads=1),
    "mistral-window": _config("Mistral", sliding_window=24, head_dim=128),
    "qwen2": _config("Qwen2", rope_theta=1000000.0, num_attention_heads=7, num_key_value_heads=1),
    "qwen3": _config("Qwen3", head_dim=128, tie_word_embeddings=True),
    # A layer for whose products the kernels of `pallas_kernels.matmul` are tuned.
    "llama3-8b-layer": _config(
        "Llama",
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=1,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
    ),
}
#: Prompts of one token, about a block, about two, and one that is computed in two steps.
LENGTHS = (1, 15, 33, 90)
FIRST_CHUNK_OF_LAST = 60
NUM_DECODE_STEPS = 6
BLOCK_SIZE, BLOCKS_PER_ROW = 16, 8
MIXED, DECODE = ForwardBucket(128, 4, False), ForwardBucket(4, 4, True)


def steps() -> Iterator[SchedulerOutput]:
    """The same work for every implementation. Rows 1..4 hold the prompts, whose blocks lie in random order."""
    rng = np.random.default_rng(1)
    tokens = [rng.integers(3, VOCAB_SIZE, n + NUM_DECODE_STEPS + 1).tolist() for n in LENGTHS]
    blocks = (rng.permutation(len(LENGTHS) * BLOCKS_PER_ROW) + 1).tolist()
    rows, done = [1, 2, 3, 4], [0] * len(LENGTHS)

    def step(step_id: int, counts: list[int], num_decodes: int) -> SchedulerOutput:
        ids = [t for row, n in enumerate(counts) for t in tokens[row][done[row] : done[row] + n]]
        for row, n in enumerate(counts):
            done[row] += n
        return SchedulerOutput(step_id, rows, counts, ids, num_decodes)

    first = step(0, [*LENGTHS[:-1], FIRST_CHUNK_OF_LAST], 0)
    params = SamplingParams(temperature=0.0)
    first.new_rows = [RowInit(row, 0, params, n) for row, n in zip(rows, LENGTHS, strict=True)]
    first.block_rows = np.repeat(rows, BLOCKS_PER_ROW).tolist()
    first.block_columns = list(range(BLOCKS_PER_ROW)) * len(rows)
    first.block_ids = blocks
    yield first
    yield step(1, [1, 1, 1, LENGTHS[-1] - FIRST_CHUNK_OF_LAST], 3)
    for i in range(NUM_DECODE_STEPS):
        yield step(2 + i, [1] * len(rows), len(rows))


def random_leaves(model: FunctionalModel) -> tuple[jax.Array, ...]:
    """Weights that bfloat16 holds exactly, large enough for uneven attention and logits that are far apart."""
    leaves = []
    scale = 1.2 / model.arch.hidden_size**0.5
    for name in model.leaf_names:
        rng, shape = np.random.default_rng(zlib.crc32(name.encode())), model.leaf_specs[name].shape
        is_norm = model.initialisers[name] == "ones"
        values = rng.uniform(0.5, 1.5, shape) if is_norm else rng.normal(0.0, scale, shape)
        leaf = values.astype(jnp.bfloat16).astype(model.dtype)
        leaves.append(jax.device_put(leaf, named_sharding(model.mesh, model.logical_axes[name])))
    return tuple(leaves)


def step_logits(config: dict[str, Any], dtype: Any, implementation: str) -> np.ndarray:
    """float32 [steps, sequences, vocab]: logits of the last token of every sequence after every step."""
    arch, mesh = arch_config_from_hf(config), make_mesh()
    model = build_model(arch, jnp.dtype(dtype), mesh=mesh)
    geometry = StepGeometry(
        num_blocks=len(LENGTHS) * BLOCKS_PER_ROW + 1,
        block_size=BLOCK_SIZE,
        max_num_seqs=len(LENGTHS),
        max_blocks_per_row=BLOCKS_PER_ROW,
        kv_head_dim=padded_head_dim(arch.head_dim, implementation),
        kv_dtype=jnp.dtype(dtype).name,
        implementation=implementation,
    )
    buckets = Buckets(decode=(DECODE,), mixed=(MIXED,), sample=(len(LENGTHS),))
    executables = Executables(Step(model, geometry), buckets, mesh, "gpu" if on_gpu() else "cpu")
    executables.compile_all([*buckets.mixed, *buckets.decode])
    runner = ModelRunner(random_leaves(model), executables)
    head = jax.jit(model.logits)
    logits = []
    for scheduled in steps():
        runner.execute(scheduled).result()
        logits.append(np.asarray(head(runner._head, runner._rows.hidden), np.float32))
    runner.shutdown()
    return np.stack(logits)


def relative_error(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize("name", CONFIGS)
def test_mosaic_kernels_agree_with_xla(name, say):
    config = CONFIGS[name]
    exact = step_logits(config, jnp.float32, XLA)
    plain = step_logits(config, jnp.bfloat16, XLA)
    mosaic = step_logits(config, jnp.bfloat16, MOSAIC_GPU if on_gpu() else MOSAIC_GPU_INTERPRET)
    between, of_plain, of_mosaic = (
        relative_error(mosaic, plain),
        relative_error(plain, exact),
        relative_error(mosaic, exact),
    )
    say(f"\n{name}: mosaic to xla {between:.4f}; to float32: xla {of_plain:.4f}, mosaic {of_mosaic:.4f}")
    assert np.isfinite(mosaic).all()
    assert between <= 2e-2
    assert of_mosaic <= 1.5 * of_plain
