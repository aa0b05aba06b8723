"""Adding a model: a class of your own serves checkpoints of an architecture that vjax does not know.

    python examples/add_model.py [--model FOLDER_OR_HUB_ID]    (a Llama)

Three things may differ from the decoder that all models share, and here all do: what config.json says, what tensors are
called, what is computed. The checkpoint is made here from the bundled model, renamed and with another architecture.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import jax
from safetensors.numpy import load_file, save_file

from vjax import LLM, ModelLoadError, ModelRegistry, SamplingParams
from vjax.models.arch import ArchConfig
from vjax.models.decoder import DecoderModel
from vjax.models.fields import positive_number
from vjax.models.hf_config import decoder_arch
from vjax.models.weight_rules import DECODER_RULES
from vjax.weights.hub import resolve_model_path

RENAMED = ("model.layers.", "decoder.blocks.")


@dataclasses.dataclass(frozen=True)
class SharpArch(ArchConfig):
    logits_scaling: float = 1.0


class SharpForCausalLM(DecoderModel):
    """Llama, but for the names of its tensors and for logits that are divided by a number in config.json."""

    arch: SharpArch
    weight_rules = tuple(
        dataclasses.replace(rule, sources=tuple(source.replace(*RENAMED) for source in rule.sources))
        for rule in DECODER_RULES
    )

    @staticmethod
    def arch_config(config: dict[str, Any]) -> ArchConfig:
        return SharpArch(**vars(decoder_arch(config)), logits_scaling=positive_number(config, "logits_scaling", 1.0))

    def logits(self, hidden_normed: jax.Array) -> jax.Array:
        return super().logits(hidden_normed) / self.arch.logits_scaling


def write_checkpoint(source: Path, folder: Path) -> None:
    shutil.copytree(source, folder, dirs_exist_ok=True)
    config = json.loads((source / "config.json").read_text())
    config |= {"architectures": ["SharpForCausalLM"], "logits_scaling": 0.5}
    (folder / "config.json").write_text(json.dumps(config))
    tensors = load_file(source / "model.safetensors")
    save_file({name.replace(*RENAMED): tensor for name, tensor in tensors.items()}, folder / "model.safetensors")


def main(model: str = "vjax-tiny") -> None:
    prompt, params = "class Stack:\n", SamplingParams(temperature=1.0, seed=0, max_tokens=32)
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(resolve_model_path(model), Path(folder))
        try:
            LLM(folder)
        except ModelLoadError as error:
            print(f"Before: {error}\n")
        ModelRegistry.register_model("SharpForCausalLM", SharpForCausalLM)
        with LLM(folder) as llm:
            own = llm.generate(prompt, params, use_tqdm=False)[0].outputs[0]
    print(f"After, at temperature 1:\n{prompt}{own.text}\n")

    # Logits divided by 0.5 are those of temperature 0.5: the same seed has to draw the same tokens.
    params.temperature = 0.5
    with LLM(model) as llm:
        same = llm.generate(prompt, params, use_tqdm=False)[0].outputs[0]
    print(f"{model} draws the same tokens at temperature 0.5: {same.token_ids == own.token_ids}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vjax-tiny", help="default: the bundled model")
    main(parser.parse_args().model)
