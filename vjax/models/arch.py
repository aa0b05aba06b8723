"""What the engine knows about a model's architecture. Plain Python, no jax."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding.

    `rope_type` selects the fields that count: linear and dynamic use `factor`; llama3 uses `factor`,
    `low_freq_factor`, `high_freq_factor` and `original_max_position_embeddings`; yarn uses `factor`,
    `original_max_position_embeddings` and the fields from `attention_factor` on.
    """

    #: "default" | "linear" | "dynamic" | "llama3" | "yarn"
    rope_type: str = "default"
    theta: float = 10000.0
    factor: float = 1.0
    original_max_position_embeddings: int | None = None
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    #: Multiplies cos and sin. None: computed from factor, mscale and mscale_all_dim.
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True


@dataclass(frozen=True)
class ArchConfig:
    """Everything a decoder needs, hashable, so that it can be a static part of a compiled function."""

    #: Hugging Face class name, e.g. "LlamaForCausalLM".
    architecture: str
    model_type: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    rms_norm_eps: float
    rope: RopeConfig
    tie_word_embeddings: bool
    max_position_embeddings: int
    #: Per layer: position p attends to the keys in (p - window, p]; None is full attention.
    sliding_windows: tuple[int | None, ...]
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    #: RMS norm over head_dim of each query and key head, before rope.
    qk_norm: bool = False
    #: The dtype that config.json names, e.g. "bfloat16"; None when it names none.
    torch_dtype: str | None = None
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    #: What follows the final norm: "lm" (logits over the vocabulary), or, of a model that pools, "none" (hidden states
    #: are its results), "score" (a linear layer to num_labels) or "score_mlp" (two, with a ReLU between them).
    head: str = "lm"
    #: Outputs of a score head.
    num_labels: int = 0

    @property
    def heads_per_kv(self) -> int:
        """Query heads that share one key/value head (the group)."""
        return self.num_heads // self.num_kv_heads

    @property
    def pools(self) -> bool:
        """Its results are vectors of prompts, not tokens."""
        return self.head != "lm"

    @property
    def pooled_width(self) -> int:
        """Numbers that a model that pools gives for a token."""
        return self.hidden_size if self.head == "none" else self.num_labels

    @property
    def attention_scale(self) -> float:
        return self.head_dim**-0.5

    @property
    def max_context_len(self) -> int:
        """Longest context in tokens for which the rope is defined.

        As vLLM derives it, except that dynamic scaling keeps `max_position_embeddings`: beyond it the frequencies
        would depend on the length of each sequence, which a cache of rotated keys cannot follow.
        """
        if self.rope.rope_type == "linear":
            return int(self.max_position_embeddings * self.rope.factor)
        if self.rope.rope_type == "yarn" and self.rope.original_max_position_embeddings:
            return int(self.rope.original_max_position_embeddings * self.rope.factor)
        return self.max_position_embeddings
