"""The training loop: AdamW with a cosine schedule, resumable through Orbax, keeping the best held-out parameters."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import nnx
from jax.typing import ArrayLike

from .dataset import Dataset
from .model import TinyLlama


@dataclass(frozen=True)
class TrainSettings:
    """What determines a run; recorded beside the checkpoints, since a resumed run must not change it."""

    steps: int = 2400
    batch_size: int = 32
    window: int = 2048
    peak_learning_rate: float = 2e-3
    warmup_steps: int = 100
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    checkpoint_every: int = 250
    seed: int = 0

    @property
    def tokens_per_step(self) -> int:
        return self.batch_size * self.window


@dataclass(frozen=True)
class Report:
    """How a run went. `steps` counts all steps so far, the speed is that of this call's steps after the first."""

    steps: int
    best_step: int
    train_loss: float
    tokens_per_second: float


def make_optimizer(model: TinyLlama, settings: TrainSettings) -> nnx.Optimizer:
    """AdamW (Loshchilov and Hutter, 2019) with clipped gradients; norms are not decayed."""
    schedule = optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=settings.peak_learning_rate,
        warmup_steps=min(settings.warmup_steps, settings.steps // 2),
        decay_steps=settings.steps,
        end_value=0.05 * settings.peak_learning_rate,
    )
    decayed: Callable = partial(jax.tree.map, lambda parameter: parameter.ndim > 1)
    adamw = optax.adamw(schedule, b1=0.9, b2=0.95, weight_decay=settings.weight_decay, mask=decayed)
    return nnx.Optimizer(model, optax.chain(optax.clip_by_global_norm(settings.clip_norm), adamw), wrt=nnx.Param)


def batch_starts(settings: TrainSettings, num_tokens: int, step: int) -> np.ndarray:
    """Where the windows of a step begin: int32 [batch]. A pure function, so a resumed run sees the same batches.

    An epoch visits the text once, in windows side by side, from a random offset and in random order.
    """
    windows = (num_tokens - 1) // settings.window - 1
    per_epoch = windows // settings.batch_size
    if per_epoch < 1:
        raise ValueError(
            f"{num_tokens} training tokens make no batch of {settings.batch_size} windows of {settings.window} tokens: "
            "prepare more text or lower the batch size"
        )
    epoch, index = divmod(step, per_epoch)
    random = np.random.default_rng((settings.seed, epoch))
    offset = random.integers(settings.window)
    order = random.permutation(windows)[index * settings.batch_size : (index + 1) * settings.batch_size]
    return (offset + order * settings.window).astype(np.int32)


def _windows(tokens: jax.Array, starts: ArrayLike, length: int) -> jax.Array:
    return tokens[jnp.asarray(starts)[:, None] + jnp.arange(length, dtype=jnp.int32)]


