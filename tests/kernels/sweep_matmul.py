"""Times the Mosaic product against XLA's on a GPU: `python tests/kernels/sweep_matmul.py [rows ...]`.

Device times by CUPTI, medians over eight weights in turns, which are more than the L2 holds.
"""

from __future__ import annotations

import functools
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import jax
import jax.numpy as jnp

from pallas_kernels.bench import timing
from pallas_kernels.matmul import mosaic_gpu

#: name -> (K, N): products of Llama-3-8B, and qkv of Llama-2-7B.
SHAPES = {"qkv": (4096, 6144), "o": (4096, 4096), "down": (14336, 4096), "qkv_mha": (4096, 12288)}
COLUMNS = (64, 96, 128, 192, 256)
WEIGHTS = 8


def compiled(rows: int, depth: int, width: int, columns: int | None):
    x = jax.ShapeDtypeStruct((rows, depth), jnp.bfloat16)
    w = jax.ShapeDtypeStruct((depth, width), jnp.bfloat16)
    product = jnp.matmul
    if columns is not None:
        product = functools.partial(mosaic_gpu.matmul, config=mosaic_gpu.config_for(columns), interpret=False)
    try:
        return jax.jit(lambda x, ws: [product(x, w) for w in ws]).lower(x, [w] * WEIGHTS).compile()
    except Exception as error:
        return error


def main(rows: list[int]) -> None:
    start = time.time()
    jobs = [
        (m, name, columns)
        for m in rows
        for name, (_, n) in SHAPES.items()
        for columns in (None, *(c for c in COLUMNS if n % c == 0))
    ]
    with ThreadPoolExecutor(12) as pool:
        built = dict(zip(jobs, pool.map(lambda job: compiled(job[0], *SHAPES[job[1]], job[2]), jobs), strict=True))
    print(f"compiled {len(jobs)} programs in {time.time() - start:.0f} s", flush=True)
    for name, (depth, width) in SHAPES.items():
        ws = [jax.random.normal(jax.random.key(i), (depth, width), jnp.bfloat16) for i in range(WEIGHTS)]
        for m in rows:
            x = jax.random.normal(jax.random.key(99), (m, depth), jnp.bfloat16)
            wanted, line = None, []
            for columns in (None, *(c for c in COLUMNS if width % c == 0)):
                run = built[m, name, columns]
                if isinstance(run, Exception):
                    line.append(f"{columns}: {type(run).__name__} {str(run)[:80]}")
                    continue
                got = run(x, ws)[-1].astype(jnp.float32)
                wanted = got if wanted is None else wanted
                error = float(jnp.max(jnp.abs(got - wanted)) / jnp.max(jnp.abs(wanted)))
                seconds = timing.device_seconds(run, [(x, ws)], iterations=5) / WEIGHTS
                line.append(f"{columns or 'xla'}: {seconds * 1e6:.1f}{'' if error < 1e-2 else ' WRONG'}")
            least = max(2 * m * depth * width / 790e6, 2 * depth * width / 4.46e6)
            print(f"{name} {m} rows, us (at least {least:.1f}): {'; '.join(line)}", flush=True)


if __name__ == "__main__":
    main([int(arg) for arg in sys.argv[1:]] or [256, 384, 512, 640, 768, 896, 1024])
