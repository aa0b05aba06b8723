"""What Hugging Face transformers answers, from a process of its own: PyTorch and JAX each bring their CUDA libraries.

As a program, `python tests/gpu/hf_oracle.py margins|greedy JOB.json RESULT` does one job; the tests call
`margins` and `greedy_ids`.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Margins:
    """Greedy continuations in float32 and how sure they are; arrays are [prompts, tokens].

    Attributes:
        token_ids: i32, the float32 argmax at every position.
        margin: f32, the largest logit less the second largest.
        bf16_error: f32, the largest difference of a logit between float32 and bfloat16.
        bf16_ids: i32, the bfloat16 argmax, given the same tokens before it.
        bf16_device: Where the bfloat16 model ran.
    """

    token_ids: np.ndarray
    margin: np.ndarray
    bf16_error: np.ndarray
    bf16_ids: np.ndarray
    bf16_device: str


def margins(model: str | Path, prompts: Sequence[Sequence[int]], num_tokens: int, folder: Path) -> Margins:
    """Continues every prompt by `num_tokens` greedy tokens, whatever they are, and compares float32 with bfloat16.

    Args:
        model: Directory of a checkpoint.
        prompts: Token ids.
        folder: Where to put files.
    """
    job = {"model": str(model), "prompts": [list(map(int, p)) for p in prompts], "num_tokens": num_tokens}
    found = np.load(_run("margins", job, folder))
    arrays = (found[name] for name in ("token_ids", "margin", "bf16_error", "bf16_ids"))
    return Margins(*arrays, bf16_device=str(found["bf16_device"]))


def greedy_ids(
    names: Sequence[str], prompts: Sequence[Sequence[int]], num_tokens: int, folder: Path
) -> dict[str, tuple[str, list[list[int]]]]:
    """Writes tiny random checkpoints of tests/models/checkpoints.py and decodes with each in float32.

    Returns:
        name -> (path of the checkpoint, token ids of each prompt).
    """
    job = {"names": list(names), "prompts": [list(map(int, p)) for p in prompts], "num_tokens": num_tokens}
    return json.loads(Path(_run("greedy", job, folder)).read_text())


def _run(kind: str, job: dict[str, Any], folder: Path) -> Path:
    source, result = folder / f"{kind}-job.json", folder / f"{kind}-result.{'npz' if kind == 'margins' else 'json'}"
    source.write_text(json.dumps(job))
    done = subprocess.run(
        [sys.executable, __file__, kind, str(source), str(result)], capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return result


# ---- in the other process -------------------------------------------------------------------------------------------


def _write_margins(job: dict[str, Any], result: Path) -> None:
    import torch

    prompts, num_tokens = job["prompts"], job["num_tokens"]
    exact, (rounded, device) = _load(job["model"], torch.float32), _load_bf16(job["model"])
    found = {
        name: np.zeros((len(prompts), num_tokens), dtype)
        for name, dtype in (("token_ids", "i4"), ("margin", "f4"), ("bf16_error", "f4"), ("bf16_ids", "i4"))
    }
    for length in sorted({len(p) for p in prompts}):  # prompts of one length need no padding
        rows = [i for i, p in enumerate(prompts) if len(p) == length]
        ids = _continue(exact, torch.tensor([prompts[i] for i in rows]), num_tokens)
        # Once more, all positions at once, so that both dtypes do the same sums.
        logits = _logits(exact, ids, length)
        other = _logits(rounded, ids.to(device), length).cpu()
        top = logits.topk(2, dim=-1)
        found["token_ids"][rows] = ids[:, length:].numpy()
        found["margin"][rows] = (top.values[..., 0] - top.values[..., 1]).numpy()
        found["bf16_error"][rows] = (logits - other).abs().amax(dim=-1).numpy()
        found["bf16_ids"][rows] = other.argmax(dim=-1).numpy()
    np.savez(result, **found, bf16_device=np.array(device))


def _load(path: str, dtype: Any) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation="eager").eval()


def _load_bf16(path: str) -> tuple[Any, str]:
    """On the GPU if it lets a second process in."""
    import torch

    model = _load(path, torch.bfloat16)
    if torch.cuda.is_available():
        try:
            return model.to("cuda"), "cuda"
        except RuntimeError as e:
            print(e, file=sys.stderr)
    return model.to("cpu"), "cpu"


def _continue(model: Any, ids: Any, num_tokens: int) -> Any:
    """ids [N, L] -> [N, L + num_tokens]."""
    import torch
    from transformers import DynamicCache

    cache, new = DynamicCache(config=model.config), ids
    with torch.no_grad():
        for _ in range(num_tokens):
            # The cache's name depends on transformers' version, its place does not: after mask and positions.
            output = model(new, None, None, cache, use_cache=True)
            new = output.logits[:, -1].argmax(dim=-1, keepdim=True)
            ids = torch.cat([ids, new], dim=1)
    return ids


def _logits(model: Any, ids: Any, prompt_length: int) -> Any:
    """float32 [N, tokens, vocab] for the tokens after the prompt."""
    import torch

    with torch.no_grad():
        return model(ids[:, :-1]).logits[:, prompt_length - 1 :].float()


def _write_greedy(job: dict[str, Any], result: Path) -> None:
    sys.path.insert(0, str(ROOT))
    from tests.models.checkpoints import hf_greedy, make_checkpoint

    answers = {}
    for name in job["names"]:
        path = make_checkpoint(name, result.parent / "checkpoints")
        answers[name] = (path, [hf_greedy(path, prompt, job["num_tokens"]) for prompt in job["prompts"]])
    result.write_text(json.dumps(answers))


if __name__ == "__main__":
    _kind, _job, _result = sys.argv[1:]
    {"margins": _write_margins, "greedy": _write_greedy}[_kind](json.loads(Path(_job).read_text()), Path(_result))
