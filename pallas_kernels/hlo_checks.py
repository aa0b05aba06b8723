"""What a compiled step must not hold: instructions that materialise an array of a KV cache's shape.

Works on the text of an optimised module (`compiled.as_text()`) of any backend.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?[\w.-]+ = (.+)$")
_SHAPE = re.compile(r"\b[a-z]+[0-9]*[a-z0-9]*\[([0-9,]*)\]")
_OPCODE = re.compile(r"(?:^|[\s)}\]])([a-z][a-z0-9-]*)\(")
_MATERIALISING = frozenset({"copy", "copy-start", "convert", "transpose", "broadcast", "pad", "concatenate", "reverse"})


def cache_copies(compiled_text: str, cache_shapes: Iterable[Sequence[int]]) -> list[str]:
    """The instructions that copy, convert, transpose, pad, ... into a result of a cache's shape.

    A fusion counts when its body holds such an instruction, because bodies are part of the text. Shapes are compared
    up to the order of the dimensions and up to merging of neighbours, so a transposed or flattened copy counts too;
    choose num_blocks so that no other array of the step has a cache's shape in that sense.

    Args:
        compiled_text: `compiled.as_text()`.
        cache_shapes: Shapes of the cache arrays, per device when they are sharded.

    Returns:
        The offending lines, stripped, in order; empty when the step works in place.
    """
    forms = set().union(*(_merged_forms(tuple(shape)) for shape in cache_shapes))
    found = []
    for line in compiled_text.splitlines():
        match = _INSTRUCTION.match(line)
        opcode = _OPCODE.search(match.group(1)) if match else None
        if match is None or opcode is None or opcode.group(1) not in _MATERIALISING:
            continue
        result = match.group(1)[: opcode.start(1)]
        if any(_form(dims.split(",")) in forms for dims in _SHAPE.findall(result)):
            found.append(line.strip())
    return found


def _form(dimensions: Iterable[int | str]) -> tuple[int, ...]:
    """The dimensions above 1, sorted: equal for all transpositions of a shape."""
    return tuple(sorted(int(size) for size in dimensions if size not in ("", "1", 1)))


def _merged_forms(shape: tuple[int, ...]) -> set[tuple[int, ...]]:
    """Forms of the shape and of every shape that merging neighbouring dimensions gives."""
    forms = {_form(shape)}
    for i in range(len(shape) - 1):
        forms |= _merged_forms((*shape[:i], shape[i] * shape[i + 1], *shape[i + 2 :]))
    return forms
