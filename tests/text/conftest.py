"""Small tokenizers of the families that real checkpoints use, built on the spot."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers

from vjax.text.tokenizer import Tokenizer

TEXTS = [
    "hello world, this is a test. The quick brown fox jumps over the lazy dog!",
    "你好,世界。今天天气很好。",
    "😀😃 emoji 👩‍👩‍👧 and flags 🇩🇪",
    "привет мир, как дела? नमस्ते दुनिया",
    "def f(x):\n    return x + 1\n\n\nprint(f(2))",
]
TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] | trim }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


def _bpe(vocab_size: int, pre_tokenizer: object, alphabet: list[str]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    trained = tokenizers.Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizer
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False)
    trained.train_from_iterator(TEXTS * 5, trainer)
    model = json.loads(trained.to_str())["model"]
    return model["vocab"], [tuple(merge) for merge in model["merges"]]


def build_byte_level() -> tokenizers.Tokenizer:
    """As GPT-2, Llama 3, Qwen; merges cut through multi-byte characters."""
    pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    vocab, merges = _bpe(360, pre_tokenizer, pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges))
    backend.pre_tokenizer = pre_tokenizer
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(t, normalized=False) for t in ("<|bos|>", "<|end|>", "<|user|>")])
    backend.add_tokens([AddedToken("né w", normalized=False)])
    bos = backend.token_to_id("<|bos|>")
    backend.post_processor = processors.TemplateProcessing(single="<|bos|> $A", special_tokens=[("<|bos|>", bos)])
    return backend


def build_sentencepiece(strip: bool = True) -> tokenizers.Tokenizer:
    """As Llama 2 (or, without `strip`, Gemma): ▁ for spaces, byte fallback, the first space stripped by the decoder."""
    vocab, merges = _bpe(330, pre_tokenizers.Metaspace(), [])
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256))]
    # Without these characters the vocabulary needs its byte tokens.
    tokens += [t for t in sorted(vocab, key=vocab.__getitem__) if not set(t) & set("你😀мनः\n")]
    ids = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    merges = [m for m in merges if m[0] in ids and m[1] in ids and m[0] + m[1] in ids]
    backend = tokenizers.Tokenizer(
        models.BPE(vocab=ids, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    steps = [normalizers.Prepend("▁")] if strip else []
    backend.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    ends = [decoders.Strip(" ", 1, 0)] if strip else []
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *ends])
    backend.add_special_tokens([AddedToken(t, normalized=False) for t in ("<unk>", "<s>", "</s>")])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return backend


def build_metaspace() -> tokenizers.Tokenizer:
    """▁ for spaces, handled by the Metaspace decoder."""
    vocab, merges = _bpe(330, pre_tokenizers.Metaspace(), [])
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    backend.add_special_tokens([AddedToken(t, normalized=False) for t in ("<s>", "</s>")])
    return backend


def build_word_suffix() -> tokenizers.Tokenizer:
    """A decoder that no shortcut covers: words end in </w>."""
    vocab = {t: i for i, t in enumerate(["a", "b", "a</w>", "b</w>", "<s>"])}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[], end_of_word_suffix="</w>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.decoder = decoders.BPEDecoder()
    backend.add_special_tokens([AddedToken("<s>", normalized=False)])
    return backend


BUILDERS = {
    "byte_level": build_byte_level,
    "sentencepiece": build_sentencepiece,
    "sentencepiece_no_strip": lambda: build_sentencepiece(strip=False),
    "metaspace": build_metaspace,
}


@pytest.fixture(scope="session")
def tokenizer_of():
    """Name of a family -> Tokenizer, each built once."""
    built: dict[str, Tokenizer] = {}

    def get(name: str) -> Tokenizer:
        if name not in built:
            built[name] = Tokenizer(BUILDERS[name]())
        return built[name]

    return get


@pytest.fixture(scope="session")
def word_suffix() -> Tokenizer:
    return Tokenizer(build_word_suffix())


@pytest.fixture
def byte_level_dir(tmp_path: Path) -> Path:
    """A directory with a byte-level tokenizer and a chat template."""
    return save(tmp_path, build_byte_level(), eos_token="<|end|>", bos_token="<|bos|>", chat_template=TEMPLATE)


def save(directory: Path, backend: tokenizers.Tokenizer, **config: object) -> Path:
    backend.save(str(directory / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **config}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


@pytest.fixture
def save_tokenizer(tmp_path: Path):
    """save_tokenizer(family, **tokenizer_config) -> directory."""
    return lambda family, **config: save(tmp_path, BUILDERS[family](), **config)
