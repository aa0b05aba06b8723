from __future__ import annotations

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
