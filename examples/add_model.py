"""Adding a model: a class of your own serves checkpoints of an architecture that vjax does not know.

    python examples/add_model.py [--model FOLDER_OR_HUB_ID]    (a Llama in one file, from which the checkpoint is made)

It differs from Llama in all that may differ: a number in config.json, the names of tensors, and what is computed.
"""

import argparse
import json
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

from safetensors.numpy import load_file, save_file

from vjax import LLM, ModelLoadError, ModelRegistry, SamplingParams
from vjax.models.arch import ArchConfig
from vjax.models.llama import LlamaForCausalLM as Llama
from vjax.weights.hub import resolve_model_path


@dataclass(frozen=True)
class SharpArch(ArchConfig):
    logits_scaling: float = 1.0


class SharpForCausalLM(Llama):
    arch: SharpArch
    weight_rules = tuple(replace(rule, sources=tuple("my." + s for s in rule.sources)) for rule in Llama.weight_rules)

    @staticmethod
    def arch_config(config):
        return SharpArch(**vars(Llama.arch_config(config)), logits_scaling=config["logits_scaling"])

    def logits(self, hidden_normed):
        return super().logits(hidden_normed) / self.arch.logits_scaling


def main(model="vjax-tiny"):
    source = resolve_model_path(model)
    config = json.loads((source / "config.json").read_text())
    config |= {"architectures": ["SharpForCausalLM"], "logits_scaling": 0.5}
    tensors = {"my." + name: tensor for name, tensor in load_file(source / "model.safetensors").items()}
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(config))
        save_file(tensors, Path(folder, "model.safetensors"))
        try:
            LLM(folder, tokenizer=model)
        except ModelLoadError as error:
            print(f"Before: {error}\n")
        ModelRegistry.register_model("SharpForCausalLM", SharpForCausalLM)
        with LLM(folder, tokenizer=model) as llm:
            output = llm.generate("class Stack:\n", SamplingParams(seed=0, max_tokens=32), use_tqdm=False)[0]
    print(f"After:\n{output.prompt}{output.outputs[0].text}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vjax-tiny", help="default: the bundled model")
    main(parser.parse_args().model)
