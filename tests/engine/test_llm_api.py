"""The Python API on the bundled model, as a vLLM user would check it."""

from __future__ import annotations

import dataclasses
import itertools
import json
import time

import numpy as np
import pytest

from vjax import (
    LLM,
    ConfigError,
    RepetitionDetectionParams,
    RequestOutputKind,
    SamplingParams,
    VjaxValidationError,
    tool_parser,
)
from vjax.metrics import Counter, Gauge, Histogram
from vjax.text.chat import render_chat

pytestmark = pytest.mark.usefixtures("shared_programs")

BLOCK = 16
#: vLLM's arguments that change nothing here ride along, as they do in programs written for vLLM.
HARMLESS = {"enforce_eager": True, "swap_space": 4, "trust_remote_code": False, "tensor_parallel_size": 1}
SMALL = {"max_model_len": 256, "max_num_seqs": 8, "max_num_batched_tokens": 128, "kv_cache_memory_bytes": 16 << 20}

TEXT = "def add(first, second):"
#: The bundled model ends the document right after it.
ENDING = "if __name__ == '__main__':\n    unittest.main()\n"
GREEDY = SamplingParams(temperature=0.0, max_tokens=12)
MESSAGES = [{"role": "user", "content": "Write a function `is_empty`: Return True if the queue is empty."}]


@pytest.fixture(scope="module")
def llm():
    with LLM("vjax-tiny", **SMALL, **HARMLESS, disable_log_stats=False) as engine:
        yield engine


@pytest.fixture(scope="module")
def base(llm):
    """Greedy completion of TEXT."""
    return one(llm, TEXT)


@pytest.fixture(autouse=True)
def idle(llm):
    llm.reset_prefix_cache()
    yield
    llm.llm_engine._core.scheduler.check_integrity()
    assert not llm.llm_engine.has_unfinished_requests()


def run(llm, prompts, params=GREEDY, **kwargs):
    return llm.generate(prompts, params, use_tqdm=False, **kwargs)


def one(llm, prompt, params=GREEDY):
    (output,) = run(llm, prompt, params)
    return output.outputs[0]


def greedy(**fields) -> SamplingParams:
    return dataclasses.replace(GREEDY, **fields)


def drawn(**fields) -> SamplingParams:
    return SamplingParams(**{"temperature": 1.0, "max_tokens": 12, "ignore_eos": True} | fields)


def stream(engine, requests: dict) -> dict[str, list]:
    """Steps until all `requests` (id -> (prompt, params)) are done; the outputs of each, in order."""
    for request_id, (prompt, params) in requests.items():
        engine.add_request(request_id, prompt, params)
    outputs: dict[str, list] = {request_id: [] for request_id in requests}
    while engine.has_unfinished_requests():
        for output in engine.step():
            outputs[output.request_id].append(output)
    return outputs


# ---- prompts and parameters ---------------------------------------------------------------------------------------


def test_forms_of_one_prompt(llm, base):
    ids = llm.get_tokenizer().encode(TEXT)
    for prompt, text in [
        (TEXT, TEXT),
        ([TEXT], TEXT),
        ((TEXT,), TEXT),
        ({"prompt": TEXT}, TEXT),
        ([{"prompt": TEXT, "prompt_token_ids": ids}], TEXT),
        ({"prompt_token_ids": ids}, None),
        (ids, None),
        ([ids], None),
        (tuple(ids), None),
        (np.asarray(ids), None),
        (list(np.asarray(ids)), None),
        (np.asarray([ids]), None),
        (iter([TEXT]), TEXT),
    ]:
        (output,) = run(llm, prompt)
        assert (output.prompt, output.prompt_token_ids) == (text, ids)
        assert output.outputs[0].token_ids == base.token_ids and output.finished
        assert all(type(i) is int for i in output.prompt_token_ids)


def test_outputs_come_in_the_order_of_the_prompts(llm, base):
    prompts = [{"prompt": "import os"}, TEXT, {"prompt_token_ids": [5, 6, 7]}, [8, 9]] * 4
    outputs = run(llm, prompts)
    assert [o.prompt for o in outputs] == ["import os", TEXT, None, None] * 4
    assert [o.prompt_token_ids for o in outputs][2:4] == [[5, 6, 7], [8, 9]]
    assert [o.outputs[0].token_ids for o in outputs[1::4]] == [base.token_ids] * 4
    ids = [int(o.request_id) for o in outputs]
    assert ids == list(range(ids[0], ids[0] + 16))
    assert run(llm, []) == []


def test_parameters_of_each_prompt(llm, base):
    params = [greedy(max_tokens=n) for n in (1, 3, 2)]
    before = [dataclasses.replace(p) for p in params]
    outputs = run(llm, [TEXT] * 3, params)
    assert [o.outputs[0].token_ids for o in outputs] == [base.token_ids[:n] for n in (1, 3, 2)]
    assert params == before, "the caller's parameters were changed"


