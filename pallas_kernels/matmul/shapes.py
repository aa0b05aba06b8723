"""Named products: (K, N) of real models and rows of real steps."""

from __future__ import annotations

PRODUCTS = {
    "llama3_8b qkv": (4096, 6144),
    "llama3_8b o": (4096, 4096),
    "llama3_8b down": (14336, 4096),
    "llama2_7b qkv": (4096, 12288),
    "llama2_7b down": (11008, 4096),
}
ROWS = (8, 16, 32, 48, 64, 128, 192, 256, 320, 384, 448, 512, 640, 768, 896, 1024)
#: (K, N) of silu(x @ gate) * (x @ up), each of the two [K, N].
GATED_PRODUCTS = {"llama3_8b": (4096, 14336), "llama2_7b": (4096, 11008)}
GATED_ROWS = (*ROWS, 2048, 4096, 8192, 16384)
