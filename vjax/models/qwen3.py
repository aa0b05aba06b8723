"""Qwen3 (dense)."""

from __future__ import annotations

from typing import Any

from vjax.models.arch import ArchConfig
from vjax.models.decoder import DecoderModel
from vjax.models.hf_config import decoder_arch, layer_windows, refuse_set
from vjax.models.weight_rules import DECODER_RULES, OUTPUT_BIAS_RULES, QK_NORM_RULES, QKV_BIAS_RULES


class Qwen3ForCausalLM(DecoderModel):
    """Llama with a norm on each query and key head; no biases unless `attention_bias` asks for them."""

    weight_rules = DECODER_RULES + QK_NORM_RULES + QKV_BIAS_RULES + OUTPUT_BIAS_RULES

    @staticmethod
    def arch_config(config: dict[str, Any]) -> ArchConfig:
        refuse_set(config, ("mlp_bias",))
        attention_bias = bool(config.get("attention_bias", False))
        return decoder_arch(
            config,
            sliding_windows=layer_windows(config),
            default_num_kv_heads=32,
            default_head_dim=128,
            qk_norm=True,
            qkv_bias=attention_bias,
            o_bias=attention_bias,
        )
