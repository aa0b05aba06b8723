"""The Mosaic kernels compiled to sm_90a machine code without a GPU, at the shapes of real models."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

from pallas_kernels import tuning
from pallas_kernels.ragged_paged_attention.shapes import MODELS
from tests.kernels.cases import needs_mosaic

TARGET = Path(__file__).with_name("h200.txtpb")


def plugin_missing() -> bool:
    try:
        for name in ("jax-cuda13-plugin", "jax-cuda13-pjrt"):
            version(name)
    except PackageNotFoundError:
        return True
    return False


pytestmark = [
    needs_mosaic,
    pytest.mark.skipif(plugin_missing(), reason="needs the wheels jax-cuda13-plugin and jax-cuda13-pjrt (no GPU)"),
]

ALL = {"sliding_window": 1024, "soft_cap": 30.0, "sinks": True}
# (model, block_size, num_tokens, num_seqs, max_decode_tokens, options); decodes only where they can be all tokens
ATTENTION = {
    "64": [
        ("llama3_1b", 16, 64, 64, 1, {}),
        ("llama3_1b", 16, 2048, 64, 1, ALL),
        ("llama3_1b", 32, 2, 2, 1, ALL),
        ("llama3_1b", 16, 320, 64, 5, ALL),
    ],
    "128": [
        ("llama3_8b", 16, 64, 64, 1, ALL),
        ("llama3_8b", 16, 2048, 64, 1, {}),
        ("llama3_8b", 16, 320, 64, 5, ALL),
        ("llama2_7b", 128, 64, 64, 1, {}),
    ],
    "128_other_groups": [
        ("llama3_8b", 64, 2048, 4, 1, ALL),
        ("llama3_70b_tp8", 16, 64, 64, 1, ALL),
        ("qwen2_7b", 32, 2048, 64, 1, {}),
        ("qwen2_7b_tp4", 16, 64, 64, 1, {}),
    ],
    "256": [
        ("gemma2_9b", 16, 64, 64, 1, ALL),
        ("gemma2_9b", 16, 1, 1, 1, {}),
        ("gemma2_9b", 16, 320, 64, 5, ALL),
        ("gemma2_9b", 64, 2048, 64, 1, {}),
    ],
}
NUM_BLOCKS = 20011

# Runs in a process of its own: ptxas writes its report to the stderr of the process, and the device description must
# not reach the other tests' backend.
PROGRAM = """
import sys
import jax
import jax.numpy as jnp
from jax.experimental import topologies
import pallas_kernels
from pallas_kernels.hlo_checks import cache_copies
topology = topologies.get_topology_desc(platform="cuda", target_config=open(sys.argv[1]).read(), topology="1x1x1")
mesh = topologies.make_mesh(topo=topology, mesh_shape=(1,), axis_names=("x",))
sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
def spec(shape, dtype=jnp.int32):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
def compile(function, *arguments, donate=()):
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        compiled = jax.jit(function, donate_argnums=donate).lower(*arguments).compile()
    text = compiled.as_text()
    print("WHILE", " while(" in text, "SORT", " sort(" in text, "TEMP", compiled.memory_analysis().temp_size_in_bytes)
    return text
