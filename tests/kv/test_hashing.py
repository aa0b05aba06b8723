from __future__ import annotations

import hashlib

from tests.scheduler.simulation import make_request
from vjax.kv.hashing import encode_tokens, extend_block_hashes, hash_block
from vjax.request import Request


def request(prompt: list[int], salt: str | None = None) -> Request:
    return Request.from_engine_request(make_request("r", prompt, salt=salt), max_model_len=1000)


def hashes(prompt: list[int], salt: str | None = None, block_size: int = 4) -> list[bytes]:
    r = request(prompt, salt)
    extend_block_hashes(r, block_size)
    return r.block_hashes


def test_encoding_is_fixed() -> None:
    words = [2, 7, 2**40]
    encoded = bytes(32) + b"".join(w.to_bytes(8, "little") for w in words)
    assert hash_block(None, encode_tokens((7, 2**40)), None) == hashlib.sha256(encoded).digest()


def test_every_argument_counts() -> None:
    base = hash_block(b"p" * 32, encode_tokens((1, 2, 3)), ("cache_salt", "x"))
    others = [
        hash_block(None, encode_tokens((1, 2, 3)), ("cache_salt", "x")),
        hash_block(b"q" * 32, encode_tokens((1, 2, 3)), ("cache_salt", "x")),
        hash_block(b"p" * 32, encode_tokens((1, 3, 2)), ("cache_salt", "x")),
        hash_block(b"p" * 32, encode_tokens((1, 2)), ("cache_salt", "x")),
        hash_block(b"p" * 32, encode_tokens((1, 2, 3)), None),
        hash_block(b"p" * 32, encode_tokens((1, 2, 3)), ("cache_sal", "tx")),
        hash_block(b"p" * 32, encode_tokens((1, 2, 3)), ("cache_salt", "x", "")),
        hash_block(b"p" * 32, encode_tokens((1, 2, 3)), ("cache_salt", "\udcff")),
    ]
    assert len({base, *others}) == len(others) + 1


def test_only_full_blocks_are_hashed_and_prefixes_agree() -> None:
    prompt = list(range(11))
    assert len(hashes(prompt)) == 2
    assert len(hashes(prompt[:3])) == 0
    assert hashes(prompt[:8]) == hashes(prompt)
    assert hashes([*prompt[:7], 99])[0] == hashes(prompt)[0]
    assert hashes([*prompt[:7], 99])[1] != hashes(prompt)[1]


def test_equal_blocks_behind_different_prefixes_differ() -> None:
    assert hashes([1, 1, 1, 1, 5, 6, 7, 8])[1] != hashes([2, 2, 2, 2, 5, 6, 7, 8])[1]


def test_salt_reaches_every_block() -> None:
    prompt = list(range(8))
    for index in range(2):
        assert len({hashes(prompt)[index], hashes(prompt, "a")[index], hashes(prompt, "b")[index]}) == 3
    assert hashes(prompt, "") != hashes(prompt)


def test_extending_in_steps_gives_the_same() -> None:
    tokens = list(range(50))
    r = request(tokens[:1])
    for token in tokens[1:]:
        r.token_ids.append(token)
        extend_block_hashes(r, 4)
    assert r.block_hashes == hashes(tokens)
