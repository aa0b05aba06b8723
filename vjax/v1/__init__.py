"""V1 under the import path that vLLM users know."""