def attention(
    heads, kv_heads, head_dim, block_size, num_tokens, num_seqs, max_decode_tokens, options, dtype=jnp.bfloat16
):
    options, decode_only = dict(options), num_tokens <= num_seqs * max_decode_tokens
    with_sinks = options.pop("sinks", False)
    cache = spec((NUM_BLOCKS, kv_heads, block_size, head_dim), dtype)
    scales = [spec((kv_heads,), jnp.float32)] * (2 if dtype != jnp.bfloat16 else 0)
    kernels = []
    def function(q, k_cache, v_cache, sinks, scales, *metadata):
        plan = pallas_kernels.plan_attention(
            *metadata, num_tokens=num_tokens, num_q_heads=heads, num_kv_heads=kv_heads, head_dim=head_dim,
            block_size=block_size, dtype=dtype, decode_only=decode_only, max_decode_tokens=max_decode_tokens,
            sliding_windows=(options.get("sliding_window"),), implementation="mosaic_gpu")
        kernels.append(2 if plan.work.prefill is None else 3)
        names = dict(zip(("k_scale", "v_scale"), scales))
        return pallas_kernels.ragged_paged_attention(
            q, k_cache, v_cache, plan, scale=0.1, sinks=sinks if with_sinks else None, **names, **options)
    q = spec((num_tokens, heads, head_dim), jnp.bfloat16)
    metadata = [spec((257, 8448 // block_size)), spec((num_seqs,)), spec((num_seqs + 1,)), spec((num_seqs,))]
    text = compile(function, q, cache, cache, spec((heads,), jnp.float32), scales, *metadata)
    assert text.count('custom_call_target="mosaic_gpu_v2"') == kernels[0], text
    shapes = [cache.shape]
    if heads // kv_heads % 4 != 3 and dtype == jnp.bfloat16:  # 7 heads need padding, q is converted for fp8
        shapes.append(q.shape)
    print("COPIES", len(cache_copies(text, shapes)) + text.count(" dynamic-update-slice("))
def kv_write(kv_heads, head_dim, block_size, num_tokens, dtype=jnp.bfloat16):
    cache = spec((NUM_BLOCKS, kv_heads, block_size, head_dim), dtype)
    new = spec((num_tokens, kv_heads, head_dim), jnp.bfloat16)
    function = lambda *arguments: pallas_kernels.write_kv(*arguments, implementation="mosaic_gpu")
    text = compile(function, cache, cache, new, new, spec((num_tokens,)), donate=(0, 1))
    print("COPIES", len(cache_copies(text, [cache.shape])))
def product(gated, config, rows, depth, columns):
    from pallas_kernels.matmul import mosaic_gpu
    run = mosaic_gpu.gated_matmul if gated else mosaic_gpu.matmul
    w = (depth, 2, columns) if gated else (depth, columns)
    function = lambda x, w: run(x, w, mosaic_gpu.Config(*config), interpret=False)
    text = compile(function, spec((rows, depth), jnp.bfloat16), spec(w, jnp.bfloat16))
    print("COPIES", text.count(" copy("))
def truncation(rows, vocab):
    options = [spec((rows,)), spec((rows,), jnp.float32), spec((rows,), jnp.float32)]
    function = lambda *arguments: pallas_kernels.truncate_logits(*arguments, implementation="mosaic_gpu")
    compile(function, spec((rows, vocab), jnp.float32), *options)
    print("COPIES 0")
"""


def report(call: str) -> str:
    """stdout and stderr of PROGRAM followed by `call`."""
    environment = {
        **os.environ,
        "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
        "JAX_PLATFORMS": "cpu",
        "MOSAIC_GPU_DUMP_PTXAS": "1",
        "XLA_FLAGS": "",  # those of the tests are the CPU's
        "PYTHONPATH": str(Path(__file__).resolve().parents[2]),
    }
    code = PROGRAM.replace("NUM_BLOCKS", str(NUM_BLOCKS)) + call
    done = subprocess.run(
        [sys.executable, "-c", code, str(TARGET)], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout + done.stderr


def check(text: str, calls: int) -> None:
    """No spills, no loop or sort around the kernel, no copy of a cache; every call compiled a kernel."""
    registers = re.findall(r"Used (\d+) registers", text)
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", text)
    assert len(registers) >= calls, text[-3000:]
    assert {count for pair in spills for count in pair} == {"0"}, spills
    assert re.findall(r"WHILE (\w+) SORT (\w+)", text) == [("False", "False")] * calls
    assert re.findall(r"COPIES (\d+)", text) == ["0"] * calls


@pytest.mark.parametrize("name", ATTENTION)
def test_attention(name: str):
    """What hopper.py chooses: decode and combining kernel, in a mixed step the prefill kernel, and no copies."""
    calls = [f"attention(*{(*MODELS[model], *rest)})" for model, *rest in ATTENTION[name]]
    check(report("\n".join(calls)), len(calls))


WINDOW_AND_CAP = {"sliding_window": 1024, "soft_cap": 30.0}
# The options are code of the tiles, which a head dim and a padded group change, and the number of sequences does not.
FP8_ATTENTION = {
    "plain": [
        ("llama3_8b", 16, 256, 256, 1, {}),
        ("llama3_8b", 16, 8, 8, 1, {}),
        ("llama3_8b", 16, 1, 1, 1, {}),
        ("llama3_8b", 16, 2048, 64, 1, {}),
        ("llama2_7b", 128, 64, 64, 1, {}),
        ("llama3_1b", 16, 64, 64, 1, {}),
        ("llama3_1b", 16, 2, 2, 1, {}),
    ],
    "window_and_cap": [
        ("llama3_8b", 16, 256, 256, 1, WINDOW_AND_CAP),
        ("llama3_8b", 16, 1, 1, 1, WINDOW_AND_CAP),
        ("qwen2_7b", 32, 2048, 8, 1, WINDOW_AND_CAP),
        ("llama3_1b", 16, 64, 64, 1, WINDOW_AND_CAP),
    ],
}


@pytest.mark.parametrize("name", FP8_ATTENTION)
def test_fp8_attention(name: str):
    calls = [f"attention(*{(*MODELS[model], *rest)}, jnp.float8_e4m3fn)" for model, *rest in FP8_ATTENTION[name]]
    check(report("\n".join(calls)), len(calls))


@pytest.mark.parametrize(
    ("call", "count"),
    [
        ("kv_write(8, 128, 16, 64)\nkv_write(32, 256, 64, 8192)\nkv_write(8, 128, 16, 64, jnp.float8_e4m3fn)", 3),
        ("truncation(8, 50257)", 1),
    ],
    ids=["kv_write", "truncation"],
)
def test_other_ops(call: str, count: int):
    check(report(call), count)


def tuned(kernel: str) -> list[dict]:
    return json.loads(tuning.path_of("NVIDIA H200").read_text())["kernels"][kernel]


@pytest.mark.parametrize("kernel", ["matmul", "gated_matmul"])
def test_tuned_products(kernel: str):
    """Each config once: rows change how often its loops run, and up to 64 the number of warpgroups."""
    cases = {}
    for entry in tuned(kernel):
        config = tuple(entry["config"][name] for name in ("columns", "stages", "cluster"))
        if config[0]:
            rows = entry["sizes"]["rows"]
            cases[config, rows <= 64] = (rows, entry["exact"]["depth"], entry["exact"]["columns"])
    calls = [f"product({kernel == 'gated_matmul'}, {config}, *{shape})" for (config, _), shape in cases.items()]
    assert calls
    check(report("\n".join(calls)), len(calls))


def test_tuned_decode():
    """What is tuned is what `plan_attention` takes for this device."""
    names = {(heads, kv_heads, dim): name for name, (heads, kv_heads, dim) in reversed(MODELS.items())}
    calls = []
    for entry in tuned("decode_attention"):
        exact, seqs = entry["exact"], entry["sizes"]["seqs"]
        model = names[exact["group"] * exact["num_kv_heads"], exact["num_kv_heads"], exact["head_dim"]]
        dtype = "float8_e4m3fn" if exact["fp8"] else "bfloat16"
        rest = (exact["block_size"], seqs * exact["max_q_len"], seqs, exact["max_q_len"], {})
        calls.append(f"attention(*{(*MODELS[model], *rest)}, jnp.{dtype})")
    check(report("\n".join(calls)), len(calls))


def test_report_parser_sees_spills():
    good = "Used 90 registers\n0 bytes spill stores, 0 bytes spill loads\nWHILE False SORT False\nCOPIES 0"
    check(good, 1)
    bad: list[Callable[[str], str]] = [
        lambda text: text.replace("0 bytes spill stores", "8 bytes spill stores"),
        lambda text: text.replace("COPIES 0", "COPIES 1"),
        lambda text: text.replace("WHILE False", "WHILE True"),
    ]
    for change in bad:
        with pytest.raises(AssertionError):
            check(change(good), 1)
