"""Llama 1, 2, 3, 3.1 and later text models, and the many checkpoints that use their architecture."""

from __future__ import annotations

from typing import Any

from vjax.models.arch import ArchConfig
from vjax.models.decoder import DecoderModel
from vjax.models.hf_config import decoder_arch, refuse_set
from vjax.models.weight_rules import DECODER_RULES, MLP_BIAS_RULES, OUTPUT_BIAS_RULES, QKV_BIAS_RULES


class LlamaForCausalLM(DecoderModel):
    """The shared decoder as it is; `attention_bias` and `mlp_bias` add biases."""

    weight_rules = DECODER_RULES + QKV_BIAS_RULES + OUTPUT_BIAS_RULES + MLP_BIAS_RULES

    @staticmethod
    def arch_config(config: dict[str, Any]) -> ArchConfig:
        refuse_set(config, ("sliding_window", "layer_types"))
        attention_bias = bool(config.get("attention_bias", False))
        return decoder_arch(
            config,
            qkv_bias=attention_bias,
            o_bias=attention_bias,
            mlp_bias=bool(config.get("mlp_bias", False)),
        )
