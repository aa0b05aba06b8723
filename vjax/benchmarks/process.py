"""A measurement in a Python process of its own: nothing imported, no device taken, nothing compiled in memory.

`call` is the parent's side; `python -m vjax.benchmarks.process` is the child's. Arguments and result are JSON.
"""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

from vjax.errors import VjaxValidationError

#: What a child can be asked for -> module and function.
TASKS = {
    "startup": ("vjax.benchmarks.startup", "measure_in_child"),
    "throughput": ("vjax.benchmarks.throughput", "measure_in_child"),
}


class ProcessFailed(RuntimeError):
    """The child ended without a result; what it had to say is on stderr."""


def call(task: str, arguments: Mapping[str, Any], environment: Mapping[str, str] | None = None) -> Any:
    """Runs a task with keyword arguments in a new process and returns its result. The child's stderr is this one's.

    Args:
        environment: All of its environment variables; None is this process's.

    Raises:
        VjaxValidationError: The child raised one.
        ProcessFailed: It ended otherwise.
    """
    child = subprocess.run(
        [sys.executable, "-m", "vjax.benchmarks.process"],
        input=json.dumps({"task": task, "arguments": arguments}),
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )
    if child.returncode != 0 or not child.stdout:
        raise ProcessFailed(f"The process that measures ended with code {child.returncode}; see its messages above.")
    reply = json.loads(child.stdout.splitlines()[-1])
    if "refused" in reply:
        raise VjaxValidationError(reply["refused"])
    return reply["result"]


def main() -> None:
    """The child: one request on standard input, the reply as the last line of standard output."""
    request = json.load(sys.stdin)
    module, function = TASKS[request["task"]]
    try:
        reply = {"result": getattr(importlib.import_module(module), function)(**request["arguments"])}
    except VjaxValidationError as e:
        reply = {"refused": str(e)}
    except KeyboardInterrupt:
        # Ctrl-C goes to the parent too, which says so.
        sys.exit(130)
    print(json.dumps(reply))


if __name__ == "__main__":
    main()
