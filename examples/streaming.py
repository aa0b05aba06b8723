"""Streaming: step the engine yourself, and see requests join and leave the running batch.

    python examples/streaming.py [--model FOLDER_OR_HUB_ID]

A step gives each running request its next token, which the next call of `step` returns: the host prepares a step while
the device runs the one before. With RequestOutputKind.DELTA an output holds what is new in it.
"""

from __future__ import annotations

import argparse

from vjax import LLM, RequestOutputKind, SamplingParams

#: Before which step a request is added: name, prompt, number of tokens.
ARRIVALS = {
    0: ("stack", "class Stack:\n    def push(self, item):\n", 14),
    4: ("area", "def area(radius):\n", 6),
    8: ("never", "import os\n", 100),
}
ABORT_AT = 12


def main(model: str = "vjax-tiny") -> None:
    engine = LLM(model).llm_engine
    texts: dict[str, str] = {}
    step = 0
    while engine.has_unfinished_requests() or step <= max(ARRIVALS):
        if step in ARRIVALS:
            name, prompt, max_tokens = ARRIVALS[step]
            kind = RequestOutputKind.DELTA
            params = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True, output_kind=kind)
            engine.add_request(name, prompt, params)
        if step == ABORT_AT:
            engine.abort_request(["never"])
            print("(request never is aborted)")
        new = []
        for output in engine.step():
            completion = output.outputs[0]
            texts[output.request_id] = texts.get(output.request_id, "") + completion.text
            ended = f" ({completion.finish_reason})" if output.finished else ""
            new.append(f"{output.request_id}: {completion.text!r}{ended}")
        print(f"step {step:2d}  {'  '.join(new)}".rstrip())
        step += 1
    for name, text in texts.items():
        print(f"--- {name}\n{text}")
    engine.shutdown()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vjax-tiny", help="default: the bundled model")
    main(parser.parse_args().model)
