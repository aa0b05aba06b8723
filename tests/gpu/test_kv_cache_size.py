"""The KV cache takes what the device has left, and leaves what steps need: of the smallest model, that is the most."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from tests.gpu.engines import GPU_MEMORY_UTILIZATION, on_gpu

pytestmark = pytest.mark.gpu

# In a process of its own, whose pool is not the tests'; every other argument is the default, max_num_seqs too.
PROGRAM = """
import json, sys
from vjax import LLM, SamplingParams

llm = LLM("vjax-tiny", gpu_memory_utilization=float(sys.argv[1]))
params = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
prompts = [{"prompt_token_ids": [5 + i] * 20} for i in range(64)]
outputs = llm.generate(prompts, params, use_tqdm=False)
blocks = llm.llm_engine.config.cache.num_gpu_blocks
print(json.dumps({"tokens": [len(o.outputs[0].token_ids) for o in outputs], "blocks": blocks}))
"""


def test_an_engine_of_the_smallest_model_with_default_limits(say):
    fraction = 0.9 - GPU_MEMORY_UTILIZATION
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(fraction)],
        env={name: value for name, value in os.environ.items() if name != "XLA_PYTHON_CLIENT_MEM_FRACTION"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    found = json.loads(run.stdout.splitlines()[-1])
    say(f"\n{found['blocks']} blocks of the bundled model in {fraction:.1f} of the memory")
    assert found["tokens"] == [8] * 64
    # 64 KiB a block.
    assert not on_gpu() or found["blocks"] > 500_000
