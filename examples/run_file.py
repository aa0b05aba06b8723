"""Run files: engine, sampling, prompts and output in one YAML file, from the shell and from Python.

    python examples/run_file.py [--model FOLDER_OR_HUB_ID]

Writes a run file that extends configs/quickstart.yaml and runs it, as `vjax run` in a shell would, twice: the second
run finds that nothing is left to do.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

from vjax import LLM, ConfigError
from vjax.cli.main import main as vjax
from vjax.config.file import load_run_file

QUICKSTART = Path(__file__).resolve().parents[1] / "configs" / "quickstart.yaml"
PROMPTS = [{"prompt": "def area(radius):\n"}, {"messages": [{"role": "user", "content": "Write a function `stop`."}]}]


def main(model: str = "vjax-tiny") -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "prompts.jsonl").write_text("".join(json.dumps(prompt) + "\n" for prompt in PROMPTS))
        run_file = folder / "run.yaml"
        run_file.write_text(f"extends: {QUICKSTART}\nsampling: {{max_tokens: 24}}\nprompts: prompts.jsonl\n")
        print(f"run.yaml:\n{run_file.read_text()}")

        # What a shell does: vjax run run.yaml --output out.jsonl --engine.model MODEL
        command = ["run", str(run_file), "--output", str(folder / "out.jsonl"), "--engine.model", model]
        print("exit codes:", vjax(command), vjax(command))
        for line in (folder / "out.jsonl").read_text().splitlines():
            record = json.loads(line)
            print(f"prompt {record['prompt_index']}, {record['finish_reason']}: {record['text']!r}")

        # What Python does: the file's values, the command line's winning over them, as the records that LLM takes.
        run = load_run_file(run_file, ["--engine.model", model, "--sampling.max_tokens", "4"])
        with LLM.from_engine_args(run.engine) as llm:
            output = llm.generate(run.prompts[0], run.sampling, use_tqdm=False)[0]
        print(f"from Python, 4 tokens of the same: {output.outputs[0].text!r}")

        # All mistakes are reported at once, each with the nearest key there is.
        try:
            load_run_file(run_file, ["--engine.max_num_seq", "4", "--sampling.temperature", "hot"])
        except ConfigError as error:
            print(str(error).replace(name, "..."))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vjax-tiny", help="default: the bundled model")
    main(parser.parse_args().model)
