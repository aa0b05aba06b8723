"""KV cache bookkeeping on the host: blocks, their content hashes, and who holds them. No jax."""
