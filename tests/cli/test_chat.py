"""`vjax chat` on the bundled model, its standard input a pipe."""

from __future__ import annotations

import io
import json
import re
import sys

import pytest

from vjax import LLM, SamplingParams
from vjax.cli.chat import Conversation
from vjax.cli.main import main

LIMITS = {"max_model_len": 256, "max_num_seqs": 8, "max_num_batched_tokens": 128, "kv_cache_memory_bytes": 16 << 20}
ENGINE = [f"--engine.{name}={value}" for name, value in LIMITS.items()]
OPTIONS = ["--temperature", "0", "--max-tokens", "12", *ENGINE]


@pytest.fixture(scope="module")
def answers():
    """Greedy answers by `LLM.chat`: of "Hi", then of "Why?", after the system message."""
    system = {"role": "system", "content": "Be brief."}
    messages, found = [system], []
    with LLM("vjax-tiny", **LIMITS) as llm:
        for text in ("Hi", "Why?"):
            messages.append({"role": "user", "content": text})
            (output,) = llm.chat(messages, SamplingParams(temperature=0, max_tokens=12), use_tqdm=False)
            found.append(output.outputs[0].text)
            messages.append({"role": "assistant", "content": found[-1]})
    return found


@pytest.fixture
def chat(monkeypatch, capsys):
    def run(lines: list[str], *options: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        try:
            code = main(["chat", *OPTIONS, *options])
        except SystemExit as e:
            code = e.code
        out, err = capsys.readouterr()
        return code, out, err

    return run


def test_a_template_of_ones_own(chat, answers, tmp_path):
    """It says "Hi" and then "Be brief." as the model's own template does, whatever the message."""
    with LLM("vjax-tiny", **LIMITS) as llm:
        messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
        text = llm.get_tokenizer().apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    file = tmp_path / "own.jinja"
    file.write_text(f"{{{{ {json.dumps(text)} }}}}")
    assert chat(["Bye"], "--chat-template", str(file))[:2] == (0, f"{answers[0]}\n")


def test_answers_follow_from_what_was_said(chat, answers):
    code, out, err = chat(["Hi", "", "Why?"], "--system", "Be brief.")
    assert code == 0 and out == "".join(f"{answer}\n" for answer in answers)
    cached = [int(number) for number in re.findall(r"(\d+) of \d+ prompt tokens were cached", err)]
    assert cached[0] == 0 and cached[1] > 0


def test_commands(chat, answers):
    first, second = answers
    lines = ["Hi", "Why?", "/undo", "Why?", "/new", "Hi", "/what", "/quit", "Hi"]
    code, out, err = chat(lines, "--system", "Be brief.")
    assert code == 0 and out == f"{first}\n{second}\n{second}\n{first}\n"
    assert "/new starts over" in err


def test_a_message_that_does_not_fit_costs_only_itself(chat, answers):
    code, out, err = chat(["x " * 600, "Hi"], "--system", "Be brief.")
    assert code == 0 and out == f"{answers[0]}\n"
    assert "max_model_len" in err and "start over with /new" in err


def test_a_stopped_answer_stays_in_the_conversation():
    with LLM("vjax-tiny", **LIMITS) as llm:
        conversation = Conversation(llm, _delta(40), None)
        answer = conversation.answer("Hi")
        text = next(answer)[0] + next(answer)[0]
        answer.close()
        assert not llm.llm_engine.has_unfinished_requests()
        assert conversation.messages == [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": text}]
        conversation.undo()
        conversation.undo()
        assert conversation.messages == []


def _delta(num_tokens: int) -> SamplingParams:
    from vjax import RequestOutputKind

    return SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True, output_kind=RequestOutputKind.DELTA)


@pytest.mark.parametrize("option", [["--max-tokens", "0"], ["--top-p", "2"], ["--sampling.n=2"]])
def test_bad_options_are_refused_before_a_model_is_loaded(chat, option):
    code, out, err = chat(["Hi"], "--model", "/nowhere", *option)
    assert code == 2 and not out and "nowhere" not in err
