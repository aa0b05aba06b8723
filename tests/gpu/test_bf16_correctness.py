"""The bundled model in bfloat16 against Hugging Face in float32, wherever float32 is clear about the next token.

Clear: the margin between the two largest float32 logits exceeds four times the largest logit error that Hugging Face's
own bfloat16 model makes at that very position, given the same tokens. There, a correct bfloat16 engine has to choose
the float32 token; elsewhere any choice is as good as Hugging Face's.
"""

from __future__ import annotations

import sysconfig
from pathlib import Path

import numpy as np
import pytest

from tests.gpu.engines import generated_ids, greedy, make_llm
from tests.gpu.hf_oracle import Margins, margins
from vjax.text.load import load_tokenizer
from vjax.weights.hub import resolve_model_path

pytestmark = pytest.mark.gpu

NUM_TOKENS = 64
LENGTHS = (2, 16, 17, 40, 64, 100, 150, 300)
#: Standard library modules; eight prompts of each length, seven of text and one of random ids.
SOURCES = ("argparse.py", "textwrap.py", "queue.py", "heapq.py", "shlex.py", "fractions.py", "calendar.py")
CLEAR = 4.0


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    """64 prompts: slices of seven modules of the standard library, each length from another place, and random ids."""
    tokenizer, rng = load_tokenizer(resolve_model_path("vjax-tiny")), np.random.default_rng(0)
    folder = Path(sysconfig.get_paths()["stdlib"])
    texts = [tokenizer.encode((folder / name).read_text(encoding="utf-8")[:12000]) for name in SOURCES]
    found = []
    for index, length in enumerate(LENGTHS):
        start = 311 * index
        found += [list(text[start : start + length]) for text in texts]
        found.append(rng.integers(2, tokenizer.vocab_size, length).tolist())
    assert len(found) == 64 and all(len(p) in LENGTHS for p in found)
    return found


@pytest.fixture(scope="module")
def oracle(prompts, tmp_path_factory) -> Margins:
    return margins(resolve_model_path("vjax-tiny"), prompts, NUM_TOKENS, tmp_path_factory.mktemp("oracle"))


@pytest.fixture(scope="module")
def llm():
    with make_llm(dtype="bfloat16", skip_tokenizer_init=True) as engine:
        engine.llm_engine.warm_up()
        yield engine


def test_the_oracle_is_clear_at_most_positions(oracle, say):
    clear, same = oracle.margin > CLEAR * oracle.bf16_error, oracle.bf16_ids == oracle.token_ids
    error = np.quantile(oracle.bf16_error, [0.5, 0.99, 1.0])
    say(
        f"\nHugging Face bfloat16 on {oracle.bf16_device}: logit error median {error[0]:.3f}, 99 % {error[1]:.3f}, "
        f"largest {error[2]:.3f}; margin median {np.median(oracle.margin):.3f}; {clear.sum()} of {clear.size} "
        f"positions are clear; argmax agrees at {same.sum()} in all and at {same[clear].sum()} of the clear ones"
    )
    assert clear.mean() > 0.5
    assert same[clear].all()


def test_teacher_forced_argmax(llm, prompts, oracle, say):
    """One token for every prefix of every oracle sequence: 64 x 64 requests that share prefixes."""
    ids = [p + tokens.tolist() for p, tokens in zip(prompts, oracle.token_ids, strict=True)]
    prefixes = [s[: len(p) + i] for s, p in zip(ids, prompts, strict=True) for i in range(NUM_TOKENS)]
    found = np.array(generated_ids(llm, prefixes, greedy(1))).reshape(oracle.token_ids.shape)
    clear, same = oracle.margin > CLEAR * oracle.bf16_error, found == oracle.token_ids
    say(
        f"\nteacher-forced: {clear.sum()} of {clear.size} positions compared, {(~same & clear).sum()} violations; "
        f"argmax agrees at {same.sum()} positions in all ({same.mean():.2%})"
    )
    wrong = [(int(r), int(c), _describe(oracle, r, c, found[r, c])) for r, c in np.argwhere(clear & ~same)]
    assert not wrong, wrong[:10]


def test_free_running_decode(llm, prompts, oracle, say):
    """64 tokens in one go, so that every token but the first comes from a decode step."""
    llm.reset_prefix_cache()
    found = np.array(generated_ids(llm, prompts, greedy(NUM_TOKENS)))
    clear, same = oracle.margin > CLEAR * oracle.bf16_error, found == oracle.token_ids
    first = [(row, int(np.argmin(same[row]))) for row in range(len(prompts)) if not same[row].all()]
    say(
        f"\nfree-running: {len(prompts) - len(first)} of {len(prompts)} sequences equal float32's over {NUM_TOKENS} "
        f"tokens; {sum(bool(clear[at]) for at in first)} first divergences at clear positions"
    )
    wrong = [
        (row, column, _describe(oracle, row, column, found[row, column])) for row, column in first if clear[row, column]
    ]
    assert not wrong, wrong[:10]


def _describe(oracle: Margins, row: int, column: int, found: int) -> str:
    return (
        f"got {found}, float32 has {oracle.token_ids[row, column]} with a margin of {oracle.margin[row, column]:.3f} "
        f"where Hugging Face's bfloat16 is off by {oracle.bf16_error[row, column]:.3f}"
    )
