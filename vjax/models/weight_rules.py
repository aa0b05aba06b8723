"""How checkpoint tensors become leaves, as data. No jax."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class WeightRule:
    """One leaf of the model, or one per layer.

    `{layer}` in `leaf` stands for each layer's number: one leaf per layer. `{layer}` in `sources` only: the leaf stacks
    all layers on a leading axis. A rule whose leaf the model does not have (a bias, an untied head) does not count.
    """

    leaf: str
    #: How `sources` are joined: a key of `vjax.weights.packing.PACKERS`.
    packing: str
    #: Checkpoint tensor names in the order that the packing takes them.
    sources: tuple[str, ...]


_ATTENTION = "model.layers.{layer}.self_attn"
_MLP = "model.layers.{layer}.mlp"

#: Names that Llama introduced and that Mistral, Qwen2 and Qwen3 kept.
DECODER_RULES = (
    WeightRule("embed", "copy", ("model.embed_tokens.weight",)),
    WeightRule("lm_head", "copy", ("lm_head.weight",)),
    WeightRule("norm", "copy", ("model.norm.weight",)),
    WeightRule("vectors.attention_norm", "copy", ("model.layers.{layer}.input_layernorm.weight",)),
    WeightRule("vectors.mlp_norm", "copy", ("model.layers.{layer}.post_attention_layernorm.weight",)),
    WeightRule(
        "layers.{layer}.attention.qkv",
        "qkv",
        (f"{_ATTENTION}.q_proj.weight", f"{_ATTENTION}.k_proj.weight", f"{_ATTENTION}.v_proj.weight"),
    ),
    WeightRule("layers.{layer}.attention.o", "attention_output", (f"{_ATTENTION}.o_proj.weight",)),
    WeightRule("layers.{layer}.mlp.gate_up", "gate_up", (f"{_MLP}.gate_proj.weight", f"{_MLP}.up_proj.weight")),
    WeightRule("layers.{layer}.mlp.down", "transpose", (f"{_MLP}.down_proj.weight",)),
)

QKV_BIAS_RULES = (
    WeightRule(
        "vectors.qkv_bias",
        "qkv_bias",
        (f"{_ATTENTION}.q_proj.bias", f"{_ATTENTION}.k_proj.bias", f"{_ATTENTION}.v_proj.bias"),
    ),
)

OUTPUT_BIAS_RULES = (WeightRule("vectors.o_bias", "copy", (f"{_ATTENTION}.o_proj.bias",)),)

MLP_BIAS_RULES = (
    WeightRule("vectors.gate_up_bias", "gate_up_bias", (f"{_MLP}.gate_proj.bias", f"{_MLP}.up_proj.bias")),
    WeightRule("vectors.down_bias", "copy", (f"{_MLP}.down_proj.bias",)),
)

#: Heads of models that pool, by `ArchConfig.head`; transformers and Qwen2's reward models call them so.
POOLING_HEAD_RULES: dict[str, tuple[WeightRule, ...]] = {
    "lm": (),
    "none": (),
    "score": (WeightRule("score", "copy", ("score.weight",)),),
    "score_mlp": (
        WeightRule("score_hidden", "copy", ("score.0.weight",)),
        WeightRule("score_hidden_bias", "copy", ("score.0.bias",)),
        WeightRule("score", "copy", ("score.2.weight",)),
        WeightRule("score_bias", "copy", ("score.2.bias",)),
    ),
}

QK_NORM_RULES = (
    WeightRule("vectors.q_norm", "copy", (f"{_ATTENTION}.q_norm.weight",)),
    WeightRule("vectors.k_norm", "copy", (f"{_ATTENTION}.k_norm.weight",)),
)
