"""Checks and times configs of the Hopper decode kernel on a GPU: `python tests/kernels/sweep_decode.py [case ...]`.

Cases fp8_* have a float8_e4m3fn cache and float16 queries.

Each case runs in a process of its own, so that they compile at the same time; a lock keeps all but one off the GPU.
Times are CUPTI's for each kernel, medians over inputs that rotate through more than the L2. A config is right if it
agrees with the XLA implementation on ragged lengths and repeats itself bit for bit.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import fcntl
import functools
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

L2_BYTES = 300e6  # rotate through this much
ROUNDS = 24
SECONDS = 60  # on the GPU, for a case


@dataclasses.dataclass(frozen=True)
class Case:
    batch: int
    context: int
    num_q_heads: int = 32
    num_kv_heads: int = 8
    head_dim: int = 128
    block_size: int = 16
    q_len: int = 1
    cache: str = "bfloat16"
    goal: str = ""

    @property
    def q_dtype(self) -> str:
        return "bfloat16" if self.cache == "bfloat16" else "float16"


CASES = {
    "b1_1k": Case(1, 1024),
    "b8_1k": Case(8, 1024),
    "b16_1k": Case(16, 1024),
    "b32_1k": Case(32, 1024),
    "b64_1k": Case(64, 1024),
    "b1_8k": Case(1, 8192, goal="<= 19 us"),
    "b1_32k": Case(1, 32768, goal="<= 45 us"),
    "b8_8k": Case(8, 8192, goal="<= 75 us"),
    "b64_2k": Case(64, 2048, goal=">= 4.0 TB/s"),
    "b256_1k": Case(256, 1024, goal=">= 4.0 TB/s"),
    "b256_4k": Case(256, 4096, goal=">= 4.4 TB/s"),
    "mha_b64_2k": Case(64, 2048, num_kv_heads=32, goal=">= 4.3 TB/s"),
    "d64_b64_2k": Case(64, 2048, head_dim=64, goal=">= 3.3 TB/s"),
    "verify5_b64_2k": Case(64, 2048, q_len=5, goal="<= 1.05 x b64_2k"),
    "b64_2k_block64": Case(64, 2048, block_size=64, goal=">= 4.0 TB/s"),
    "fp8_b256_4k": Case(256, 4096, cache="float8_e4m3fn", goal="<= 640 us"),
    "fp8_b64_2k": Case(64, 2048, cache="float8_e4m3fn", goal="<= 88 us"),
    "fp8_b8_8k": Case(8, 8192, cache="float8_e4m3fn", goal="<= 50 us"),
    "fp8_b1_8k": Case(1, 8192, cache="float8_e4m3fn", goal="<= 15 us"),
    "fp8_d64_b64_2k": Case(64, 2048, head_dim=64, cache="float8_e4m3fn", goal="<= 55 us"),
}
BATCH = [
    {"heads": 8, "columns": 128, "stages": 6},
    {"heads": 8, "columns": 128, "stages": 2, "streams": 2},
    {"heads": 4, "columns": 128, "stages": 6},
    {"heads": 4, "columns": 64, "stages": 12},
    {"heads": 4, "columns": 64, "stages": 5, "streams": 2},
    {"heads": 4, "columns": 64, "stages": 3, "streams": 3, "staged": 32},
    {"heads": 2, "columns": 64, "stages": 5, "streams": 2},
]
FP8_BATCH = [
    {"heads": 8, "columns": 128, "stages": 3, "streams": 2, "staged": 32},
    {"heads": 4, "columns": 128, "stages": 3, "streams": 2, "staged": 32},
    {"heads": 4, "columns": 64, "stages": 7, "streams": 2, "staged": 32, "converted": 2},
    {"heads": 4, "columns": 64, "stages": 9, "streams": 2, "staged": 32},
    {"heads": 4, "columns": 64, "stages": 4, "streams": 3, "staged": 32},
    {"heads": 4, "columns": 64, "stages": 2, "streams": 3, "staged": 32, "converted": 2},
    {"heads": 8, "columns": 128, "stages": 7, "converted": 2},
    {"heads": 8, "columns": 128, "stages": 9},
]
FP8_FEW = [
    {"heads": 2, "columns": 128, "stages": 9, "unroll": 32},
    {"heads": 2, "columns": 128, "stages": 7, "converted": 2, "unroll": 32},
    {"heads": 2, "columns": 64, "stages": 16, "converted": 2, "unroll": 32},
    {"heads": 2, "columns": 64, "stages": 7, "streams": 2, "staged": 32, "converted": 2, "unroll": 32},
    {"heads": 4, "columns": 128, "stages": 7, "converted": 2, "unroll": 32},
]
FEW = [
    {"heads": 2, "columns": 128, "stages": 5, "staged": 128, "unroll": 32},
    {"heads": 2, "columns": 128, "stages": 5, "staged": 128, "unroll": 16},
    {"heads": 2, "columns": 64, "stages": 10, "staged": 128, "unroll": 32},
    {"heads": 2, "columns": 64, "stages": 10, "unroll": 16},
    {"heads": 2, "columns": 64, "stages": 5, "streams": 2, "unroll": 32},
    {"heads": 4, "columns": 64, "stages": 10, "staged": 128, "unroll": 32},
    {"heads": 8, "columns": 128, "stages": 5, "staged": 128, "unroll": 32},
]
SHORT = [
    {"heads": 2, "columns": 128, "stages": 5, "staged": 128, "unroll": 32},
    {"heads": 2, "columns": 128, "stages": 5, "staged": 128, "unroll": 8},
    {"heads": 2, "columns": 128, "stages": 5, "staged": 128, "unroll": 8, "min_tiles": 1},
    {"heads": 2, "columns": 128, "stages": 5, "staged": 128, "unroll": 8, "min_tiles": 4},
    {"heads": 4, "columns": 128, "stages": 5, "staged": 128, "unroll": 8},
    {"heads": 4, "columns": 128, "stages": 5, "staged": 128, "unroll": 8, "min_tiles": 4},
    {"heads": 4, "columns": 64, "stages": 5, "streams": 2, "unroll": 8},
    {"heads": 8, "columns": 128, "stages": 5, "staged": 128, "unroll": 8},
    {"heads": 8, "columns": 128, "stages": 2, "streams": 2, "unroll": 8},
]
CONFIGS = {
    **dict.fromkeys(["b1_1k", "b8_1k", "b16_1k", "b32_1k", "b64_1k"], SHORT),
    "b1_8k": FEW,
    "b1_32k": FEW,
    "b8_8k": [*FEW[:3], *BATCH[:1], *BATCH[2:5], {"heads": 4, "columns": 64, "stages": 12, "unroll": 16}],
    "b64_2k": BATCH,
    "b256_1k": BATCH,
    "b256_4k": [
        *BATCH[:3],
        *BATCH[4:6],
        {"heads": 8, "columns": 128, "stages": 6, "ctas": 264},
        {"heads": 8, "columns": 128, "stages": 6, "ctas": 1320},
    ],
    "mha_b64_2k": BATCH,
    "d64_b64_2k": [
        {"heads": 8, "columns": 128, "stages": 12},
        {"heads": 8, "columns": 128, "stages": 5, "streams": 2},
        {"heads": 8, "columns": 128, "stages": 3, "streams": 3},
        {"heads": 4, "columns": 64, "stages": 11, "streams": 2},
        {"heads": 4, "columns": 64, "stages": 6, "streams": 3},
    ],
    "verify5_b64_2k": [
        {"heads": 2, "columns": 128, "stages": 6},
        {"heads": 2, "columns": 128, "stages": 6, "unroll": 16},
        {"heads": 2, "columns": 128, "stages": 5, "staged": 128},
        {"heads": 2, "columns": 128, "stages": 4, "staged": 128, "unroll": 2},
        {"heads": 2, "columns": 128, "stages": 2, "streams": 2},
        {"heads": 2, "columns": 64, "stages": 12},
    ],
    "b64_2k_block64": [
        {"heads": 2, "columns": 128, "stages": 6},
        {"heads": 1, "columns": 64, "stages": 12},
        {"heads": 1, "columns": 64, "stages": 5, "streams": 2},
        {"heads": 2, "columns": 128, "stages": 2, "streams": 2},
    ],
    "fp8_b256_4k": FP8_BATCH,
    "fp8_b64_2k": FP8_BATCH,
    "fp8_b8_8k": [*FP8_FEW, *FP8_BATCH[1:5]],
    "fp8_b1_8k": FP8_FEW,
    "fp8_d64_b64_2k": [
        {"heads": 8, "columns": 128, "stages": 5, "streams": 3, "staged": 32},
        {"heads": 8, "columns": 128, "stages": 7, "streams": 2},
        {"heads": 8, "columns": 128, "stages": 6, "streams": 2, "converted": 2},
        {"heads": 4, "columns": 64, "stages": 10, "streams": 3, "staged": 32, "converted": 2},
    ],
}


def kernel_times(run) -> list[tuple[str, float]]:
    """(name, us) of each kernel that `run` launches."""
    import jax
    from jax._src.lib import mosaic_gpu

    extension = mosaic_gpu._mosaic_gpu_ext  # pyright: ignore[reportPrivateImportUsage]
    extension._cupti_init()
    try:
        jax.block_until_ready(run())
    finally:
        timings = extension._cupti_get_timings(False)
    return [(name, ms * 1e3) for name, ms in timings]


class Bench:
    """Inputs and executables of one case."""

    def __init__(self, name: str) -> None:
        import numpy as np

        self.name, self.case = name, CASES[name]
        case = self.case
        self.bytes = 2 * case.batch * case.context * case.num_kv_heads * case.head_dim
        self.bytes *= 2 if case.cache == "bfloat16" else 1
        self.sets = max(2, -(-int(L2_BYTES) // self.bytes) + 1)
        self.width = case.context // case.block_size
        self.num_blocks = self.sets * case.batch * self.width + 1
        rng = np.random.default_rng(0)
        self.tables = np.zeros((self.sets * case.batch + 1, self.width), np.int32)
        self.tables[1:] = (rng.permutation(self.num_blocks - 1) + 1).reshape(-1, self.width)
        self.q_lens = np.full(case.batch, case.q_len)
        self.even = np.full(case.batch, case.context)
        self.ragged = rng.integers(case.q_len, case.context + 1, case.batch)
        self.ragged[-1] = case.q_len

    def metadata(self, which: int, lens) -> tuple:
        import numpy as np

        rows = which * self.case.batch + np.arange(self.case.batch) + 1
        return self.tables, *(
            x.astype(np.int32) for x in (rows, np.concatenate([[0], np.cumsum(self.q_lens)]), np.asarray(lens))
        )

    def compile(self, config: dict):
        """(executable of the plan, executable of the attention)."""
        import jax

        from pallas_kernels.ragged_paged_attention import plan_decode as plans
        from pallas_kernels.ragged_paged_attention.mosaic_decode import decode_attention

        case = self.case
        shape = plans.DecodeShape(
            case.batch * case.q_len, case.num_q_heads, case.num_kv_heads, case.head_dim, case.block_size, case.q_len
        )
        make = jax.jit(functools.partial(plans.plan_decode, shape=shape, config=plans.DecodeConfig(**config)))
        metadata = self.metadata(0, self.even)
        spec = jax.ShapeDtypeStruct
        cache = spec((self.num_blocks, case.num_kv_heads, case.block_size, case.head_dim), case.cache)
        q = spec((shape.num_tokens, case.num_q_heads, case.head_dim), case.q_dtype)
        attend = jax.jit(lambda q, k, v, plan: decode_attention(q, k, v, plan, scale=case.head_dim**-0.5))
        attend = attend.lower(q, cache, cache, jax.eval_shape(make, *metadata)).compile()
        return make.lower(*metadata).compile(), attend

    def inputs(self):
        import jax
        import jax.numpy as jnp

        case = self.case
        keys = jax.random.split(jax.random.key(0), 3)
        normal = jax.jit(
            lambda key, shape, dtype: jax.random.normal(key, shape, jnp.bfloat16).astype(dtype), static_argnums=(1, 2)
        )
        shape = (self.num_blocks, case.num_kv_heads, case.block_size, case.head_dim)
        q = normal(keys[0], (case.batch * case.q_len, case.num_q_heads, case.head_dim), case.q_dtype)
        return jax.block_until_ready((q, normal(keys[1], shape, case.cache), normal(keys[2], shape, case.cache)))

    def wanted(self, q, k, v):
        import jax
        import numpy as np

        import pallas_kernels

        case = self.case

        def attend(q, k, v, *data):
            plan = pallas_kernels.plan_attention(
                *data,
                num_tokens=q.shape[0],
                num_q_heads=case.num_q_heads,
                num_kv_heads=case.num_kv_heads,
                head_dim=case.head_dim,
                block_size=case.block_size,
                dtype=k.dtype,
                decode_only=case.q_len == 1,
                implementation="xla",
            )
            return pallas_kernels.ragged_paged_attention(q, k, v, plan, scale=case.head_dim**-0.5)

        return np.asarray(jax.jit(attend)(q, k, v, *self.metadata(1, self.ragged)), np.float32)

    def check(self, executables, arrays, wanted) -> str:
        import numpy as np

        plan, attend = executables
        data = plan(*self.metadata(1, self.ragged))
        got = np.asarray(attend(*arrays, data), np.float32)
        same = all(np.array_equal(got, np.asarray(attend(*arrays, data), np.float32)) for _ in range(5))
        error = np.max(np.linalg.norm(got - wanted, axis=-1) / np.linalg.norm(wanted, axis=-1))
        return f"{'ok' if error < 1e-2 else 'WRONG'} {error:.1e} {'bitwise' if same else 'NOT REPEATABLE'}"

    def times(self, executables, arrays) -> str:
        import jax

        plan, attend = executables
        plans = [jax.block_until_ready(plan(*self.metadata(i, self.even))) for i in range(self.sets)]
        jax.block_until_ready([attend(*arrays, data) for data in plans])
        timings = kernel_times(lambda: [attend(*arrays, plans[i % self.sets]) for i in range(ROUNDS)])
        main = statistics.median(us for name, us in timings if name.startswith("decode_attention"))
        after = statistics.median(us for name, us in timings if name.startswith("combine"))
        rest = sum(us for name, us in timings if not name.startswith(("decode_attention", "combine"))) / ROUNDS
        planned = kernel_times(lambda: plan(*self.metadata(0, self.even)))
        total = main + after + rest
        return (
            f"{total:7.1f} us {self.bytes / total / 1e6:5.2f} TB/s = kernel {main:.1f} + combine {after:.1f} + "
            f"other {rest:.1f}; plan {sum(us for _, us in planned):.1f} in {len(planned)} kernels"
        )


def read_ceiling() -> str:
    import jax
    import jax.numpy as jnp

    x = jax.random.normal(jax.random.key(1), (1 << 30,), jnp.bfloat16)
    largest = jax.jit(lambda x: jnp.max(x.reshape(1 << 15, -1), axis=1))
    jax.block_until_ready(largest(x))
    timings = kernel_times(lambda: [largest(x) for _ in range(5)])
    return f"XLA row maxima read {2 * 2**30 / statistics.median(us for _, us in timings) / 1e6:.2f} TB/s"


def work(name: str, lock_path: str) -> None:
    start = time.time()
    bench = Bench(name)
    configs = CONFIGS[name]

    def compiled(config: dict):
        try:
            return bench.compile(config)
        except Exception as error:  # a config that does not fit is a line of the result
            return error

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        executables = list(pool.map(compiled, configs))
    ready = time.time() - start
    with open(lock_path, "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        signal.alarm(SECONDS)  # a kernel that hangs ends the process and frees the lock
        case = bench.case
        print(f"-- {name}: {case}, {bench.sets} sets, compiled after {ready:.0f} s; {read_ceiling()}", flush=True)
        arrays = bench.inputs()
        wanted = bench.wanted(*arrays)
        for config, pair in zip(configs, executables, strict=True):
            text = ", ".join(f"{key} {value}" for key, value in config.items())
            if isinstance(pair, Exception):
                print(f"{name:15s} {text}: FAILED {type(pair).__name__} {str(pair)[:200]}", flush=True)
                continue
            right = bench.check(pair, arrays, wanted)
            print(f"{name:15s} {bench.times(pair, arrays)} | {right} | {text}", flush=True)


def main() -> None:
    names = sys.argv[1:] or list(CASES)
    environment = {**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    start = time.time()
    with tempfile.NamedTemporaryFile() as lock:
        command = [sys.executable, __file__, "--work"]
        workers = [subprocess.Popen([*command, name, lock.name], env=environment) for name in names]
        failed = [name for name, worker in zip(names, workers, strict=True) if worker.wait()]
    print(f"{time.time() - start:.0f} s; failed: {', '.join(failed) or 'none'}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--work"]:
        work(*sys.argv[2:])
    else:
        main()
