"""Prefix caching: what prompts share is computed once. Hits, block by block, and what keeps prompts from sharing.

    python examples/prefix_caching.py [--model FOLDER_OR_HUB_ID]

The KV cache is made of blocks of 16 tokens. A full block is found again by a hash of its tokens and of all before them,
so prompts share whole blocks, from the beginning up to where they first differ.
"""

from __future__ import annotations

import argparse

from vjax import LLM, SamplingParams

BLOCK_SIZE = 16
PREFIX = '''class Queue:
    """A queue of bounded length, first in, first out."""

    def __init__(self, size):
        self.size = size
        self.items = []

    def put(self, item):
        if len(self.items) >= self.size:
            raise ValueError("the queue is full")
        self.items.append(item)

'''


def main(model: str = "vjax-tiny") -> None:
    with LLM(model, enable_prefix_caching=True, block_size=BLOCK_SIZE, disable_log_stats=False) as llm:
        params = SamplingParams(temperature=0.0, max_tokens=8)

        def show(what: str, prompt: str | dict) -> None:
            output = llm.generate(prompt, params, use_tqdm=False)[0]
            num_tokens, cached = len(output.prompt_token_ids), output.num_cached_tokens or 0
            found = cached // BLOCK_SIZE
            blocks = "#" * found + "." * (-(-num_tokens // BLOCK_SIZE) - found)
            print(f"{what:22s} {num_tokens:3d} tokens, {cached:3d} cached  {blocks:8s} -> {output.outputs[0].text!r}")

        print("# is a block that was found, . one that was computed")
        show("first prompt", PREFIX + "    def get(self):\n")
        show("other end", PREFIX + "    def clear(self):\n")
        show("other beginning", "import os\n" + PREFIX + "    def get(self):\n")
        show("same prompt, salted", {"prompt": PREFIX + "    def get(self):\n", "cache_salt": "of another customer"})
        show("same prompt again", PREFIX + "    def get(self):\n")
        llm.reset_prefix_cache()
        show("after a reset", PREFIX + "    def get(self):\n")

        counters = {metric.name: getattr(metric, "value", None) for metric in llm.get_metrics()}
        hits, queries = counters["vjax:prefix_cache_hits"], counters["vjax:prefix_cache_queries"]
        print(f"{hits} of {queries} prompt tokens came from the cache")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vjax-tiny", help="default: the bundled model")
    main(parser.parse_args().model)
