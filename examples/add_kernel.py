"""Adding a kernel: a Pallas kernel of your own, checked against its definition, then run inside the engine.

    python examples/add_kernel.py [--model FOLDER_OR_HUB_ID]    (a Llama; on a GPU its hidden_size is a power of two)

On the CPU the kernel runs in Pallas' interpreter; on a GPU Pallas compiles it, by way of Triton.
"""

import argparse
from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from vjax import LLM, ModelRegistry, SamplingParams
from vjax.layers.norm import rms_norm as rms_norm_definition
from vjax.models.llama import LlamaForCausalLM


def rms_norm_kernel(x_ref, weight_ref, out_ref, *, eps):
    """A program of the grid: one token's hidden state `[hidden]`, divided by its root mean square, times the weight."""
    x, weight = x_ref[...].astype(jnp.float32), weight_ref[...].astype(jnp.float32)
    out_ref[...] = (x * jax.lax.rsqrt(jnp.mean(x * x) + eps) * weight).astype(out_ref.dtype)


def rms_norm(x, weight, eps):
    row = pl.BlockSpec((None, x.shape[1]), lambda token: (token, 0))
    return pl.pallas_call(
        partial(rms_norm_kernel, eps=eps),
        grid=x.shape[:1],
        in_specs=[row, pl.BlockSpec(weight.shape, lambda token: (0,))],
        out_specs=row,
        out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
        interpret=jax.default_backend() == "cpu",
    )(x, weight)


class KernelLlama(LlamaForCausalLM):
    def final_norm(self, hidden):
        return rms_norm(hidden, self.norm[...], self.arch.rms_norm_eps)


def main(model="vjax-tiny"):
    params, completions = SamplingParams(temperature=0.0, max_tokens=32), []
    for with_kernel in False, True:
        if with_kernel:
            ModelRegistry.register_model("LlamaForCausalLM", KernelLlama)  # from now on it serves every Llama
        with LLM(model) as llm:
            completions += llm.generate("def read_lines(path):\n", params, use_tqdm=False)[0].outputs
    x, weight = jax.random.normal(jax.random.key(0), (5, 256)), jnp.linspace(0.5, 1.5, 256)
    error = jnp.max(jnp.abs(rms_norm(x, weight, 1e-5) - rms_norm_definition(x, weight, 1e-5)))
    print(f"kernel against its definition: largest difference {error:.1e}")
    print(f"with the kernel in the model:\n{completions[1].text}")
    print(f"the same tokens as before: {completions[1].token_ids == completions[0].token_ids}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vjax-tiny", help="default: the bundled model")
    main(parser.parse_args().model)
