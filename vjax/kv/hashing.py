"""Content hashes of KV blocks.

The KV of a block depends on its tokens and on everything before them, so a block's hash chains its parent's
(vLLM's automatic prefix caching). Equal hashes mean equal KV as long as sha256 has no collision.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from hashlib import sha256

from vjax.request import Request

#: Stands for the parent of a first block.
ROOT_HASH = bytes(32)


def encode_tokens(token_ids: Sequence[int]) -> bytes:
    """int64, little-endian: 8 bytes a token."""
    return struct.pack(f"<{len(token_ids)}q", *token_ids)


def hash_block(parent: bytes | None, tokens: bytes, extra: tuple[str, ...] | None) -> bytes:
    """Hash of one full block.

    Args:
        parent: Hash of the block before it; None for the first one.
        tokens: The block's tokens, as `encode_tokens` gives them.
        extra: What else the KV depends on, such as `("cache_salt", salt)`; it reaches later blocks through the chain.

    Returns:
        sha256 (32 bytes) of parent, number of tokens (int64), tokens, then each extra string after its length: no two
        different arguments have the same encoding.
    """
    encoded = (parent or ROOT_HASH) + (len(tokens) // 8).to_bytes(8, "little") + tokens
    for text in extra or ():
        utf8 = text.encode("utf-8", "surrogatepass")
        encoded += struct.pack("<q", len(utf8)) + utf8
    return sha256(encoded).digest()


def extend_block_hashes(request: Request, block_size: int, num_blocks: int | None = None) -> None:
    """Appends to `request.block_hashes` the hashes of the full blocks of `request.token_ids` that lack one, of the
    first `num_blocks` if it is given."""
    hashes = request.block_hashes
    done = len(hashes) * block_size
    full = len(request.token_ids) // block_size
    end = (full if num_blocks is None else min(full, num_blocks)) * block_size
    if done >= end:
        return
    # Encoded at once: a prompt of 4,000 tokens has 260 blocks.
    tokens = encode_tokens(request.token_ids[done:end])
    width, parent = 8 * block_size, hashes[-1] if hashes else ROOT_HASH
    if not done and request.cache_salt is not None:
        parent = hash_block(None, tokens[:width], ("cache_salt", request.cache_salt))
        hashes.append(parent)
        tokens = tokens[width:]
    # `hash_block` without extra strings, written out: a call for each block is most of what a long prompt takes.
    num_tokens = block_size.to_bytes(8, "little")
    for start in range(0, len(tokens), width):
        parent = sha256(parent + num_tokens + tokens[start : start + width]).digest()
        hashes.append(parent)
