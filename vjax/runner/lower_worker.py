"""`python -m vjax.runner.lower_worker`: lowers programs for another process, in one without a device.

Reads pickles from stdin: the digest of the sources and a description, then keys. Answers each key on stdout with a
pickle of the exported program (bytes) or of what went wrong (str). Ends with its input.
"""

from __future__ import annotations

import os
import pickle
import sys

from vjax.runner.exported import StepDescription, export_program
from vjax.runner.lowered_cache import source_digest


def main() -> None:
    requests = sys.stdin.buffer
    # Whatever prints in here must not end up between the answers.
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    try:
        digest, description = pickle.load(requests)
    except EOFError:
        return
    if digest != source_digest():
        raise SystemExit("the sources changed since the engine's process imported them")
    assert isinstance(description, StepDescription)
    description.set_jax_options()
    step = description.make_step()
    while True:
        try:
            key = pickle.load(requests)
        except EOFError:
            return
        try:
            answer = export_program(description, step, key)
        except Exception as e:
            answer = f"{type(e).__name__}: {e}"
        pickle.dump(answer, answers)
        answers.flush()


if __name__ == "__main__":
    main()
