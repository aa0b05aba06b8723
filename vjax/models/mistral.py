"""Mistral 7B and the checkpoints that use its architecture."""

from __future__ import annotations

from typing import Any

from vjax.models.arch import ArchConfig
from vjax.models.decoder import DecoderModel
from vjax.models.fields import positive_int
from vjax.models.hf_config import decoder_arch, refuse_set
from vjax.models.weight_rules import DECODER_RULES


class MistralForCausalLM(DecoderModel):
    """Llama with one sliding window in all layers (v0.1; later releases set it to null)."""

    weight_rules = DECODER_RULES

    @staticmethod
    def arch_config(config: dict[str, Any]) -> ArchConfig:
        refuse_set(config, ("attention_bias", "mlp_bias", "layer_types"))
        # A config that leaves the key out means transformers' default; null means full attention.
        has_window = config.get("sliding_window", 4096) is not None
        window = positive_int(config, "sliding_window", 4096) if has_window else None
        num_layers = positive_int(config, "num_hidden_layers")
        return decoder_arch(config, sliding_windows=(window,) * num_layers, default_num_kv_heads=8)
