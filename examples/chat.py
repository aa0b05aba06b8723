"""Chat: a conversation of two turns, of which the second one finds the first in the prefix cache.

    python examples/chat.py [--model FOLDER_OR_HUB_ID]

`LLM.chat` writes messages with the chat template of the model's tokenizer. `vjax chat` does this in the terminal.
"""

from __future__ import annotations

import argparse

from vjax import LLM, SamplingParams

SYSTEM = "You write short Python functions."
REQUESTS = ["Write a function `stop`: Stop the server.", "Write a function `close`: Close the connection."]


def main(model: str = "vjax-tiny") -> None:
    with LLM(model) as llm:
        params = SamplingParams(temperature=0.0, max_tokens=64)
        messages = [{"role": "system", "content": SYSTEM}]
        for request in REQUESTS:
            messages.append({"role": "user", "content": request})
            output = llm.chat(messages, params, use_tqdm=False)[0]
            answer = output.outputs[0]
            messages.append({"role": "assistant", "content": answer.text})
            print(f"user: {request}\nassistant ({answer.finish_reason}):\n{answer.text}")
            # The engine keeps no conversations: each turn sends all of it, and what was computed before is reused.
            print(f"[{len(output.prompt_token_ids)} prompt tokens, {output.num_cached_tokens} of them cached]\n")
        print("What the model was given, in its own format:")
        print(llm.get_tokenizer().decode(output.prompt_token_ids, skip_special_tokens=False))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vjax-tiny", help="default: the bundled model")
    main(parser.parse_args().model)
