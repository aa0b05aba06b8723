"""`vjax run FILE.yaml`: one config file in, completions out."""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from vjax.cli.output import open_output, record, write
from vjax.cli.run_output import open_run_output
from vjax.config.file import RunFile, load_run_file
from vjax.config.resolved import identity, to_yaml
from vjax.errors import VjaxValidationError


class _PrintSchema(argparse.Action):
    """Like --help: prints and exits, whatever else is on the command line."""

    def __init__(self, option_strings: Any, dest: str, **others: Any):
        super().__init__(option_strings, dest, nargs=0, **others)

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from vjax.config.run_schema import schema_text

        print(schema_text(), end="")
        parser.exit()


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "run",
        allow_abbrev=False,
        help="run a config file",
        description="Runs the prompts of a YAML file: sections engine, sampling, prompts and output, and extends. With "
        "an output file a line is written as each request finishes, and the same command continues a run that was "
        "stopped.",
        epilog="Any value can be overridden: vjax run FILE.yaml --sampling.max_tokens 64 --engine.max_num_seqs 8",
    )
    parser.add_argument("file", metavar="FILE.yaml", help="the run file; configs/quickstart.yaml is an example")
    parser.add_argument("--prompts", metavar="FILE", help="a .txt or .jsonl file in place of the file's prompts")
    parser.add_argument("--output", metavar="FILE", help="where the completions go, one JSON object per line")
    parser.add_argument("--overwrite", action="store_true", help="start the output file afresh, whatever it holds")
    parser.add_argument("--json", action="store_true", help="print JSON where there is no output file")
    parser.add_argument("--print-config", action="store_true", help="print every value and its source; run nothing")
    parser.add_argument("--save-config", metavar="FILE", type=Path, help="write the same as a run file, and run")
    parser.add_argument("--schema", action=_PrintSchema, help="print the JSON schema of run files, for editors")
    parser.set_defaults(handler=handle, takes_overrides=("engine", "sampling"))


def handle(args: argparse.Namespace) -> int:
    sections = [f"--{name}={value}" for name in ("prompts", "output") if (value := getattr(args, name)) is not None]
    run = load_run_file(args.file, args.overrides + sections)
    if args.save_config is not None:
        with open_output(args.save_config) as stream:
            stream.write(to_yaml(run))
    if args.print_config:
        print(to_yaml(run), end="")
        return 0
    return _print(run, as_json=args.json) if run.output is None else _write(run, run.output, overwrite=args.overwrite)


def _print(run: RunFile, *, as_json: bool) -> int:
    """Runs all prompts and prints them in their order."""
    outputs = dict(_finished(run, frozenset()))
    for index in sorted(outputs):
        if as_json:
            for line in _records(index, outputs[index]):
                print(json.dumps(line, ensure_ascii=False))
        else:
            write(sys.stdout, [outputs[index]], as_json=False)
    return _report_failures([(index, output) for index, output in sorted(outputs.items())])


def _write(run: RunFile, path: Path, *, overwrite: bool) -> int:
    """Runs the prompts that the file lacks."""
    num_completions = 1 if run.sampling is None else run.sampling.n
    total = len(run.prompts)
    failed = []
    with open_run_output(path, identity(run), num_completions, overwrite=overwrite) as file:
        num_done = len(file.done)
        if num_done == total:
            file.finish()
            print(f"all of {total} prompts are in {path} already; --overwrite runs them again", file=sys.stderr)
            return 0
        if num_done:
            print(f"{num_done} of {total} prompts are in {path} already; going on from there", file=sys.stderr)
        try:
            for index, output in _finished(run, file.done):
                file.write(index, _records(index, output))
                if any(completion.error for completion in output.outputs):
                    failed.append((index, output))
        except KeyboardInterrupt:
            print(f"{len(file.done)} of {total} prompts are in {path}; the same command continues", file=sys.stderr)
            raise
        file.finish()
    print(f"wrote {(total - num_done) * num_completions} completions to {path}", file=sys.stderr)
    return _report_failures(failed)


def _finished(run: RunFile, done: frozenset[int]) -> Iterator[tuple[int, Any]]:
    """Index and RequestOutput of the prompts that are not done, as they finish."""
    from vjax.llm import LLM
    from vjax.sampling_params import RequestOutputKind

    with LLM.from_engine_args(run.engine) as llm:
        engine = llm.llm_engine
        params = (run.sampling or llm.get_default_sampling_params()).clone()
        params.output_kind = RequestOutputKind.FINAL_ONLY
        # As the engine draws them for requests without one, but by index: it is the same when others are done already.
        seeds = random.Random(run.engine.seed)
        for index, prompt in enumerate(run.prompts):
            of_prompt = params.clone()
            seed = seeds.getrandbits(63)
            if params.seed is None and run.engine.seed is not None:
                of_prompt.seed = seed
            if index in done:
                continue
            try:
                engine.add_request(str(index), _engine_prompt(llm, prompt), of_prompt)
            except VjaxValidationError as e:
                raise VjaxValidationError(f"prompts[{index}]: {e}", parameter=e.parameter, value=e.value) from e
        hidden = not sys.stderr.isatty()
        with tqdm(total=len(run.prompts), initial=len(done), unit="prompt", disable=hidden) as progress:
            while engine.has_unfinished_requests():
                for output in engine.step():
                    progress.update()
                    yield int(output.request_id), output


def _engine_prompt(llm: Any, prompt: str | dict[str, Any]) -> Any:
    """Conversations go through the chat template."""
    from vjax.text.chat import chat_prompt

    if isinstance(prompt, dict) and "messages" in prompt:
        return chat_prompt(llm.get_tokenizer(), prompt["messages"]) | {"cache_salt": prompt.get("cache_salt")}
    return prompt


def _records(index: int, output: Any) -> list[dict[str, Any]]:
    """The lines of a prompt. Seconds count from the request's arrival, waiting included."""
    metrics = output.metrics
    first = seconds = None
    if metrics is not None and metrics.first_token_ts:
        first = round(metrics.first_token_latency, 6)
        seconds = round(metrics.first_token_latency + metrics.last_token_ts - metrics.first_token_ts, 6)
    timing = {"seconds_to_first_token": first, "seconds": seconds}
    return [{"prompt_index": index, **record(output, completion), **timing} for completion in output.outputs]


def _report_failures(outputs: list[tuple[int, Any]]) -> int:
    """The exit code."""
    failed = [(index, c.error) for index, output in outputs for c in output.outputs if c.error]
    for index, error in failed:
        print(f"vjax: prompts[{index}] failed: {error}", file=sys.stderr)
    return 1 if failed else 0
