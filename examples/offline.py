"""Offline generation: a list of prompts in, a list of completions out, greedy and sampled.

    python examples/offline.py [--model FOLDER_OR_HUB_ID]

All prompts run together: the engine batches them as it likes, the outputs come back in the order of the prompts.
"""

from __future__ import annotations

import argparse

from vjax import LLM, SamplingParams

PROMPTS = [
    'def read_lines(path):\n    """Return the lines of a file."""\n',
    "class Stack:\n    def __init__(self):\n",
    'class Point:\n    """A point in the plane."""\n\n    def __init__(self, x, y):\n',
]


def main(model: str = "vjax-tiny") -> None:
    with LLM(model) as llm:
        # Temperature 0 takes the most probable token each time; `stop` ends a completion before one of these strings.
        greedy = SamplingParams(temperature=0.0, max_tokens=48, stop=["\n\n"])
        for prompt, output in zip(PROMPTS, llm.generate(PROMPTS, greedy, use_tqdm=False), strict=True):
            completion = output.outputs[0]
            print(
                f"--- {len(output.prompt_token_ids)} prompt tokens, then {len(completion.token_ids)} generated,", end=""
            )
            print(f" ended by {completion.finish_reason} ({completion.stop_reason!r})")
            print(prompt + completion.text)

        # A request with a seed draws the same tokens in any batch; `n` asks for several completions of one prompt.
        sampled = SamplingParams(n=3, temperature=0.8, top_p=0.95, seed=7, max_tokens=12)
        alone = llm.generate(PROMPTS[0], sampled, use_tqdm=False)[0]
        batched = llm.generate(PROMPTS, sampled, use_tqdm=False)[0]
        print("--- three samples of the first prompt")
        for one, other in zip(alone.outputs, batched.outputs, strict=True):
            print(f"{one.index}: {one.text!r}, the same in a batch: {one.token_ids == other.token_ids}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vjax-tiny", help="default: the bundled model")
    main(parser.parse_args().model)