def test_max_tokens_none_fills_the_context(llm):
    output = one(llm, TEXT, greedy(max_tokens=None, ignore_eos=True))
    assert len(output.token_ids) == SMALL["max_model_len"] - len(llm.get_tokenizer().encode(TEXT))
    assert output.finish_reason == "length"
    assert len(one(llm, TEXT, greedy(max_tokens=10**6, ignore_eos=True)).token_ids) == len(output.token_ids)


def test_defaults_are_the_models(llm):
    params = llm.get_default_sampling_params()
    assert (params.temperature, params.top_p, params.max_tokens) == (0.7, 0.95, 16)
    assert len(llm.generate(TEXT, use_tqdm=False)[0].outputs[0].token_ids) <= 16


def test_further_keywords(llm, base):
    kwargs = {"lora_request": None, "mm_processor_kwargs": {}}
    assert run(llm, TEXT, **kwargs)[0].outputs[0].token_ids == base.token_ids
    with pytest.raises(VjaxValidationError, match=r"lora_request=3 is not supported by LLM\.generate"):
        run(llm, TEXT, lora_request=3)
    with pytest.raises(TypeError, match="unexpected keyword argument 'sampling'"):
        run(llm, TEXT, sampling=3)


def test_long_prompts_are_truncated(llm):
    tokenizer, limit = llm.get_tokenizer(), SMALL["max_model_len"]
    long_ids = [100 + i % 1000 for i in range(limit + 50)]
    text = TEXT * 3
    ids = tokenizer.encode(text)

    def prompt_ids(prompts, **tokenization_kwargs):
        outputs = run(llm, prompts, greedy(max_tokens=1), tokenization_kwargs=tokenization_kwargs)
        return [o.prompt_token_ids for o in outputs]

    assert prompt_ids([text, ids, {"prompt": "x", "prompt_token_ids": ids}], truncate_prompt_tokens=7) == [ids[-7:]] * 3
    assert prompt_ids([text, ids], truncate_prompt_tokens=7, truncation_side="right") == [ids[:7]] * 2
    assert prompt_ids([text, ids], truncate_prompt_tokens=limit) == [ids, ids]
    for number in (-1, limit):
        assert prompt_ids(long_ids, truncate_prompt_tokens=number) == [long_ids[1 - limit :]]
    with pytest.raises(VjaxValidationError, match="maximum model length of 256"):
        run(llm, long_ids)
    (output,) = run(llm, text, tokenization_kwargs={"truncate_prompt_tokens": 9})
    assert output.prompt == text and output.outputs == run(llm, ids[-9:])[0].outputs
    (chat,) = llm.chat(MESSAGES, GREEDY, use_tqdm=False, tokenization_kwargs={"truncate_prompt_tokens": 8})
    assert chat.prompt_token_ids == tokenizer.encode(chat.prompt, add_special_tokens=False)[-8:]
    with pytest.raises(VjaxValidationError, match=r"prompts\[0\]: truncate_prompt_tokens=257 must be"):
        prompt_ids([text, ids], truncate_prompt_tokens=257)
    engine = llm.llm_engine
    engine.add_request("r", long_ids, greedy(max_tokens=1), tokenization_kwargs={"truncate_prompt_tokens": -1})
    (last,) = [o for _ in range(5) for o in engine.step()]
    assert last.prompt_token_ids == long_ids[1 - limit :]


def test_arguments_that_matter_are_refused_by_name():
    with pytest.raises(ConfigError) as e:
        LLM("vjax-tiny", tensor_parallel_size=2, quantization="awq", trust_remote_code=True, max_seqs=3)
    text = str(e.value)
    for part in ("tensor_parallel_size=2", "quantization='awq'", "trust_remote_code=True", "mean max_num_seqs?"):
        assert part in text


# ---- prefix cache -------------------------------------------------------------------------------------------------


def num_cached(llm, *prompts) -> list[int]:
    return [o.num_cached_tokens for o in run(llm, list(prompts), greedy(max_tokens=1))]


@pytest.mark.parametrize(("length", "cached"), [(15, 0), (16, 0), (17, 16), (32, 16), (33, 32), (200, 192)])
def test_the_last_token_is_always_computed(llm, length, cached):
    ids = list(range(100, 100 + length))
    assert [num_cached(llm, ids), num_cached(llm, ids)] == [[0], [cached]]


def test_equal_prompts_of_one_batch_share_blocks(llm):
    ids = list(range(200, 233))
    first, second = run(llm, [ids, ids])
    assert [first.num_cached_tokens, second.num_cached_tokens] == [0, 32]
    assert first.outputs[0].token_ids == second.outputs[0].token_ids


