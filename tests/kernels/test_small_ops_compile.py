"""The small ops compiled for the H200 without a GPU: configs that are tuned over."""

from __future__ import annotations

import dataclasses
import itertools
import re

import pytest

from pallas_kernels.bench.truncation import CANDIDATES
from tests.kernels.cases import needs_mosaic
from tests.kernels.test_hopper_compile import check, plugin_missing, report

pytestmark = [
    needs_mosaic,
    pytest.mark.skipif(plugin_missing(), reason="needs the wheels jax-cuda13-plugin and jax-cuda13-pjrt (no GPU)"),
]

FUNCTIONS = """
def write(kv_heads, head_dim, num_tokens, tokens_per_cta):
    from pallas_kernels.kv_write.mosaic_registers import Config, write_kv
    cache = spec((NUM_BLOCKS, kv_heads, 16, head_dim), jnp.bfloat16)
    new = spec((num_tokens, kv_heads, head_dim), jnp.bfloat16)
    function = lambda *arguments: write_kv(*arguments, interpret=False, config=Config(tokens_per_cta))
    text = compile(function, cache, cache, new, new, spec((num_tokens,)), donate=(0, 1))
    print("COPIES", len(cache_copies(text, [cache.shape])))
def rope(heads, kv_heads, head_dim, num_tokens, packed, normed):
    from pallas_kernels.kv_write.rope import rope_write_kv
    cache = spec((NUM_BLOCKS, kv_heads, 16, head_dim), jnp.bfloat16)
    qkv = spec((num_tokens, kv_heads, heads // kv_heads + 2, head_dim), jnp.bfloat16)
    if not packed:
        qkv = tuple(spec((num_tokens, n, head_dim), jnp.bfloat16) for n in (heads, kv_heads, kv_heads))
    norm = spec((head_dim,), jnp.bfloat16) if normed else None
    angles = spec((num_tokens, head_dim // 2), jnp.float32)
    def function(qkv, cos, sin, k_cache, v_cache, slots, q_norm, k_norm):
        return rope_write_kv(qkv, cos, sin, k_cache, v_cache, slots, q_norm=q_norm, k_norm=k_norm,
                             implementation="mosaic_gpu")
    text = compile(function, qkv, angles, angles, cache, cache, spec((num_tokens,)), norm, norm, donate=(3, 4))
    print("COPIES", len(cache_copies(text, [cache.shape])))
def norm(num_tokens, size, dtype, config):
    from pallas_kernels.add_rms_norm.mosaic_gpu import Config, add_rms_norm
    x, stacked = spec((num_tokens, size), dtype), spec((3, size), dtype)
    def function(x, delta, stacked):
        return add_rms_norm(x, delta, stacked, jnp.int32(1), eps=1e-5, interpret=False, config=Config(*config))
    text = compile(function, x, x, stacked)
    # The kernel finds a layer's weights itself: nothing is copied or sliced.
    print("COPIES", text.count(" copy(") + text.count(" fusion("))
def truncate(rows, vocab, config):
    from pallas_kernels.sampling_truncation.mosaic_gpu import Config, truncate_logits
    options = [spec((rows,)), spec((rows,), jnp.float32), spec((rows,), jnp.float32)]
    function = lambda *arguments: truncate_logits(*arguments, interpret=False, config=Config(*config))
    compile(function, spec((rows, vocab), jnp.float32), *options)
    print("COPIES 0")
"""

WRITE = [(8, 128, 64, 1), (8, 128, 8192, 4), (8, 128, 8192, 2), (32, 128, 64, 1), (32, 128, 8192, 4), (8, 256, 64, 1)]
WRITE += [(8, 256, 8192, 4), (4, 128, 64, 1), (1, 128, 64, 1), (8, 64, 64, 1)]
ROPE = [
    (32, 8, 128, 64, True, False),
    (32, 8, 128, 64, True, True),
    (32, 8, 128, 64, False, True),
    (28, 4, 128, 64, True, False),
    (8, 1, 128, 64, True, True),
    (32, 32, 128, 64, True, False),
    (32, 8, 64, 64, True, False),
    (16, 8, 256, 64, True, False),
    (16, 8, 256, 64, False, True),
]


def calls(name: str, shapes: list[tuple]) -> tuple[str, int]:
    source = FUNCTIONS.replace("NUM_BLOCKS", "20011")
    return source + "\n".join(f"{name}(*{shape})" for shape in shapes), len(shapes)


def test_kv_write():
    call, count = calls("write", WRITE)
    check(report(call), count)


def test_rope_write():
    call, count = calls("rope", ROPE)
    check(report(call), count)


def test_add_rms_norm():
    """Configs with the most registers a thread, and the default ones of sizes that are no powers of two."""
    from pallas_kernels.add_rms_norm.mosaic_gpu import configs, default_config

    cases = {(8, 4096, "bfloat16", config) for config in configs(4096)}
    for size, num_tokens in itertools.product((896, 3072, 5120), (1, 8192)):
        cases.add((num_tokens, size, "bfloat16", default_config(num_tokens, size)))
    cases |= {(8, 16384, "float32", config) for config in configs(16384, 4)}
    call, count = calls("norm", [(*rest, dataclasses.astuple(config)) for *rest, config in cases])
    check(report(call), count)


def test_truncation():
    call, count = calls("truncate", [(256, 128256, config) for config in CANDIDATES])
    text = report(call)
    check(text, count)
    # 4 warpgroups of more registers would not fit an SM.
    assert max(map(int, re.findall(r"Used (\d+) registers", text))) <= 128
