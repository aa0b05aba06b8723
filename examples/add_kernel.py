"""Adding a kernel: a Pallas kernel of your own, checked against its definition, then run inside the engine.

    python examples/add_kernel.py [--model FOLDER_OR_HUB_ID]    (a Llama)

On the CPU the kernel runs in Pallas' interpreter; on a GPU Pallas compiles it, by way of Triton. The class that calls
it is registered in place of vjax's own Llama, so every Llama checkpoint gets it. pallas_kernels/README.md says how
vjax's own kernels are built.
"""

from __future__ import annotations

import argparse
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from vjax import LLM, ModelRegistry, SamplingParams
from vjax.layers.linear import matmul
from vjax.layers.mlp import GatedMLP
from vjax.models.llama import LlamaForCausalLM


def swiglu_reference(gate_up: jax.Array) -> jax.Array:
    """The definition: gate and up `[T, 2, ffn]` -> silu(gate) * up `[T, ffn]`, computed in float32."""
    gate, up = gate_up[:, 0].astype(jnp.float32), gate_up[:, 1].astype(jnp.float32)
    return (jax.nn.silu(gate) * up).astype(gate_up.dtype)


def swiglu_kernel(gate_up_ref, out_ref) -> None:
    """A program of the grid: some columns of a token, `[2, columns]` -> `[columns]`."""
    gate, up = gate_up_ref[0].astype(jnp.float32), gate_up_ref[1].astype(jnp.float32)
    out_ref[...] = (gate / (1.0 + jnp.exp(-gate)) * up).astype(out_ref.dtype)


def swiglu(gate_up: jax.Array) -> jax.Array:
    """What `swiglu_reference` defines, as a kernel."""
    num_tokens, _, ffn = gate_up.shape
    columns = math.gcd(ffn, 1024)  # a power of two, as Triton wants it
    return pl.pallas_call(
        swiglu_kernel,
        grid=(num_tokens, ffn // columns),
        in_specs=[pl.BlockSpec((None, 2, columns), lambda token, piece: (token, 0, piece))],
        out_specs=pl.BlockSpec((None, columns), lambda token, piece: (token, piece)),
        out_shape=jax.ShapeDtypeStruct((num_tokens, ffn), gate_up.dtype),
        interpret=jax.default_backend() == "cpu",
    )(gate_up)


class KernelMLP(GatedMLP):
    """vjax's feed-forward layer, with the kernel between its two products."""

    def __call__(self, x: jax.Array, vectors: dict[str, jax.Array], implementation: str) -> jax.Array:
        if "gate_up_bias" in vectors:
            return super().__call__(x, vectors, implementation)
        hidden, two, ffn = self.gate_up.shape
        gate_up = matmul(x, self.gate_up[...].reshape(hidden, two * ffn), implementation).reshape(-1, two, ffn)
        return matmul(swiglu(gate_up), self.down[...], implementation)


class KernelLlama(LlamaForCausalLM):
    def __init__(self, arch, *, dtype, rngs, **options):
        super().__init__(arch, dtype=dtype, rngs=rngs, **options)
        for layer in self.layers:
            layer.mlp = KernelMLP(arch, dtype=dtype, rngs=rngs)


def generate(model: str):
    with LLM(model) as llm:
        params = SamplingParams(temperature=0.0, max_tokens=32)
        return llm.generate("def read_lines(path):\n", params, use_tqdm=False)[0].outputs[0]


def main(model: str = "vjax-tiny") -> None:
    before = generate(model)

    gate_up = jax.random.normal(jax.random.key(0), (5, 2, 256))
    error = jnp.max(jnp.abs(swiglu(gate_up) - swiglu_reference(gate_up)))
    print(f"kernel against its reference: largest difference {error:.1e}")

    ModelRegistry.register_model("LlamaForCausalLM", KernelLlama)
    after = generate(model)
    print(f"with the kernel in every layer:\n{after.text}")
    print(f"the same tokens as before: {after.token_ids == before.token_ids}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vjax-tiny", help="default: the bundled model")
    main(parser.parse_args().model)
