from __future__ import annotations

import pytest

from vjax.logprobs import FlatLogprobs, Logprob
from vjax.outputs import CompletionOutput, RequestMetrics, RequestOutput


def completion(**changes) -> CompletionOutput:
    return CompletionOutput(**({"index": 0, "text": "hi", "token_ids": [5, 6]} | changes))


def test_completion_is_finished_when_it_has_a_reason():
    assert not completion().finished()
    assert completion(finish_reason="length").finished()


def test_repr_of_a_completion():
    assert repr(completion()) == "CompletionOutput(index=0, text='hi', token_ids=[5, 6], finish_reason=None)"
    text = repr(completion(finish_reason="stop", stop_reason="\n"))
    assert text.endswith("finish_reason='stop', stop_reason='\\n')")
    assert "error='out of memory'" in repr(completion(finish_reason="error", error="out of memory"))


def test_repr_of_a_request_shortens_long_prompts():
    out = RequestOutput("3", None, list(range(1000)), [completion()], finished=False)
    text = repr(out)
    assert text.startswith("RequestOutput(request_id='3', prompt=None, prompt_token_ids=[0, 1, ")
    assert "15, ... 1000 in all]" in text and "999" not in text
    assert "outputs=[CompletionOutput(index=0" in text and "finished=False, num_cached_tokens=None" in text


def test_optional_fields_default_to_none():
    out = RequestOutput("0", "a", [1], [], finished=True)
    assert (out.metrics, out.num_cached_tokens, out.prompt_logprobs, out.lora_request) == (None, None, None, None)
    assert (completion().logprobs, completion().cumulative_logprob, completion().stop_reason) == (None, None, None)
    assert RequestMetrics().num_generation_tokens == 0


def test_flat_logprobs_are_a_sequence_of_dicts():
    entries = [{5: Logprob(-0.5, 1, "a"), 6: Logprob(-1.0, 2, "b")}, {}, {7: Logprob(-2.0)}, {8: Logprob(-3.0, 9)}]
    flat = FlatLogprobs()
    flat.extend([entries[0], None, *entries[2:]])
    assert list(flat) == entries and len(flat) == 4 and flat[-1] == entries[-1]
    assert (flat.start_indices, flat.end_indices) == ([0, 2, 2, 3], [2, 2, 3, 4])
    assert flat.token_ids == [5, 6, 7, 8] and flat.logprobs == [-0.5, -1.0, -2.0, -3.0]
    assert flat.ranks == [1, 2, None, 9] and flat.decoded_tokens == ["a", "b", None, None]
    for part in (slice(1, 3), slice(None), slice(4, None), slice(None, None, 2), slice(None, None, -1)):
        assert isinstance(flat[part], FlatLogprobs) and list(flat[part]) == entries[part]
    joined = flat[2:]
    joined.extend(flat[:2])
    assert list(joined) == [*entries[2:], *entries[:2]] and joined.start_indices == [0, 1, 2, 4]
    twice = FlatLogprobs()
    twice.append_fast([5, 3, 5], [-0.5, -0.1, -0.5], [2, 1, 2], ["a", "c", "a"])
    assert list(twice[0]) == [5, 3] and twice[0][5] == Logprob(-0.5, 2, "a")
    with pytest.raises(IndexError):
        flat[4]