def test_completions_are_cached_too(llm):
    ids = list(range(300, 320))
    completion = one(llm, ids, greedy(max_tokens=20, ignore_eos=True)).token_ids
    assert num_cached(llm, ids + completion) == [32]
    # A prefix of another length, and one that differs in its second block.
    assert num_cached(llm, ids + completion[:5] + [7]) == [16]
    assert num_cached(llm, ids + [7] * 20) == [16]


def test_salts_do_not_share(llm):
    ids = list(range(400, 440))

    def salted(salt: str | None) -> int:
        return num_cached(llm, {"prompt_token_ids": ids, "cache_salt": salt})[0]

    assert [salted(s) for s in (None, None, "a", "a", "b", "a", "b", None)] == [0, 32, 0, 32, 0, 32, 32, 32]


def test_reset_prefix_cache(llm):
    ids = list(range(500, 540))
    assert num_cached(llm, ids) == [0] and num_cached(llm, ids) == [32]
    assert llm.reset_prefix_cache() is True
    assert num_cached(llm, ids) == [0]


def test_reset_with_running_requests(llm, base):
    engine = llm.llm_engine
    engine.add_request("r", TEXT, greedy(output_kind=RequestOutputKind.FINAL_ONLY))
    for _ in range(4):
        engine.step()
    assert llm.reset_prefix_cache() is False
    assert llm.reset_prefix_cache(reset_running_requests=True) is True
    finished = [o for _ in range(40) for o in engine.step()]
    assert [o.outputs[0].token_ids for o in finished] == [base.token_ids]


def test_the_prefix_cache_need_not_be_read(llm):
    ids = list(range(600, 640))
    unread, params = greedy(skip_reading_prefix_cache=True), greedy()
    first, second, third = (run(llm, ids, p)[0] for p in (unread, unread, params))
    assert [o.num_cached_tokens for o in (first, second, third)] == [0, 0, 32]
    assert first.outputs == second.outputs == third.outputs
    pair = run(llm, [ids, ids], [params, unread])
    assert [o.num_cached_tokens for o in pair] == [32, 0] and pair[0].outputs == pair[1].outputs


