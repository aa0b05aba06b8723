"""Compiles the engine's step for the H200 without a GPU and prints what the compiler made of it, as JSON.

A process of its own, because XLA's dump must be asked for before JAX starts, and because the description of a device
that is not there must not reach another backend. `run` starts it. The shapes are those of real models, with few
layers; layers are alike, so what holds for two holds for thirty-two.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies

from pallas_kernels.hlo_checks import cache_copies
from vjax.models.functional import build_model
from vjax.models.registry import arch_config_from_hf
from vjax.parallel.sharding import make_mesh
from vjax.runner.buckets import Buckets, ForwardBucket
from vjax.runner.executables import Executables, Exported
from vjax.runner.exported import StepDescription
from vjax.runner.kernels import kernels_of
from vjax.runner.lowered import LoweredPrograms
from vjax.runner.programs import OpeningBucket, SampleBucket, lower, make_program
from vjax.runner.step import Step, StepGeometry
from vjax.sample.sampler import Variant

ROOT = Path(__file__).resolve().parents[2]
TARGET = ROOT / "tests" / "kernels" / "h200.txtpb"

_COMMON = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "head_dim": 128,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 8448,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA_3_8B = _COMMON | {
    "vocab_size": 128256,
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
    "rope_theta": 500000.0,
    "num_hidden_layers": 2,
}
LLAMA_2_7B = _COMMON | {
    "vocab_size": 32000,
    "num_key_value_heads": 32,
    "intermediate_size": 11008,
    "rope_theta": 10000.0,
    "num_hidden_layers": 1,
}
#: At block_size 16, and at 32 key/value heads fewer fit.
NUM_BLOCKS = {8: 50000, 32: 12500}

DECODE = ForwardBucket(256, 256, True)
SMALL_DECODE = ForwardBucket(1, 1, True)
OPENING = OpeningBucket(ForwardBucket(128, 64, False, opening=1))


def run(dump_folder: Path) -> dict[str, Any]:
    """The report of `main`, from another process that dumps into `dump_folder`."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
        # A program from a cache is not compiled, and so leaves no dump.
        "JAX_ENABLE_COMPILATION_CACHE": "false",
        # Buffers, instructions and thunks are those of optimised HLO; how well LLVM and ptxas do is not looked at.
        "XLA_FLAGS": f"--xla_dump_to={dump_folder} --xla_dump_hlo_module_re=jit_.* "
        "--xla_backend_optimization_level=0 --xla_gpu_disable_gpuasm_optimizations=true",
    }
    done = subprocess.run(
        [sys.executable, __file__, str(dump_folder)], env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


class KeepsAndCastsCache(Step):
    """Also returns a cache array as it was before the step, and one in another dtype."""

    def forward(self, bucket, leaves, kv, rows, packed):
        old = kv[0][0]
        kv, rows, done = super().forward(bucket, leaves, kv, rows, packed)
        return kv, rows, done, old, kv[0][1].astype(jnp.float32)


class HasTemporaryAndLoop(Step):
    """Makes an array of a cache's size by way of arithmetic, which is not a copy by name. Has a loop of one number
    whose length only the device knows, in the way that a search in a sorted array has."""

    def forward(self, bucket, leaves, kv, rows, packed):
        kv, rows, done = super().forward(bucket, leaves, kv, rows, packed)
        doubled = jax.lax.optimization_barrier(kv[0][0] * 2)
        done = jax.lax.while_loop(lambda n: n > 0, lambda n: n // 2, done)
        return kv, rows, done, doubled.sum(dtype=jnp.float32)


class DoesNotDonate(Executables):
    """Compiles without giving away its arguments."""

    def lower(self, key: Any, data: bytes | None = None) -> Any:
        return lower(dataclasses.replace(make_program(self.step, key, self.mesh), donated=()), self.mesh)


def executables(
    config: dict[str, Any],
    step_type: type[Step] = Step,
    executables_type: type[Executables] = Executables,
    kv_dtype: str = "bfloat16",
) -> Executables:
    """The executables of a model on one H200, none of them compiled yet."""
    topology = topologies.get_topology_desc(platform="cuda", target_config=TARGET.read_text(), topology="1x1x1")
    mesh = make_mesh(topology.devices)
    geometry = StepGeometry(
        num_blocks=NUM_BLOCKS[config["num_key_value_heads"]],
        block_size=16,
        max_num_seqs=1024,
        max_blocks_per_row=8448 // 16,
        kv_head_dim=128,
        kv_dtype=kv_dtype,
        implementation="mosaic_gpu",
    )
    model = build_model(arch_config_from_hf(config), jnp.bfloat16, mesh=mesh, kv_scales=kv_dtype != "bfloat16")
    buckets = Buckets.build(max_num_batched_tokens=16384, max_num_seqs=1024, platform="gpu")
    return executables_type(step_type(model, geometry), buckets, mesh, "gpu")


def inspect(of: Executables, key: Any, dump_folder: Path, exported: Exported | None = None) -> dict[str, Any]:
    """What there is to know of one compiled program: see the assertions in test_step_for_h200.py."""
    before = set(dump_folder.iterdir())
    started = time.perf_counter()
    compiled = of.compile(key, exported)
    seconds = time.perf_counter() - started
    memory, kv = compiled.memory_analysis(), of.step.kv_specs()
    program = make_program(of.step, key, of.mesh)
    return {
        "name": getattr(key, "name", key),
        "seconds": round(seconds, 1),
        "instructions": _instructions(compiled.as_text()),
        "thunks": _outer_thunks(set(dump_folder.iterdir()) - before),
        "cache_copies": cache_copies(compiled.as_text(), [kv[0][0].shape]),
        "additions_in_products": compiled.as_text().count('"beta":1'),
        "temporary_bytes": memory.temp_size_in_bytes,
        "aliased_bytes": memory.alias_size_in_bytes,
        "donated_bytes": _num_bytes([program.arguments[i] for i in program.donated]),
        "cache_array_bytes": _num_bytes(kv[0][0]),
    }


def _instructions(text: str) -> dict[str, int]:
    """How many instructions of each kind an optimised module has. Without parameters: an exported program takes those,
    too, that nothing reads."""
    kinds = re.findall(r"^\s*(?:ROOT )?%?[\w.-]+ = .*?[\])}] ([a-z][a-z0-9-]*)\(", text, re.MULTILINE)
    return {kind: number for kind, number in sorted(Counter(kinds).items()) if kind != "parameter"}


def _outer_thunks(dumped: set[Path]) -> list[str]:
    """Kinds of the thunks that the host launches, from the dump of one program. What a command buffer captured is
    indented below it; a program of a few kernels gets no command buffer, and then no plan after the pass that makes
    them."""
    plans = [path for path in dumped if ".thunk_sequence" in path.name]
    plan = max(plans, key=lambda path: path.name.endswith(".thunk_sequence_after_thunk_passes.txt"))
    return re.findall(r"^\d+: (k\w+)", plan.read_text(), re.MULTILINE)


def kernels_first(of: Executables, key: Any, dump_folder: Path) -> dict[str, int]:
    """How many kernels a program has, and how many are compiled before it and with it; Mosaic GPU dumps those that it
    compiles. For a program that this process has not compiled."""
    report = {"found": len(kernels_of(of.lower(key)))}
    steps = {
        "ahead": lambda: of._compile_kernels([key], None, lambda it, total, doing: it),
        "with_the_program": lambda: of.compile(key),
    }
    for name, step in steps.items():
        dump = dump_folder / f"kernels_{name}"
        dump.mkdir()
        os.environ["MOSAIC_GPU_DUMP_TO"] = str(dump)
        step()
        report[name] = len(list(dump.glob("*.ptx")))
    del os.environ["MOSAIC_GPU_DUMP_TO"]
    return report


def _num_bytes(specs: Any) -> int:
    return sum(spec.size * spec.dtype.itemsize for spec in jax.tree.leaves(specs))


def main() -> None:
    dump_folder = Path(sys.argv[1])
    llama3, llama2 = executables(LLAMA_3_8B), executables(LLAMA_2_7B)
    keys = [
        SMALL_DECODE,
        DECODE,
        ForwardBucket(8192, 64, False),
        OPENING,
        OPENING.forward,
        SampleBucket(8, Variant.GREEDY),
        SampleBucket(256, Variant.FULL),
        "write_rows",
        "write_masked_ids",
    ]
    elsewhere = executables(LLAMA_3_8B)
    description = StepDescription.of(elsewhere.step, elsewhere.mesh, "cuda")
    forward_and_sample = [DECODE, SampleBucket(256, Variant.FULL)]
    with LoweredPrograms(description, forward_and_sample, None) as lowered:
        assert all(lowered.get(key) is not None for key in forward_and_sample)
        lowered_elsewhere = [inspect(elsewhere, key, dump_folder, lowered.get) for key in forward_and_sample]
    one_layer = LLAMA_3_8B | {"num_hidden_layers": 1}
    fp8 = executables(LLAMA_3_8B | {"num_hidden_layers": 2}, kv_dtype="float8_e4m3fn")
    planted = {
        "keeps_and_casts_cache": executables(one_layer, KeepsAndCastsCache),
        "has_temporary_and_loop": executables(one_layer, HasTemporaryAndLoop),
        "does_not_donate": executables(one_layer, executables_type=DoesNotDonate),
    }
    report = {
        "llama_3_8b": [inspect(llama3, key, dump_folder) for key in keys],
        "lowered_elsewhere": lowered_elsewhere,
        "fp8": [inspect(fp8, key, dump_folder) for key in (DECODE, ForwardBucket(2048, 1024, False))],
        "llama_2_7b": [inspect(llama2, DECODE, dump_folder)],
        "kernels_first": kernels_first(executables(one_layer), ForwardBucket(1024, 1024, False), dump_folder),
        "planted": {name: inspect(of, SMALL_DECODE, dump_folder) for name, of in planted.items()},
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
