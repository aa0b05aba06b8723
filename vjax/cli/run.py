"""`vjax run FILE.yaml`: one config file in, completions out."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from vjax.config.file import RunFile, load_run_file


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "run",
        help="run a config file",
        description="Runs the prompts of a YAML file: sections engine, sampling, prompts and output.",
        epilog="Any value can be overridden: vjax run FILE.yaml --sampling.max_tokens 64 --engine.max_num_seqs 8",
    )
    parser.add_argument("file", metavar="FILE.yaml", help="the run file; configs/quickstart.yaml is an example")
    parser.set_defaults(handler=handle, takes_overrides=True)


def handle(args: argparse.Namespace) -> int:
    run = load_run_file(args.file, args.overrides)
    from vjax.llm import LLM

    with LLM.from_engine_args(run.engine) as llm:
        outputs = generate(llm, run)
        with _open(run.output) as stream:
            write(stream, outputs, as_json=run.output is not None)
    if run.output is not None:
        print(f"wrote {len(outputs)} completions to {run.output}", file=sys.stderr)
    return 0


def generate(llm: Any, run: RunFile) -> list[Any]:
    """RequestOutputs of the file's prompts, in their order. Conversations go through the chat template."""
    from vjax.text.chat import chat_prompt

    prompts = [
        chat_prompt(llm.get_tokenizer(), p["messages"]) if isinstance(p, dict) and "messages" in p else p
        for p in run.prompts
    ]
    return llm.generate(prompts, run.sampling)


def write(stream: TextIO, outputs: Iterable[Any], *, as_json: bool) -> None:
    """One JSON object per completion, or prompt and text for people."""
    for output in outputs:
        for completion in output.outputs:
            if as_json:
                stream.write(json.dumps(record(output, completion), ensure_ascii=False) + "\n")
            else:
                stream.write(f"--- {output.prompt or output.prompt_token_ids}\n{completion.text}\n")


def record(output: Any, completion: Any) -> dict[str, Any]:
    """What an output file holds of one completion."""
    return {
        "request_id": output.request_id,
        "index": completion.index,
        "prompt": output.prompt,
        "text": completion.text,
        "token_ids": list(completion.token_ids),
        "finish_reason": completion.finish_reason,
        "stop_reason": completion.stop_reason,
        "num_prompt_tokens": len(output.prompt_token_ids or ()),
        "num_cached_tokens": output.num_cached_tokens,
    }


@contextmanager
def _open(path: Path | None) -> Iterator[TextIO]:
    if path is None:
        yield sys.stdout
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as stream:
        yield stream