def test_completions_of_one_prompt_share_its_blocks(llm):
    def read() -> list[float]:
        values = {m.name: m.value for m in llm.get_metrics() if isinstance(m, Counter)}
        return [values[f"vjax:prefix_cache_{name}"] for name in ("queries", "hits")]

    queries, hits = read()
    for ids, params in [(list(range(700, 733)), drawn(n=4)), (list(range(800, 1000)), drawn(n=3, max_tokens=2))]:
        (output,) = run(llm, ids, params)
        assert output.num_cached_tokens == 0
        queries += params.n * len(ids)
        hits += (params.n - 1) * ((len(ids) - 1) // BLOCK * BLOCK)
        assert read() == [queries, hits]


# ---- sampling -----------------------------------------------------------------------------------------------------


def test_seeded_sampling_does_not_depend_on_the_batch(llm):
    alone = one(llm, TEXT, drawn(seed=7)).token_ids
    others = [drawn(), drawn(seed=8, top_k=5), drawn(seed=7), GREEDY, drawn(seed=7, min_p=0.0), drawn(seed=9)]
    outputs = [o.outputs[0].token_ids for o in run(llm, [TEXT] * 6, others)]
    assert outputs[2] == alone and outputs[4] == alone
    assert outputs[5] != alone
    assert one(llm, TEXT, drawn(seed=7)).token_ids == alone


def test_requests_without_seed_differ(llm):
    outputs = [tuple(o.outputs[0].token_ids) for o in run(llm, [TEXT] * 8, drawn())]
    assert len(set(outputs)) > 4
    again = [tuple(o.outputs[0].token_ids) for o in run(llm, [TEXT] * 8, drawn())]
    assert again != outputs


def test_completions_of_one_prompt(llm):
    (output,) = run(llm, TEXT, drawn(n=4, seed=11))
    assert [c.index for c in output.outputs] == [0, 1, 2, 3] and output.finished
    separate = [one(llm, TEXT, drawn(seed=11 + i)) for i in range(4)]
    assert [c.token_ids for c in output.outputs] == [c.token_ids for c in separate]
    assert [c.text for c in output.outputs] == [c.text for c in separate]
    assert len({tuple(c.token_ids) for c in output.outputs}) > 1
    (again,) = run(llm, TEXT, drawn(n=4, seed=11))
    assert again.outputs == output.outputs


def test_more_completions_than_rows(llm):
    (output,) = run(llm, TEXT, drawn(n=20, seed=3, max_tokens=4))
    assert [c.index for c in output.outputs] == list(range(20))
    assert output.outputs[19].token_ids == one(llm, TEXT, drawn(seed=22, max_tokens=4)).token_ids


# ---- how a completion ends ----------------------------------------------------------------------------------------


def test_length(llm, base):
    assert (base.finish_reason, base.stop_reason, len(base.token_ids)) == ("length", None, 12)
    assert base.text == llm.get_tokenizer().decode(base.token_ids)


def test_eos(llm):
    eos = llm.get_tokenizer().eos_token_id
    ended = one(llm, ENDING)
    assert (ended.finish_reason, ended.stop_reason) == ("stop", None)
    assert (ended.token_ids, ended.text) == ([eos], "")
    # On the last allowed token it is still a stop.
    assert one(llm, ENDING, greedy(max_tokens=1)).finish_reason == "stop"
    went_on = one(llm, ENDING, greedy(ignore_eos=True))
    assert (went_on.finish_reason, went_on.token_ids[0], len(went_on.token_ids)) == ("length", eos, 12)
    shown = one(llm, ENDING, greedy(include_stop_str_in_output=True, skip_special_tokens=False))
    assert shown.text == llm.get_tokenizer().eos_token
    assert one(llm, ENDING, greedy(ignore_eos=True, skip_special_tokens=False)).text.startswith("<|endoftext|>")
    assert not went_on.text.startswith("<|endoftext|>")


def test_further_eos_ids_of_the_generation_config(llm):
    (output,) = llm.chat(MESSAGES, greedy(max_tokens=200), use_tqdm=False)
    (completion,) = output.outputs
    assert (completion.finish_reason, completion.stop_reason, completion.token_ids[-1]) == ("stop", 1, 1)
    assert "<|end|>" not in completion.text
    (longer,) = llm.chat(MESSAGES, greedy(max_tokens=100, ignore_eos=True), use_tqdm=False)
    assert len(longer.outputs[0].token_ids) == 100


def test_stop_token_ids(llm, base):
    token = base.token_ids[3]
    first = base.token_ids.index(token)
    ended = one(llm, TEXT, greedy(stop_token_ids=[token, 4095]))
    assert (ended.finish_reason, ended.stop_reason) == ("stop", token)
    assert ended.token_ids == base.token_ids[: first + 1]
    tokenizer = llm.get_tokenizer()
    assert ended.text == tokenizer.decode(ended.token_ids[:-1])
    shown = one(llm, TEXT, greedy(stop_token_ids=[token], include_stop_str_in_output=True))
    assert shown.text == tokenizer.decode(shown.token_ids)


def test_min_tokens_masks_what_would_end_the_request(llm, base):
    eos, token = llm.get_tokenizer().eos_token_id, base.token_ids[0]
    output = one(llm, ENDING, greedy(min_tokens=5, stop_token_ids=[token]))
    assert len(output.token_ids) >= 5
    assert not {eos, token, 1} & set(output.token_ids[:4])
    masked = one(llm, TEXT, greedy(min_tokens=3, stop_token_ids=[token]))
    assert token not in masked.token_ids[:2] and masked.token_ids[0] != token
    exactly = one(llm, ENDING, greedy(min_tokens=12))
    assert (len(exactly.token_ids), exactly.finish_reason) == (12, "length")


def test_stop_strings(llm, base):
    text = base.text
    stop = text[5:8]
    start = text.index(stop)
    ended = one(llm, TEXT, greedy(stop=["never there", stop]))
    assert (ended.text, ended.finish_reason, ended.stop_reason) == (text[:start], "stop", stop)
    assert len(ended.token_ids) < len(base.token_ids)
    shown = one(llm, TEXT, greedy(stop=stop, include_stop_str_in_output=True))
    assert shown.text == text[: start + len(stop)]
    # The earliest match wins, and the last allowed token may complete it.
    early = one(llm, TEXT, greedy(stop=[text[8:10], text[:2]]))
    assert (early.text, early.stop_reason) == ("", text[:2])
    last = one(llm, TEXT, greedy(stop=text[-2:]))
    assert last.finish_reason == "stop"
    # Text of the first min_tokens tokens is not searched.
    late = one(llm, TEXT, greedy(stop=text[:2], min_tokens=12))
    assert late.finish_reason == "length" and late.text == text


def test_stop_strings_that_are_special_tokens(llm):
    params = greedy(max_tokens=200, ignore_eos=True, stop="<|end|>", skip_special_tokens=False)
    (plain,) = llm.chat(MESSAGES, greedy(max_tokens=200), use_tqdm=False)
    (output,) = llm.chat(MESSAGES, params, use_tqdm=False)
    (completion,) = output.outputs
    assert (completion.finish_reason, completion.stop_reason) == ("stop", "<|end|>")
    assert (completion.text, completion.token_ids) == (plain.outputs[0].text, plain.outputs[0].token_ids)
    # Where special tokens leave no text there is nothing to find.
    (unseen,) = llm.chat(MESSAGES, dataclasses.replace(params, skip_special_tokens=True, max_tokens=70), use_tqdm=False)
    assert unseen.outputs[0].finish_reason == "length"


def test_repetition(llm):
    loop = one(llm, TEXT, greedy(max_tokens=100, ignore_eos=True)).token_ids
    count = 2
    ends = [
        i for i in range(2, 101) if any(loop[i - n : i] == loop[i - 2 * n : i - n] for n in (1, 2, 3) if i >= 2 * n)
    ]
    assert ends and ends[0] < 100, "the model does not repeat itself"
    params = greedy(max_tokens=100, ignore_eos=True, repetition_detection=RepetitionDetectionParams(3, 1, count))
    ended = one(llm, TEXT, params)
    assert (ended.finish_reason, ended.stop_reason) == ("repetition", "repetition_detected")
    assert ended.token_ids == loop[: ends[0]] and ended.text == llm.get_tokenizer().decode(ended.token_ids)
    later = next(i for i in ends if i > ends[0])
    assert one(llm, TEXT, dataclasses.replace(params, min_tokens=later)).token_ids == loop[:later]
    (series,) = [m for m in llm.get_metrics() if m.labels.get("finished_reason") == "repetition"]
    assert isinstance(series, Counter) and series.value == 2


def test_without_detokenizing(llm, base):
    output = one(llm, TEXT, greedy(detokenize=False))
    assert (output.text, output.token_ids) == ("", base.token_ids)
    with pytest.raises(VjaxValidationError, match=r"stop=\['x'\] needs detokenize=True"):
        greedy(detokenize=False, stop="x")


# ---- chat and tokenizer -------------------------------------------------------------------------------------------


def test_chat_is_generate_with_the_template(llm):
    text = render_chat(llm.get_tokenizer(), MESSAGES)
    (answer,) = llm.chat(MESSAGES, GREEDY, use_tqdm=False)
    assert answer.prompt == text and text.endswith("<|assistant|>\n")
    ids = llm.get_tokenizer().encode(text, add_special_tokens=False)
    assert answer.prompt_token_ids == ids
    assert answer.outputs[0].token_ids == one(llm, ids).token_ids


def test_batches_of_conversations(llm):
    other = [*MESSAGES, {"role": "assistant", "content": "def is_empty():"}, {"role": "user", "content": "More."}]
    answers = llm.chat([MESSAGES, other], [GREEDY, greedy(max_tokens=2)], use_tqdm=False)
    assert [a.outputs[0].token_ids for a in answers] == [
        llm.chat(c, GREEDY, use_tqdm=False)[0].outputs[0].token_ids[:n] for c, n in ((MESSAGES, 12), (other, 2))
    ]


def test_chat_options(llm):
    def prompt(messages=MESSAGES, **options) -> str:
        return llm.chat(messages, greedy(max_tokens=1), use_tqdm=False, **options)[0].prompt

    assert prompt(add_generation_prompt=False).endswith("<|end|>\n")
    assert prompt(chat_template_kwargs={"add_generation_prompt": False}).endswith("<|end|>\n")
    begun = [*MESSAGES, {"role": "assistant", "content": "def is_empty("}]
    assert prompt(begun, add_generation_prompt=False, continue_final_message=True).endswith("def is_empty(")
    assert prompt(chat_template="{{ mood }} {{ messages[0].role }}", chat_template_kwargs={"mood": "Hi"}) == "Hi user"
    assert prompt([{"role": "user", "content": [{"type": "text", "text": "Hi"}]}], chat_template_content_format="auto")
    with pytest.raises(VjaxValidationError, match="chat_template_kwargs has the name 'messages'"):
        prompt(chat_template_kwargs={"messages": []})
    with pytest.raises(VjaxValidationError, match=r"chat_template_kwargs=.* must be a dict"):
        prompt(chat_template_kwargs=[1])
    with pytest.raises(VjaxValidationError, match="set one of them to False"):
        prompt(begun, continue_final_message=True)
    with pytest.raises(VjaxValidationError, match=r"conversations\[1\]: messages\[0\] needs a \"role\""):
        prompt([MESSAGES, [{"content": "x"}]])


def test_tools_of_a_chat(llm):
    """Tools reach the template; a call in a text is found again."""
    called = '<tool_call>{"name": "stop", "arguments": {"now": true}}</tool_call>'
    template = "{% for t in tools %}{{ t.function.name }} {% endfor %}{{ messages[0].content }}"
    tools = [{"type": "function", "function": {"name": "stop", "parameters": {}}}]
    messages = [{"role": "user", "content": called}]
    (answer,) = llm.chat(messages, greedy(max_tokens=1), tools=tools, chat_template=template, use_tqdm=False)
    assert answer.prompt == f"stop {called}"
    _, (call,) = tool_parser("hermes", tools).extract_tool_calls(answer.prompt)
    assert call.function.name == "stop" and json.loads(call.function.arguments) == {"now": True}


def test_salts_and_priorities_of_a_chat(llm):
    def cached(salts, **options) -> list[int]:
        answers = llm.chat([MESSAGES] * len(salts), GREEDY, cache_salt=salts, use_tqdm=False, **options)
        return [answer.num_cached_tokens for answer in answers]

    assert cached(["a"]) == [0]
    assert cached(["b"]) == [0]
    shared = cached(["a"])
    assert shared[0] >= BLOCK
    assert cached(["c", "a", None], priority=[0, 0, 0]) == [0, *shared, 0]
    for wrong, text in ((["a", "b"], "2 entries for 1 prompts"), (3, "is a int"), ("", "non-empty string")):
        with pytest.raises(VjaxValidationError, match=text):
            llm.chat(MESSAGES, GREEDY, cache_salt=wrong, use_tqdm=False)
    with pytest.raises(VjaxValidationError, match="priority has 1 entries for 2 prompts"):
        llm.chat([MESSAGES, MESSAGES], GREEDY, priority=[1], use_tqdm=False)


def test_tokenizer(llm):
    tokenizer = llm.get_tokenizer()
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT
    assert len(tokenizer) == 4096 and tokenizer.eos_token_id in tokenizer.all_special_ids
    assert tokenizer.apply_chat_template(MESSAGES, tokenize=False) == render_chat(
        tokenizer, MESSAGES, add_generation_prompt=False
    )


# ---- metrics and progress -----------------------------------------------------------------------------------------


def test_metrics(llm, base):
    def read() -> dict[str, float]:
        series = llm.get_metrics()
        assert all(m.name.startswith("vjax:") for m in series)
        kinds = {m.name.removeprefix("vjax:"): type(m) for m in series}
        assert {n for n, k in kinds.items() if k is Gauge} == {
            "num_requests_running",
            "num_requests_waiting",
            "kv_cache_usage_perc",
            "cache_config_info",
        }
        values = {m.name.removeprefix("vjax:") + "".join(m.labels.values()): m for m in series}
        counts = {name: m.count for name, m in values.items() if isinstance(m, Histogram)}
        return counts | {name: m.value for name, m in values.items() if isinstance(m, (Counter, Gauge))}

    before = read()
    run(llm, [list(range(600, 633))] * 2, greedy(max_tokens=5, ignore_eos=True))
    one(llm, ENDING)
    num_ending = len(llm.get_tokenizer().encode(ENDING))
    after = read()
    assert one(llm, TEXT, greedy(stop=base.text[3:5])).finish_reason == "stop"
    assert read()["request_successstop"] == after["request_successstop"] + 1, "a stop string is a stop"
    grown = {name: after[name] - before[name] for name in after}
    assert grown["prompt_tokens"] == 66 + num_ending
    assert grown["generation_tokens"] == 11
    assert grown["prefix_cache_queries"] == 66 + num_ending
    assert grown["prefix_cache_hits"] == 32
    assert (grown["request_successlength"], grown["request_successstop"]) == (2, 1)
    assert grown["time_to_first_token_seconds"] == grown["e2e_request_latency_seconds"] == 3
    assert grown["inter_token_latency_seconds"] == 11 - 3
    assert after["num_requests_running"] == after["num_requests_waiting"] == after["kv_cache_usage_perc"] == 0

    llm.llm_engine.add_request("r", list(range(600, 640)), GREEDY)
    assert read()["num_requests_waiting"] == 1
    llm.llm_engine.step()
    during = read()
    assert during["num_requests_running"] == 1
    num_blocks = llm.llm_engine.config.cache.num_gpu_blocks
    assert during["kv_cache_usage_perc"] == pytest.approx(3 / (num_blocks - 1))
    llm.llm_engine.abort_request("r")


def test_times_of_a_request(llm):
    metrics = run(llm, TEXT)[0].metrics
    assert metrics.num_generation_tokens == 12
    assert 0 < metrics.arrival_ts <= metrics.queued_ts <= metrics.scheduled_ts < metrics.first_token_ts
    assert metrics.first_token_ts < metrics.last_token_ts <= metrics.finished_ts
    assert metrics.first_token_latency >= metrics.time_in_queue + metrics.prefill_time - 1e-6
    assert abs(time.time() - metrics.finished_time) < 60


def test_progress(llm, capsys):
    llm.generate([TEXT] * 2, GREEDY)
    err = capsys.readouterr().err
    assert "Processed prompts: 100%" in err and "2/2" in err and "tok/s" in err
    llm.generate([TEXT] * 2, GREEDY, use_tqdm=False)
    quiet = capsys.readouterr()  # the line of statistics, every ten seconds, may fall in here
    assert quiet.out == "" and "Processed prompts" not in quiet.err

    made = []

    def bar(*args, **kwargs):
        from tqdm import tqdm

        made.append(kwargs["total"])
        return tqdm(*args, **kwargs | {"disable": True})

    llm.generate([TEXT] * 3, GREEDY, use_tqdm=bar)
    assert made == [3]


# ---- stepping the engine ------------------------------------------------------------------------------------------


def test_streams_add_up_to_the_whole(llm, base):
    stop = base.text[6:9]
    want = one(llm, TEXT, greedy(stop=stop))
    kinds = {kind.name: (TEXT, greedy(stop=stop, output_kind=kind)) for kind in RequestOutputKind}
    outputs = stream(llm.llm_engine, kinds)
    for outs in outputs.values():
        assert [o.finished for o in outs] == [False] * (len(outs) - 1) + [True]
        assert outs[-1].outputs[0].stop_reason == stop and outs[-1].prompt == TEXT
        assert all(o.outputs[0].finish_reason is None for o in outs[:-1])
    assert len(outputs["FINAL_ONLY"]) == 1 and outputs["FINAL_ONLY"][0].outputs == [want]
    cumulative = [o.outputs[0] for o in outputs["CUMULATIVE"]]
    assert len(cumulative) > 1 and cumulative[-1] == want
    for shorter, longer in itertools.pairwise(cumulative):
        assert longer.text.startswith(shorter.text)
        assert longer.token_ids[: len(shorter.token_ids)] == shorter.token_ids
    deltas = [o.outputs[0] for o in outputs["DELTA"]]
    assert "".join(d.text for d in deltas) == want.text
    assert [i for d in deltas for i in d.token_ids] == want.token_ids


@pytest.mark.parametrize("interval", [1, 2, 5, 100])
def test_stream_intervals(llm, base, interval):
    kinds = [RequestOutputKind.DELTA, RequestOutputKind.CUMULATIVE]
    requests = {
        kind.name: (TEXT, greedy(stream_interval=interval, output_kind=kind, stop=["never there"])) for kind in kinds
    }
    outputs = stream(llm.llm_engine, requests)
    lengths = [*range(1, 12, interval), 12]
    deltas, cumulative = ([o.outputs[0] for o in outputs[kind.name]] for kind in kinds)
    assert [len(c.token_ids) for c in cumulative] == lengths
    assert list(itertools.accumulate(len(d.token_ids) for d in deltas)) == lengths
    assert list(itertools.accumulate(d.text for d in deltas)) == [c.text for c in cumulative]
    assert cumulative[-1] == base and [o.finished for o in outputs["DELTA"]] == [False] * (len(lengths) - 1) + [True]


def test_streams_of_several_completions(llm):
    params = drawn(n=3, seed=5)
    (whole,) = run(llm, TEXT, params)
    outputs = stream(llm.llm_engine, {"r": (TEXT, dataclasses.replace(params, output_kind=RequestOutputKind.DELTA))})
    texts, ids = [""] * 3, [[] for _ in range(3)]
    for output in outputs["r"]:
        for completion in output.outputs:
            texts[completion.index] += completion.text
            ids[completion.index] += completion.token_ids
    assert (texts, ids) == ([c.text for c in whole.outputs], [c.token_ids for c in whole.outputs])
    assert [o.finished for o in outputs["r"]].index(True) == len(outputs["r"]) - 1


def test_aborting(llm, base):
    engine = llm.llm_engine
    engine.add_request("gone", "import os", drawn(n=3, max_tokens=100))
    engine.add_request("stays", TEXT, greedy(output_kind=RequestOutputKind.FINAL_ONLY))
    seen = [o for _ in range(4) for o in engine.step()]
    assert {o.request_id for o in seen} == {"gone"} and engine.get_num_unfinished_requests() == 2
    engine.abort_request(["gone", "unknown"])
    assert engine.get_num_unfinished_requests() == 1
    (last,) = [o for _ in range(40) for o in engine.step()]
    assert last.request_id == "stays" and last.outputs[0].token_ids == base.token_ids
    assert engine.step() == []
    engine.abort_request("gone")  # of no effect
    assert stream(engine, {"gone": (TEXT, GREEDY)})["gone"], "the id is free again"


def test_request_ids(llm):
    engine = llm.llm_engine
    for bad in (7, "", None):
        with pytest.raises(VjaxValidationError, match=r"request_id=.* must be a non-empty string"):
            engine.add_request(bad, TEXT, GREEDY)
    engine.add_request("r", TEXT, GREEDY)
    with pytest.raises(VjaxValidationError, match="request_id 'r' is in use"):
        engine.add_request("r", TEXT, GREEDY)
    engine.abort_request("r")


# ---- other engines ------------------------------------------------------------------------------------------------


def test_priorities():
    with LLM("vjax-tiny", **SMALL, scheduling_policy="priority") as llm:
        engine = llm.llm_engine

        def add(name: str, max_tokens: int, rank: int) -> None:
            params = greedy(max_tokens=max_tokens, ignore_eos=True, output_kind=RequestOutputKind.FINAL_ONLY)
            engine.add_request(name, TEXT, params, priority=rank)

        for i in range(SMALL["max_num_seqs"]):  # they fill the rows, and leave them one after the other
            add(f"early {i}", 2 + 2 * i, rank=0)
        engine.step()
        for name, rank in [("low", 5), ("first", 0), ("second", 0), ("urgent", -3)]:
            add(name, 30, rank)
        finished = []
        while engine.has_unfinished_requests():
            finished += [o.request_id for o in engine.step()]
        assert [name for name in finished if "early" not in name] == ["urgent", "first", "second", "low"]
        outputs = run(llm, ["a", "b", "c"], priority=np.asarray([2, 1, 0]))
        assert [o.prompt for o in outputs] == ["a", "b", "c"]


def test_priorities_without_the_policy_are_mentioned(llm, capsys):
    run(llm, ["a", "b"], priority=[1, 0])
    run(llm, ["a", "b"], priority=[1, 0])
    assert capsys.readouterr().err.count('scheduling_policy="priority"') <= 1


def test_after_shutdown():
    with LLM("vjax-tiny", **SMALL) as llm:
        pass
    llm.shutdown()
    for call in (
        lambda: llm.generate(TEXT, GREEDY, use_tqdm=False),
        lambda: llm.chat(MESSAGES, GREEDY, use_tqdm=False),
        lambda: llm.llm_engine.add_request("r", TEXT, GREEDY),
        llm.llm_engine.step,
    ):
        with pytest.raises(RuntimeError, match="shut down; create a new one"):
            call()
    assert not llm.llm_engine.has_unfinished_requests()
    with pytest.raises(VjaxValidationError, match="Metrics are off"):
        llm.get_metrics()


def test_without_tokenizer():
    with LLM("vjax-tiny", **SMALL, skip_tokenizer_init=True) as llm:
        output = one(llm, {"prompt_token_ids": [292, 301, 12]})
        assert output.text == "" and len(output.token_ids) == 12
        for call in (lambda: run(llm, TEXT), llm.get_tokenizer, lambda: llm.chat(MESSAGES, GREEDY, use_tqdm=False)):
            with pytest.raises(VjaxValidationError, match="skip_tokenizer_init=True"):
                call()


def test_generation_config_of_the_engine():
    with LLM("vjax-tiny", **SMALL, generation_config="vllm") as llm:
        token = one(llm, TEXT).token_ids[0]
    override = {"temperature": 0.0, "max_new_tokens": 3, "eos_token_id": [4095, token]}
    with LLM("vjax-tiny", **SMALL, override_generation_config=override, stream_interval=4) as llm:
        assert llm.get_default_sampling_params().is_greedy
        (first,), (second,) = (llm.generate(TEXT, use_tqdm=False) for _ in range(2))
        assert first.outputs == second.outputs
        ended = first.outputs[0]
        assert (ended.token_ids, ended.finish_reason, ended.stop_reason) == ([token], "stop", token)
        went_on = one(llm, TEXT, greedy(ignore_eos=True))
        assert went_on.token_ids[0] == token and len(went_on.token_ids) == 12
        for ignore_eos in (False, True):  # until min_tokens the ids cannot be drawn, whatever they do afterwards
            masked = one(llm, TEXT, greedy(min_tokens=6, ignore_eos=ignore_eos))
            assert len(masked.token_ids) >= 6 and token not in masked.token_ids[:5]
        # The engine's interval is the least.
        params = {str(n): (TEXT, greedy(ignore_eos=True, stream_interval=n)) for n in (None, 2, 6)}
        outputs = stream(llm.llm_engine, params)
        lengths = {name: [len(o.outputs[0].token_ids) for o in outs] for name, outs in outputs.items()}
        assert lengths == {"None": [1, 5, 9, 12], "2": [1, 5, 9, 12], "6": [1, 7, 12]}
