"""Kernels of a trace by category, and the picture of a step."""

from __future__ import annotations

import random

import pytest

from vjax.benchmarks.trace import CATEGORIES, Kernel, usage


@pytest.mark.parametrize(
    ("name", "category"),
    [
        ("gemm_fusion_dot_general_130", "matrix products"),
        ("gated_matmul_mosaic_gpu_kernel", "matrix products"),
        ("nvjet_sm90_tst_128x128_64x6_4x2_h_bz_NNT", "matrix products"),
        ("decode_attention_mosaic_gpu_kernel", "attention"),
        ("combine_decode_attention_mosaic_gpu_kernel", "attention"),
        ("rope_write_kv_mosaic_gpu_kernel", "rope and KV write"),
        ("add_rms_norm_mosaic_gpu_kernel", "norms"),
        ("MemcpyH2D", "transfers"),
        ("loop_convert_fusion_3", "other"),
    ],
)
def test_category(name: str, category: str):
    assert Kernel(name, 0, 1).category == category


def test_usage_of_kernels_that_overlap():
    kernels = [Kernel("gemm", 1000, 3000), Kernel("fusion", 2000, 2500), Kernel("decode_attention", 2900, 4000)]
    used = usage([*kernels, Kernel("gemm", 5000, 6000)])
    assert used.span == pytest.approx(5e-6) and used.busy == pytest.approx(4e-6) and used.coverage == pytest.approx(0.8)
    assert used.by_category["matrix products"] == pytest.approx(3e-6)
    assert used.by_category["attention"] == pytest.approx(1.1e-6)
    assert used.counts["matrix products"] == 2 and sum(used.counts.values()) == 4


def test_a_launch_lasts_from_its_first_kernel_to_its_last():
    graph = [Kernel("gemm", 0, 1000, 7), Kernel("fusion", 2000, 3000, 7), Kernel("gemm", 4000, 6000, 7)]
    alone = [Kernel("MemcpyD2H", 2500, 2600, 8), Kernel("fusion", 7000, 8000, 9), Kernel("fusion", 9000, 10000)]
    used = usage(sorted([*graph, *alone], key=lambda kernel: kernel.start))
    assert used.busy == pytest.approx(6e-6) and used.launched == pytest.approx(8e-6)
    assert used.coverage == pytest.approx(0.8)


def test_picture_of_a_step(tmp_path):
    pytest.importorskip("matplotlib")
    from vjax.benchmarks import step_picture

    rng = random.Random(0)
    names = ["gemm_fusion", "decode_attention", "combine_decode_attention", "rope_write_kv", "add_rms_norm", "fusion"]
    kernels, clock = [], 0.0
    for _ in range(200):
        kernels.append(Kernel(rng.choice(names), clock, clock + rng.choice([2e3, 5e4])))
        clock = kernels[-1].end + 500
    used = usage(kernels)
    record = {
        "num_requests": 4,
        "step_seconds": used.span,
        "traced_step_seconds": used.span,
        "busy_seconds": used.busy,
        "coverage": used.coverage,
        "kernels": used.by_category,
        "read_bytes_per_second": 4.4e12,
        "least_seconds": {"weights": 0.6 * used.span, "KV cache": 0.1 * used.span},
    }
    step_picture.draw(record, kernels, tmp_path / "step.png")
    assert (tmp_path / "step.png").stat().st_size > 10_000
    assert set(used.by_category) == set(CATEGORIES)
