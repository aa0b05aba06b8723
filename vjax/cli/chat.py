"""`vjax chat`: a conversation in the terminal. Answers appear as they are generated."""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections.abc import Generator, Iterator
from typing import Any

from vjax.cli import chat_options, engine_options
from vjax.errors import VjaxValidationError

_HELP = "/new starts over, /undo takes the last exchange back, /quit or Ctrl-D ends, Ctrl-C stops an answer"
_SAMPLING = ("temperature", "top_p", "top_k", "seed")


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "chat",
        allow_abbrev=False,
        help="talk to a chat model",
        description=(
            "Reads a message a line, from the terminal or a pipe, and prints each answer as it is generated; speed and "
            f"cached tokens go to stderr. {_HELP}."
        ),
        epilog=engine_options.EPILOG,
    )
    engine_options.add_model(parser)
    chat_options.add_template(parser)
    parser.add_argument("--system", metavar="TEXT", help="the system message")
    parser.add_argument("--max-tokens", type=int, default=512, help="longest answer (default: %(default)s)")
    parser.add_argument("--temperature", type=float, default=None, help="0 is greedy (default: the model's)")
    parser.add_argument("--top-p", type=float, default=None, help="draw from the most probable tokens of this mass")
    parser.add_argument("--top-k", type=int, default=None, help="draw from this many most probable tokens")
    parser.add_argument("--seed", type=int, default=None, help="makes the answers reproducible")
    parser.set_defaults(handler=handle, takes_overrides=("engine",))


def handle(args: argparse.Namespace) -> int:
    from vjax.sampling_params import RequestOutputKind, SamplingParams

    engine = engine_options.engine_arguments(args, "vjax chat")
    fields = {name: value for name in _SAMPLING if (value := getattr(args, name)) is not None}
    fields |= {"max_tokens": args.max_tokens, "output_kind": RequestOutputKind.DELTA}
    template = chat_options.read_template(args.chat_template)
    SamplingParams(**fields)  # what is wrong is said before a model is loaded
    from vjax.llm import LLM

    with LLM(**engine) as llm:
        template = llm.get_tokenizer().get_chat_template(template, has_tools=False)
        params = dataclasses.replace(llm.get_default_sampling_params(), **fields)
        conversation = Conversation(llm, params, args.system, template)
        if sys.stdin.isatty():
            print(_HELP, file=sys.stderr)
        for line in _messages():
            _turn(conversation, line)
    return 0


class Conversation:
    """Messages and the engine that answers them."""

    def __init__(self, llm: Any, params: Any, system: str | None, chat_template: str | None = None):
        self._llm, self._params, self._chat_template = llm, params, chat_template
        self._start = [{"role": "system", "content": system}] if system else []
        self.messages: list[dict[str, str]] = list(self._start)
        self._turns = 0

    def reset(self) -> None:
        self.messages = list(self._start)

    def undo(self) -> None:
        """Takes the last message and its answer back."""
        if len(self.messages) > len(self._start):
            del self.messages[-2:]

    def answer(self, text: str) -> Generator[tuple[str, Any], None, None]:
        """(more of the answer, the request's latest output), until it is finished.

        Closing the iterator ends the request; what was said until then stays in the conversation.

        Raises:
            VjaxValidationError: The conversation does not fit the model. It is as it was.
        """
        from vjax.text.chat import chat_prompt

        engine = self._llm.llm_engine
        messages = [*self.messages, {"role": "user", "content": text}]
        request_id = f"chat-{self._turns}"
        self._turns += 1
        prompt = chat_prompt(self._llm.get_tokenizer(), messages, chat_template=self._chat_template)
        engine.add_request(request_id, prompt, self._params)
        said: list[str] = []
        try:
            while engine.has_unfinished_requests():
                for output in engine.step():
                    said.append(output.outputs[0].text)
                    yield said[-1], output
        finally:
            engine.abort_request(request_id)
            self.messages = [*messages, {"role": "assistant", "content": "".join(said)}]


def _messages() -> Iterator[str]:
    """Lines of standard input that are not empty, until it ends."""
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return
        if line.strip():
            yield line.strip()


def _turn(conversation: Conversation, line: str) -> None:
    """A command, or a message and its answer."""
    if line == "/new":
        conversation.reset()
    elif line == "/undo":
        conversation.undo()
    elif line == "/quit":
        raise SystemExit(0)
    elif line.startswith("/"):
        print(_HELP, file=sys.stderr)
    else:
        _answer(conversation, line)


def _answer(conversation: Conversation, line: str) -> None:
    start, num_tokens, last = time.perf_counter(), 0, None
    answer = conversation.answer(line)
    try:
        for text, last in answer:
            num_tokens += len(last.outputs[0].token_ids)
            print(text, end="", flush=True)
    except KeyboardInterrupt:
        answer.close()
    except VjaxValidationError as e:
        print(f"vjax: {e} Say it more briefly, or start over with /new.", file=sys.stderr)
        return
    seconds = time.perf_counter() - start
    print(flush=True)
    if last is not None:
        error = last.outputs[0].error
        if error:
            print(f"vjax: the request failed: {error}", file=sys.stderr)
        print(
            f"[{num_tokens} tokens, {num_tokens / seconds:.1f} a second; {last.num_cached_tokens or 0} of "
            f"{len(last.prompt_token_ids or ())} prompt tokens were cached]",
            file=sys.stderr,
        )
