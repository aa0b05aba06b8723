"""The finite, named shapes of the step. Knows no jax: choosing a bucket is host work on every step.

`forward` has two families: decode buckets (one token a sequence, tokens == sequences) and mixed buckets (ragged prompt
chunks after decode rows). `sample` has one family, by the number of rows that need logits.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass

# Dense where padding costs: 1,024 rows take 6 ms more than 768, while 32 rows take as long as 16.
_GPU_DECODE = (1, 2, 4, 8, 16, 32, 48, 64, 96, 128, 192, 256, 320, 384, 448, 512, 640, 768, 896, 1024)
_GPU_MIXED = (64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
#: Mixed buckets of fewer sequences beside those of as many as may run: their last layer is computed for fewer tokens.
_GPU_FEW_SEQS = ((2048, 64), (8192, 64))
_GPU_SAMPLE = (1, 8, 32, 64, 128, 256, 384, 512, 768, 1024)
# XLA compiles for the CPU on the cores that serve: few, wide steps between buckets.
_CPU_DECODE = (4, 16, 64, 256, 1024)
_CPU_MIXED = (16, 64, 256, 1024, 4096)
_CPU_SAMPLE = (4, 16, 64, 256, 1024)
#: Of mixed buckets with an opening: more tokens keep the device busy for so long that their start does not count.
_MAX_OPENED_TOKENS = 8192
#: Layers x tokens of an opening: on an H200 as long as the host takes to dispatch the layers behind it.
_OPENED = 4096


@dataclass(frozen=True, order=True)
class ForwardBucket:
    """Shape of one forward executable: `num_tokens` tokens of at most `num_seqs` sequences."""

    num_tokens: int
    num_seqs: int
    decode_only: bool
    #: The executable also returns the hidden state of every token, for log probabilities of prompts and for pooling.
    keeps_hidden: bool = False
    #: Layers that run in a program of their own, dispatched before this one's: an idle device works on them while the
    #: host dispatches the others.
    opening: int = 0

    @property
    def selects_last(self) -> bool:
        """Whether the last layer computes one token a sequence only, the last, which is sampled from."""
        return self.num_seqs < self.num_tokens and not self.keeps_hidden

    @property
    def name(self) -> str:
        family = "decode" if self.decode_only else "mixed"
        size = f"{self.num_tokens}" if self.decode_only else f"{self.num_tokens}, {self.num_seqs} sequences"
        return f"{family}{'_keeping_hidden' if self.keeps_hidden else ''}[{size}]"


def _sizes(preferred: tuple[int, ...], largest: int) -> tuple[int, ...]:
    """`preferred` sizes below `largest`, doubled past its end, then `largest` itself."""
    sizes = [s for s in preferred if s < largest]
    while sizes and sizes[-1] * 2 < largest:
        sizes.append(sizes[-1] * 2)
    return (*sizes, largest)


def _opening(num_tokens: int, num_layers: int) -> int:
    """Layers of the opening, at most a quarter of all."""
    if num_tokens > _MAX_OPENED_TOKENS:
        return 0
    return min(max(_OPENED // num_tokens, 1), num_layers // 4)


def _first_of_their_tokens(shapes: list[tuple[int, int]]) -> Iterator[tuple[tuple[int, int], bool]]:
    """Each shape, and whether it is the first with its number of tokens: the one that a single prompt takes."""
    for index, shape in enumerate(shapes):
        yield shape, index == 0 or shapes[index - 1][0] != shape[0]


@dataclass(frozen=True)
class Buckets:
    """All shapes that an engine can run, each family in rising order."""

    decode: tuple[ForwardBucket, ...]
    mixed: tuple[ForwardBucket, ...]
    sample: tuple[int, ...]

    @classmethod
    def build(
        cls,
        *,
        max_num_batched_tokens: int,
        max_num_seqs: int,
        platform: str,
        pools: bool = False,
        num_layers: int = 0,
    ) -> Buckets:
        """Buckets that cover every step of at most `max_num_batched_tokens` tokens and `max_num_seqs` sequences.

        Args:
            pools: For a model that pools: forwards keep hidden states, nothing is sampled, and there is no decoding.
            num_layers: Of the model, where mixed buckets may have openings: on one GPU. 0: nowhere.
        """
        gpu = platform == "gpu"
        decode = _sizes(_GPU_DECODE if gpu else _CPU_DECODE, max_num_seqs)
        mixed = _sizes(_GPU_MIXED if gpu else _CPU_MIXED, max_num_batched_tokens)
        if pools:
            return cls((), tuple(ForwardBucket(n, min(n, max_num_seqs), False, keeps_hidden=True) for n in mixed), ())
        shapes = {(n, min(n, max_num_seqs)) for n in mixed}
        if gpu:
            shapes |= {(n, num_seqs) for n, num_seqs in _GPU_FEW_SEQS if n in mixed and num_seqs < max_num_seqs}
        return cls(
            decode=tuple(ForwardBucket(n, n, True) for n in decode),
            mixed=tuple(
                ForwardBucket(n, num_seqs, False, opening=_opening(n, num_layers) if is_first else 0)
                for (n, num_seqs), is_first in _first_of_their_tokens(sorted(shapes))
            ),
            sample=_sizes(_GPU_SAMPLE if gpu else _CPU_SAMPLE, max_num_seqs),
        )

    def forward_bucket(self, num_tokens: int, num_seqs: int) -> ForwardBucket:
        """The tightest bucket that fits a step."""
        family = self.decode if num_tokens == num_seqs and self.decode else self.mixed
        index = bisect_left(family, num_tokens, key=lambda b: b.num_tokens)
        while family[index].num_seqs < num_seqs:
            index += 1
        return family[index]
