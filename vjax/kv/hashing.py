"""Content hashes of KV blocks.

The KV of a block depends on its tokens and on everything before them, so a block's hash chains its parent's
(vLLM's automatic prefix caching). Equal hashes mean equal KV as long as sha256 has no collision.
"""

from __future__ import annotations

import struct
from hashlib import sha256

from vjax.request import Request

#: Stands for the parent of a first block.
ROOT_HASH = bytes(32)


def hash_block(parent: bytes | None, token_ids: tuple[int, ...], extra: tuple[str, ...] | None) -> bytes:
    """Hash of one full block.

    Args:
        parent: Hash of the block before it; None for the first one.
        token_ids: The block's tokens.
        extra: What else the KV depends on, such as `("cache_salt", salt)`; it reaches later blocks through the chain.

    Returns:
        sha256 (32 bytes) of parent, number of tokens, tokens (int64, little-endian), then each extra string after its
        length: no two different arguments have the same encoding.
    """
    n = len(token_ids)
    encoded = (parent or ROOT_HASH) + struct.pack(f"<{n + 1}q", n, *token_ids)
    for text in extra or ():
        utf8 = text.encode("utf-8", "surrogatepass")
        encoded += struct.pack("<q", len(utf8)) + utf8
    return sha256(encoded).digest()


def extend_block_hashes(request: Request, block_size: int) -> None:
    """Appends to `request.block_hashes` the hashes of the full blocks of `request.token_ids` that lack one."""
    hashes = request.block_hashes
    token_ids = request.token_ids
    for start in range(len(hashes) * block_size, len(token_ids) - block_size + 1, block_size):
        first = start == 0
        extra = ("cache_salt", request.cache_salt) if first and request.cache_salt is not None else None
        parent = None if first else hashes[-1]
        hashes.append(hash_block(parent, tuple(token_ids[start : start + block_size]), extra))
