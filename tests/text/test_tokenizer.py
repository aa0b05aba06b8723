from __future__ import annotations

import json
import struct
import subprocess
import sys

import pytest
from tokenizers import AddedToken

from vjax.errors import ConfigError, VjaxValidationError
from vjax.text.load import load_tokenizer

SAMPLES = [
    "hello world",
    " leading and trailing ",
    "你好 😀 né w <|end|> x",
    "<s>[INST] hi [/INST]</s> y",
    "line\n\n  two\ttabs",
    "नमस्ते 👩‍👩‍👧",
]


@pytest.mark.parametrize("family", ["byte_level", "sentencepiece", "sentencepiece_no_strip", "metaspace"])
def test_encode_and_decode_equal_hugging_faces(family, save_tokenizer):
    from transformers import PreTrainedTokenizerFast

    eos = "<|end|>" if family == "byte_level" else "</s>"
    directory = save_tokenizer(family, eos_token=eos, clean_up_tokenization_spaces=True)
    theirs = PreTrainedTokenizerFast.from_pretrained(str(directory))
    ours = load_tokenizer(directory)
    assert (len(ours), ours.vocab_size) == (len(theirs), theirs.vocab_size)
    assert ours.get_vocab() == theirs.get_vocab()
    assert (ours.eos_token, ours.eos_token_id) == (theirs.eos_token, theirs.eos_token_id)
    assert ours.bos_token_id is theirs.bos_token_id is None
    for text in SAMPLES:
        for special in (True, False):
            ids = ours.encode(text, add_special_tokens=special)
            assert ids == theirs.encode(text, add_special_tokens=special)
            assert ours.decode(ids, special) == theirs.decode(ids, skip_special_tokens=special)
        assert ours.convert_ids_to_tokens(ids) == theirs.convert_ids_to_tokens(ids)


@pytest.mark.parametrize("family", ["byte_level", "sentencepiece", "metaspace"])
def test_the_end_of_a_text_as_hugging_face_encodes_it(family, save_tokenizer):
    from transformers import PreTrainedTokenizerFast

    directory = save_tokenizer(family)
    theirs = PreTrainedTokenizerFast.from_pretrained(str(directory), truncation_side="left")
    ours = load_tokenizer(directory)
    for text in SAMPLES:
        for special in (True, False):
            whole = ours.encode(text, special)
            for length in (2, 3, 5, len(whole) - 1, len(whole), 100):
                ids = theirs.encode(text, add_special_tokens=special, truncation=True, max_length=length)
                assert ours.encode(text, special, max_length=length) == ids
            assert ours.encode(text, special) == whole
            assert ours.encode(text, special, max_length=1) == whole[-1:]  # no room for BOS


def test_post_processor_adds_bos(byte_level_dir):
    tokenizer = load_tokenizer(byte_level_dir)
    ids = tokenizer.encode("hello")
    assert ids[0] == tokenizer.bos_token_id
    assert ids[1:] == tokenizer.encode("hello", add_special_tokens=False)
    assert tokenizer("hello") == {"input_ids": ids, "attention_mask": [1] * len(ids)}


@pytest.mark.parametrize("add_bos_token", [True, False])
def test_the_post_processor_of_tokenizer_json_decides_about_bos(add_bos_token, save_tokenizer):
    from transformers import PreTrainedTokenizerFast

    directory = save_tokenizer("sentencepiece", bos_token="<s>", add_bos_token=add_bos_token)
    theirs = PreTrainedTokenizerFast.from_pretrained(str(directory))
    assert load_tokenizer(directory).encode("hello") == theirs.encode("hello")


def test_truncation_and_padding_of_tokenizer_json_are_off(byte_level_dir):
    spec = json.loads((byte_level_dir / "tokenizer.json").read_text())
    spec["truncation"] = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    (byte_level_dir / "tokenizer.json").write_text(json.dumps(spec))
    assert len(load_tokenizer(byte_level_dir).encode("hello world, this is a test")) > 3