@partial(nnx.jit, static_argnames=("window",))
def train_step(model: TinyLlama, optimizer: nnx.Optimizer, tokens: jax.Array, starts: ArrayLike, window: int):
    """One update; returns the mean loss in nats per token. tokens: int32 [N] on the device; starts: int32 [batch]."""
    batch = _windows(tokens, starts, window + 1)

    def loss_fn(model):
        logits = model(batch[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch[:, 1:]).mean()

    loss, gradients = nnx.value_and_grad(loss_fn)(model)
    optimizer.update(model, gradients)
    return loss


@partial(nnx.jit, static_argnames=("window",))
def _window_nll(model: TinyLlama, tokens: jax.Array, starts: ArrayLike, first: ArrayLike, last: ArrayLike, window: int):
    """Sum of the negative log-likelihoods in nats of each window's targets first..last-1: fp32 [batch]."""
    batch = _windows(tokens, starts, window + 1)
    nll = optax.softmax_cross_entropy_with_integer_labels(model(batch[:, :-1]), batch[:, 1:])
    position = jnp.arange(window, dtype=jnp.int32)
    scored = (position >= jnp.asarray(first)[:, None]) & (position < jnp.asarray(last)[:, None])
    return jnp.where(scored, nll, jnp.zeros_like(nll)).sum(axis=1)


def held_out_nll(model: TinyLlama, tokens: np.ndarray, *, window: int, batch_size: int) -> float:
    """Sum in nats over every token but the first. Windows overlap by half, so most tokens see window/2 tokens or more.

    Args:
        tokens: uint16 [M].
        window: Context length in tokens, even.
        batch_size: Windows at a time.
    """
    stride, targets = window // 2, len(tokens) - 1
    starts = np.arange(0, max(targets - stride, 1), stride, dtype=np.int32)
    first = np.where(starts == 0, 0, window - stride).astype(np.int32)
    last = np.minimum(targets - starts, window).astype(np.int32)
    padding = -len(starts) % batch_size
    starts, first, last = (np.pad(array, (0, padding)) for array in (starts, first, last))
    device_tokens = jnp.asarray(np.pad(tokens, (0, window + 1)).astype(np.int32))
    total = 0.0
    for begin in range(0, len(starts), batch_size):
        part = slice(begin, begin + batch_size)
        total += float(_window_nll(model, device_tokens, starts[part], first[part], last[part], window=window).sum())
    return total


def bits_per_byte(nll: float, num_bytes: int) -> float:
    """Nats over a text to bits per byte of the text."""
    return nll / math.log(2) / num_bytes


class Checkpoints:
    """Two Orbax managers in one folder: `latest` (model and optimiser, to resume), `best` (parameters, to export)."""

    def __init__(self, folder: Path):
        self._latest = ocp.CheckpointManager(
            (folder / "latest").absolute(), options=ocp.CheckpointManagerOptions(max_to_keep=1)
        )
        self._best = ocp.CheckpointManager(
            (folder / "best").absolute(),
            options=ocp.CheckpointManagerOptions(
                max_to_keep=1, best_fn=lambda metrics: metrics["held_out_bits_per_byte"], best_mode="min"
            ),
        )

    def save(self, step: int, model: TinyLlama, optimizer: nnx.Optimizer, bits: float) -> None:
        self._best.save(step, args=ocp.args.StandardSave(nnx.state(model)), metrics={"held_out_bits_per_byte": bits})
        self._latest.save(step, args=ocp.args.StandardSave(nnx.state((model, optimizer))))

    def restore_latest(self, model: TinyLlama, optimizer: nnx.Optimizer) -> int:
        """Brings both to the newest checkpoint and returns its step, 0 when there is none."""
        step = self._latest.latest_step()
        if step is None:
            return 0
        both = (model, optimizer)
        nnx.update(both, self._latest.restore(step, args=ocp.args.StandardRestore(nnx.state(both))))
        return step

    def restore_best(self, model: TinyLlama) -> int:
        """Brings the model to the parameters with the lowest held-out bits per byte and returns their step.

        Raises:
            FileNotFoundError: Nothing was trained in this folder.
        """
        step = self.best_step()
        if step is None:
            raise FileNotFoundError("no checkpoint to evaluate: run the phase 'train' with the same --work first")
        nnx.update(model, self._best.restore(step, args=ocp.args.StandardRestore(nnx.state(model))))
        return step

    def best_step(self) -> int | None:
        return self._best.best_step()

    def close(self) -> None:
        """Waits for the writes under way, then frees the managers."""
        self._latest.close()
        self._best.close()


def record_settings(settings: TrainSettings, folder: Path) -> None:
    """Writes the settings on the first run.

    Raises:
        ValueError: The folder holds a run with other settings.
    """
    path, now = folder / "settings.json", asdict(settings)
    if path.is_file():
        before = json.loads(path.read_text(encoding="utf-8"))
        changed = {name: (before.get(name), value) for name, value in now.items() if before.get(name) != value}
        if changed:
            raise ValueError(f"{folder} holds a run with other settings (then, now): {changed}; choose another --work")
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(now, indent=2) + "\n", encoding="utf-8")


def train(model: TinyLlama, data: Dataset, settings: TrainSettings, folder: Path, *, log_every: int = 50) -> Report:
    """Trains to `settings.steps` from the newest checkpoint in the folder, or from the start."""
    record_settings(settings, folder)
    optimizer = make_optimizer(model, settings)
    checkpoints = Checkpoints(folder)
    try:
        first = checkpoints.restore_latest(model, optimizer)
        print(f"training from step {first} to {settings.steps}, {settings.tokens_per_step} tokens a step")
        loss, speed = _train_from(first, model, optimizer, data, settings, checkpoints, log_every)
        return Report(settings.steps, checkpoints.best_step() or 0, loss, speed)
    finally:
        checkpoints.close()


def _train_from(
    first: int,
    model: TinyLlama,
    optimizer: nnx.Optimizer,
    data: Dataset,
    settings: TrainSettings,
    checkpoints: Checkpoints,
    log_every: int,
) -> tuple[float, float]:
    """The loop itself; returns the last logged loss and tokens per second."""
    tokens = jnp.asarray(data.train.astype(np.int32))
    loss, speed, clock, counted = math.nan, math.nan, time.perf_counter(), first
    for step in range(first + 1, settings.steps + 1):
        starts = batch_starts(settings, len(data.train), step - 1)
        device_loss = train_step(model, optimizer, tokens, starts, window=settings.window)
        if step % log_every == 0 or step in (first + 1, settings.steps):
            loss, now = float(device_loss), time.perf_counter()
            speed = (step - counted) * settings.tokens_per_step / (now - clock)
            print(f"step {step:5d}  loss {loss:.4f}  {speed:,.0f} tokens/s", flush=True)
            clock, counted = time.perf_counter(), step
        if step % settings.checkpoint_every == 0 or step == settings.steps:
            nll = held_out_nll(model, data.held_out, window=settings.window, batch_size=settings.batch_size)
            bits = bits_per_byte(nll, data.facts["held_out_bytes"])
            checkpoints.save(step, model, optimizer, bits)
            print(f"step {step:5d}  held-out {bits:.4f} bits per byte", flush=True)
            clock, counted = time.perf_counter(), step
    return loss, speed
