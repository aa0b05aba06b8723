"""Trains the bundled model `vjax-tiny` on the source of Python's standard library and exports it.

    pip install flax optax orbax-checkpoint safetensors tokenizers
    python examples/train_tiny_model.py prepare train evaluate export --out vjax-tiny

The phases may run one by one and on different machines: `prepare` reads the running interpreter's library and leaves
token arrays and a tokenizer in --data; `train` (minutes on one GPU) goes on from the newest checkpoint in --work;
`evaluate` measures the best checkpoint; `export` writes a Hugging Face directory with a model card. `--smoke` shrinks
the text and the run so that all four pass on a laptop's CPU in about a minute; the model's shape stays the same.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx
from tiny_model import dataset, export, sampling, training
from tiny_model.corpus import standard_library_root
from tiny_model.model import TinyConfig, TinyLlama, attention_implementation, parameter_count
from tiny_model.training import TrainSettings

PHASES = ("prepare", "train", "evaluate", "export")


@dataclass(frozen=True)
class Scale:
    """How much of everything: the whole run or a trial of it."""

    settings: TrainSettings
    keep_every: int
    headers: int
    samples_per_header: int
    max_prompt_tokens: int
    new_tokens: int
    temperature: float = 0.8


FULL = Scale(TrainSettings(), keep_every=1, headers=200, samples_per_header=2, max_prompt_tokens=256, new_tokens=256)
SMOKE = Scale(
    TrainSettings(steps=20, batch_size=4, window=128, warmup_steps=5, checkpoint_every=10),
    keep_every=16,
    headers=4,
    samples_per_header=1,
    max_prompt_tokens=96,
    new_tokens=16,
)


def _compute_dtype() -> jnp.dtype:
    """bf16, but fp32 on the CPU, where bf16 products are many times slower."""
    return jnp.dtype(jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16)


def _build() -> TinyLlama:
    return TinyLlama(TinyConfig(), _compute_dtype(), attention_implementation(), rngs=nnx.Rngs(0))


def prepare(scale: Scale, data: Path) -> None:
    """Phase 1: tokenizer and token arrays."""
    config = TinyConfig()
    made = dataset.prepare(
        standard_library_root(),
        data,
        vocab_size=config.vocab_size,
        max_length=config.max_position_embeddings,
        keep_every=scale.keep_every,
    )
    print(json.dumps(made.facts, indent=2))


def train(scale: Scale, data: Path, work: Path) -> None:
    """Phase 2: checkpoints in `work`, and `train.json` with the settings and the report."""
    report = training.train(_build(), dataset.load(data), scale.settings, work)
    where = {"device": jax.devices()[0].device_kind, "compute_dtype": _compute_dtype().name}
    _write(work / "train.json", {**dataclasses.asdict(scale.settings), **dataclasses.asdict(report), **where})


def evaluate(scale: Scale, data: Path, work: Path) -> None:
    """Phase 3: scores of the best checkpoint, rounded to bf16, in `scores.json`."""
    text, model, settings = dataset.load(data), _best_model(work), scale.settings
    nll = training.held_out_nll(model, text.held_out, window=settings.window, batch_size=settings.batch_size)
    headers = sampling.select_headers(text.tokenizer, text.headers, scale.headers, scale.max_prompt_tokens)
    headers = headers * scale.samples_per_header
    completions = sampling.complete(
        model,
        text.tokenizer,
        headers,
        max_prompt_tokens=scale.max_prompt_tokens,
        new_tokens=scale.new_tokens,
        temperature=scale.temperature,
        seed=0,
    )
    for header, completion in list(zip(headers, completions, strict=True))[:3]:
        print(header + sampling.function_body(completion))
    scores = {
        "parameters": parameter_count(model),
        "held_out_bits_per_byte": training.bits_per_byte(nll, text.facts["held_out_bytes"]),
        "completions": len(completions),
        "valid_completions": sum(map(sampling.is_valid, headers, completions)),
        "temperature": scale.temperature,
        "new_tokens": scale.new_tokens,
    }
    _write(work / "scores.json", scores)
    print(json.dumps(scores, indent=2))


def export_model(data: Path, work: Path, out: Path) -> None:
    """Phase 4: the Hugging Face directory."""
    model = _best_model(work)
    card = export.model_card(
        model.config, dataset.load(data).facts, _read(work / "train.json"), _read(work / "scores.json")
    )
    export.write_model(model, data, out, card)
    print(f"wrote {out}: {sum(path.stat().st_size for path in out.iterdir()):,} bytes")


def _best_model(work: Path) -> TinyLlama:
    model, checkpoints = _build(), training.Checkpoints(work)
    try:
        checkpoints.restore_best(model)
    finally:
        checkpoints.close()
    export.round_parameters(model)
    return model


def _write(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _read(path: Path) -> dict:
    if not path.is_file():
        raise FileNotFoundError(f"no {path}: run the phases 'train' and 'evaluate' with the same --work first")
    return json.loads(path.read_text(encoding="utf-8"))


def main(arguments: list[str] | None = None) -> None:
    """Runs the phases that the command line names, in their order."""
    parser = argparse.ArgumentParser(description="Train and export the bundled model vjax-tiny.")
    parser.add_argument("phases", nargs="+", choices=PHASES)
    parser.add_argument("--data", type=Path, default=Path(".tiny"), help="prepared text and tokenizer")
    parser.add_argument("--work", type=Path, default=Path(".tiny/work"), help="checkpoints and measurements")
    parser.add_argument("--out", type=Path, default=Path(".tiny/vjax-tiny"), help="the exported model")
    parser.add_argument("--steps", type=int, help="training steps (default 2400, 20 with --smoke)")
    parser.add_argument("--smoke", action="store_true", help="a trial on little text")
    options = parser.parse_args(arguments)
    scale = SMOKE if options.smoke else FULL
    if options.steps is not None:
        if options.steps < 2:
            parser.error(f"--steps must be at least 2, got {options.steps}")
        scale = dataclasses.replace(scale, settings=dataclasses.replace(scale.settings, steps=options.steps))
    begun = time.perf_counter()
    for phase in PHASES:
        if phase not in options.phases:
            continue
        if phase == "prepare":
            prepare(scale, options.data)
        elif phase == "train":
            train(scale, options.data, options.work)
        elif phase == "evaluate":
            evaluate(scale, options.data, options.work)
        else:
            export_model(options.data, options.work, options.out)
        print(f"{phase}: done after {time.perf_counter() - begun:.0f} s", flush=True)


if __name__ == "__main__":
    main()