def test_tokens_that_only_the_config_knows(save_tokenizer):
    from transformers import PreTrainedTokenizerFast

    added = AddedToken("<|tool|>", special=True, normalized=False).__getstate__()
    number = len(load_tokenizer(save_tokenizer("byte_level")))
    directory = save_tokenizer(
        "byte_level",
        added_tokens_decoder={str(number): added},
        eos_token={"__type": "AddedToken", "content": "<|stop|>", "lstrip": False, "rstrip": False},
        additional_special_tokens=["<|more|>"],
    )
    theirs = PreTrainedTokenizerFast.from_pretrained(str(directory))
    ours = load_tokenizer(directory)
    text = "x<|tool|>y<|stop|>z<|more|>"
    assert ours.encode(text) == theirs.encode(text)
    assert ours.decode(ours.encode(text)) == "xyz"
    assert ours.eos_token_id == theirs.eos_token_id == number + 1
    assert {"<|tool|>", "<|stop|>", "<|more|>"} <= set(ours.all_special_tokens)


def test_special_tokens_map_is_read(save_tokenizer):
    directory = save_tokenizer("sentencepiece")
    (directory / "special_tokens_map.json").write_text(
        json.dumps({"bos_token": "<s>", "eos_token": {"content": "</s>"}})
    )
    tokenizer = load_tokenizer(directory)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)


def test_model_dir_is_the_default(byte_level_dir):
    assert load_tokenizer(None, model_dir=byte_level_dir).encode("a") == load_tokenizer(byte_level_dir).encode("a")
    assert load_tokenizer(byte_level_dir / "tokenizer.json").eos_token == "<|end|>"


def test_errors(tmp_path, byte_level_dir):
    with pytest.raises(ConfigError, match="no such directory"):
        load_tokenizer(tmp_path / "absent")
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ConfigError, match=r"holds no tokenizer.*skip_tokenizer_init"):
        load_tokenizer(empty)
    with pytest.raises(ConfigError, match="neither a local directory nor"):
        load_tokenizer("no-such-organisation/no-such-model")
    with pytest.raises(VjaxValidationError, match="must be a str, not int"):
        load_tokenizer(byte_level_dir).encode(3)  # type: ignore[arg-type]
    with pytest.raises(VjaxValidationError, match="lone surrogate"):
        load_tokenizer(byte_level_dir).encode("x\ud800")
    (byte_level_dir / "tokenizer_config.json").write_text("{")
    with pytest.raises(ConfigError, match="not valid JSON"):
        load_tokenizer(byte_level_dir)
    (byte_level_dir / "tokenizer_config.json").write_text("{}")
    (byte_level_dir / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_tokenizer(byte_level_dir)


def test_without_tokenizer_json_transformers_reads_it(tmp_path, byte_level_dir):
    from vjax.text.hf_tokenizer import load_with_transformers

    fast = load_tokenizer(byte_level_dir)
    slow = load_with_transformers(byte_level_dir)
    assert slow.encode("hello 你好") == fast.encode("hello 你好")
    assert slow.eos_token_id == fast.eos_token_id
    assert slow.chat_template == fast.chat_template
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "tokenizer.model").write_bytes(b"not a model")
    with pytest.raises(ConfigError, match="transformers cannot read"):
        load_tokenizer(broken)


