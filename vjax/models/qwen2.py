"""Qwen2 and Qwen2.5 (dense)."""

from __future__ import annotations

from typing import Any

from vjax.models.arch import ArchConfig
from vjax.models.decoder import DecoderModel
from vjax.models.hf_config import decoder_arch, layer_windows, refuse_set
from vjax.models.weight_rules import DECODER_RULES, QKV_BIAS_RULES


class Qwen2ForCausalLM(DecoderModel):
    """Llama with biases on q, k and v, and an optional sliding window in the upper layers."""

    weight_rules = DECODER_RULES + QKV_BIAS_RULES

    @staticmethod
    def arch_config(config: dict[str, Any]) -> ArchConfig:
        refuse_set(config, ("mlp_bias", "use_mrope"))
        return decoder_arch(config, sliding_windows=layer_windows(config), default_num_kv_heads=32, qkv_bias=True)
