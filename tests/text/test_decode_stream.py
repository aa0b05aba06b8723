from __future__ import annotations

import pytest
import tokenizers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models

from vjax.text.decode_stream import ByteLevelStream, PieceStream, StreamFactory, WindowStream
from vjax.text.tokenizer import Tokenizer

FAMILIES = ["byte_level", "sentencepiece", "sentencepiece_no_strip", "metaspace"]
relaxed = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True
)


def continuation(tokenizer: Tokenizer, prompt: list[int], ids: list[int], skip: bool) -> str:
    """What `ids` add to the decoded prompt, by decoding everything."""
    before = tokenizer.decode(prompt, skip)
    return tokenizer.decode(prompt + ids, skip)[len(before) :]


def stream_all(tokenizer: Tokenizer, prompt: list[int], ids: list[int], skip: bool) -> str:
    stream = tokenizer.decode_stream(prompt, skip)
    return "".join([stream.push(i) for i in ids]) + stream.flush()


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
@relaxed
@given(text=st.text(max_size=40))
def test_any_unicode_text_comes_back(tokenizer_of, family, skip, text):
    tokenizer = tokenizer_of(family)
    prompt = tokenizer.encode("hello")
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert stream_all(tokenizer, prompt, ids, skip) == continuation(tokenizer, prompt, ids, skip)
    assert stream_all(tokenizer, [], ids, skip) == tokenizer.decode(ids, skip)


@pytest.mark.parametrize("family", ["byte_level", "metaspace"])
@relaxed
@given(data=st.data())
def test_any_token_ids_give_what_decode_gives(tokenizer_of, family, data):
    tokenizer = tokenizer_of(family)
    ids = data.draw(st.lists(st.integers(0, len(tokenizer) + 2), max_size=30))  # some ids have no token
    skip = data.draw(st.booleans())
    assert stream_all(tokenizer, [], ids, skip) == tokenizer.decode(ids, skip)


@relaxed
@given(data=st.data())
def test_byte_runs_that_are_not_utf8(tokenizer_of, data):
    """Equal to decode, but for complete characters at the beginning of such a run: they were shown already."""
    tokenizer = tokenizer_of("sentencepiece")
    ids = data.draw(st.lists(st.integers(0, len(tokenizer) - 1), max_size=30))
    expected, got = tokenizer.decode(ids), stream_all(tokenizer, [], ids, True)
    assert got.count("\ufffd") <= expected.count("\ufffd")
    if "\ufffd" not in expected:
        assert got == expected


def test_no_partial_character_is_pushed(tokenizer_of):
    tokenizer = tokenizer_of("byte_level")
    ids = tokenizer.encode("a𝄞b", add_special_tokens=False)  # one token per byte
    stream = tokenizer.decode_stream([])
    pieces = [stream.push(i) for i in ids]
    assert "\ufffd" not in "".join(pieces)
    assert pieces == ["a", "", "", "", "𝄞", "b"]
    stream = tokenizer.decode_stream([])
    assert "".join(stream.push(i) for i in ids[:2]) == "a"
    assert stream.flush() == "\ufffd"
    assert stream.flush() == ""


def test_byte_tokens_are_shown_as_soon_as_the_character_is_complete(tokenizer_of):
    tokenizer = tokenizer_of("sentencepiece")
    byte = lambda b: tokenizer.convert_tokens_to_ids(f"<0x{b:02X}>")  # noqa: E731
    stream = tokenizer.decode_stream(tokenizer.encode("hello"))
    assert [stream.push(byte(b)) for b in b"\n\xe4\xbd\xa0\xff\n"] == ["\n", "", "", "你", "\ufffd", "\ufffd"]
    hello = tokenizer.encode("hello", add_special_tokens=False)
    assert "".join(map(stream.push, hello)) == " hello"


def test_the_space_after_the_prompt_is_kept(tokenizer_of):
    for family in ("sentencepiece", "metaspace"):
        tokenizer = tokenizer_of(family)
        world = tokenizer.encode("world", add_special_tokens=False)
        bos = tokenizer.convert_tokens_to_ids("<s>")
        prompt = [bos, *tokenizer.encode("hello", add_special_tokens=False)]
        assert stream_all(tokenizer, prompt, world, True) == " world"
        assert stream_all(tokenizer, [bos], world, True) == "world"
        assert stream_all(tokenizer, [], world, True) == "world"


def test_hidden_tokens_do_not_end_a_character(tokenizer_of):
    tokenizer = tokenizer_of("sentencepiece")
    ids = [tokenizer.convert_tokens_to_ids(t) for t in ("<0xE4>", "<0xBD>", "</s>", "<0xA0>")]
    assert stream_all(tokenizer, [], ids, True) == tokenizer.decode(ids) == "你"
    assert stream_all(tokenizer, [], ids, False) == tokenizer.decode(ids, False)


@relaxed
@given(ids=st.lists(st.integers(0, 4), max_size=40))
def test_unknown_decoders_use_a_window(word_suffix, ids):
    stream = word_suffix.decode_stream([0])
    assert isinstance(stream, WindowStream)
    text = "".join([stream.push(i) for i in ids]) + stream.flush()
    shown = [i for i in ids if i != 4]
    expected = word_suffix.decode([0, *shown])[1:]
    assert text == expected
    assert len(stream._ids) < 50


def test_choice_of_stream(tokenizer_of):
    streams = {family: type(tokenizer_of(family).decode_stream([])) for family in FAMILIES}
    assert streams.pop("byte_level") is ByteLevelStream
    assert set(streams.values()) == {PieceStream}


@pytest.mark.parametrize(
    "decoder",
    [
        None,
        decoders.CTC(),
        decoders.Sequence([decoders.Fuse(), decoders.Replace("ab", "c")]),
        decoders.Sequence([decoders.Fuse(), decoders.Strip(" ", 0, 1)]),
    ],
)
def test_decoders_that_look_across_tokens_use_a_window(decoder):
    backend = tokenizers.Tokenizer(models.BPE(vocab={"a": 0, "b": 1}, merges=[]))
    if decoder is not None:
        backend.decoder = decoder
    assert isinstance(StreamFactory(backend).new([], True), WindowStream)