def test_neither_transformers_nor_torch_is_imported(byte_level_dir):
    code = (
        "import sys; from vjax.text.load import load_tokenizer; import vjax.text.detokenizer, vjax.text.chat\n"
        f"t = load_tokenizer({str(byte_level_dir)!r}); t.encode('x')\n"
        "vjax.text.chat.render_chat(t, [{'role': 'user', 'content': 'x'}])\n"
        "print([m for m in ('transformers', 'torch', 'jax', 'huggingface_hub') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_a_tokenizer_that_only_transformers_runs():
    from transformers import ByT5Tokenizer

    from vjax.text.hf_tokenizer import SlowTokenizer

    loaded = ByT5Tokenizer()
    tokenizer = SlowTokenizer(loaded, {"eos_token": "</s>"}, {}, "byt5")
    text = "héllo 你好 😀"
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert ids == loaded.encode(text, add_special_tokens=False)
    assert tokenizer.decode(ids) == text
    assert tokenizer.encode(text, max_length=5) == [*ids[-4:], loaded.eos_token_id]
    assert tokenizer.encode(text, False, max_length=5) == ids[-5:] and tokenizer.encode(text, False, 100) == ids
    assert (len(tokenizer), tokenizer.eos_token_id, tokenizer.is_fast) == (len(loaded), loaded.eos_token_id, False)
    assert set(tokenizer.all_special_ids) == set(loaded.all_special_ids)
    stream = tokenizer.decode_stream(tokenizer.encode("before"))
    pieces = [stream.push(i) for i in ids]
    assert "".join(pieces) + stream.flush() == text
    assert "\ufffd" not in "".join(pieces)


# ---- sentencepiece files ------------------------------------------------------------------------------------------


def sentencepiece_model() -> bytes:
    """A byte-fallback BPE vocabulary as sentencepiece writes it: a protocol buffer of pieces and settings."""

    def varint(n: int) -> bytes:
        return bytes([n & 127 | 128]) + varint(n >> 7) if n > 127 else bytes([n])

    def message(field: int, content: bytes) -> bytes:
        return varint(field << 3 | 2) + varint(len(content)) + content

    def number(field: int, value: int) -> bytes:
        return varint(field << 3) + varint(value)

    normal, unknown, control, byte = 1, 2, 3, 6
    pieces = [("<unk>", 0, unknown), ("<s>", 0, control), ("</s>", 0, control)]
    pieces += [(f"<0x{b:02X}>", 0, byte) for b in range(256)]
    merged = ["▁h", "el", "lo", "▁hel", "▁hello", "▁w", "or", "ld", "▁wor", "▁world", *"▁helowrd"]
    pieces += [(piece, -i, normal) for i, piece in enumerate(merged)]
    listed = [
        message(1, message(1, piece.encode()) + varint(2 << 3 | 5) + struct.pack("<f", score) + number(3, kind))
        for piece, score, kind in pieces
    ]
    bpe, byte_fallback, ids = number(3, 2), number(35, 1), number(40, 0) + number(41, 1) + number(42, 2)
    normaliser = message(1, b"identity") + number(3, 1) + number(4, 0)
    return b"".join(listed) + message(2, bpe + byte_fallback + ids) + message(3, normaliser)


@pytest.fixture
def sentencepiece_dir(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model())
    config = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"add_bos_token": True, "legacy": False}))
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    return tmp_path


def test_a_sentencepiece_file(sentencepiece_dir):
    pytest.importorskip("sentencepiece")
    tokenizer = load_tokenizer(sentencepiece_dir)
    ids = tokenizer.encode("hello world é")
    assert tokenizer.convert_ids_to_tokens(ids) == ["<s>", "▁hello", "▁world", "▁", "<0xC3>", "<0xA9>"]
    assert tokenizer.decode(ids) == "hello world é"
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, len(tokenizer)) == (1, 2, 277)
    stream = tokenizer.decode_stream([])
    assert "".join(stream.push(i) for i in ids[1:]) + stream.flush() == "hello world é"


def test_a_sentencepiece_file_without_its_library(sentencepiece_dir, monkeypatch):
    from transformers import AutoTokenizer

    from vjax.text import hf_tokenizer

    def fail(*_, **__):
        raise ValueError("`tiktoken` is required")

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", fail)
    monkeypatch.setattr(hf_tokenizer, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"sentencepiece, .* is not installed\. Run pip install 'vjax\["):
        load_tokenizer(sentencepiece_dir)
