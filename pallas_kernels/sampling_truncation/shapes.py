"""Vocabulary sizes of real models."""

from __future__ import annotations

VOCABS = {"llama2": 32000, "gpt2": 50257, "llama3": 128256, "qwen2": 151936}
