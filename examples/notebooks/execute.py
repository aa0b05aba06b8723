"""Executes the notebooks of this folder, on the CPU and without the network, and keeps their outputs.

    python examples/notebooks/execute.py                 # all of them, in place
    python examples/notebooks/execute.py quickstart      # one of them
    python examples/notebooks/execute.py --output-dir DIR

Needs the extra `notebooks`.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
NAMES = ("quickstart", "v0_to_v1", "prefix_caching", "inside_the_step")
#: What every kernel gets; whoever opens a notebook elsewhere has their own settings, and more log.
_ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "VJAX_LOG_LEVEL": "WARNING",
    "VJAX_USE_V1": "",
    "VLLM_USE_V1": "",
    "PYDEVD_DISABLE_FILE_VALIDATION": "1",  # the kernel's debugger would warn about frozen modules
}


def execute(source: Path, target: Path) -> Any:
    """Runs every cell of a notebook in a new kernel of this Python and writes the notebook with its outputs.

    Returns:
        The executed notebook, an nbformat.NotebookNode.

    Raises:
        nbclient.exceptions.CellExecutionError: A cell failed; the text has its traceback.
    """
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(source, as_version=4)
    client = NotebookClient(
        notebook,
        timeout=300,
        kernel_name="python3",
        record_timing=False,
        coalesce_streams=True,
        resources={"metadata": {"path": str(HERE)}},
    )
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    client.execute(env=os.environ | _ENVIRONMENT | {"PYTHONPATH": path})
    # What is said of the kernel is the same wherever it ran.
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    nbformat.write(notebook, target)
    return notebook


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"notebooks; default: {' '.join(NAMES)}")
    parser.add_argument("--output-dir", type=Path, default=HERE, help="where the executed ones go; default: in place")
    args = parser.parse_args()
    names = [name.removesuffix(".ipynb") for name in map(os.path.basename, args.names)]
    unknown = sorted(set(names) - set(NAMES))
    if unknown:
        parser.error(f"no notebook {', '.join(unknown)}; there are {', '.join(NAMES)}")
    args.output_dir.mkdir(parents=True, exist_ok=True)
    for name in names or NAMES:
        start = time.perf_counter()
        execute(HERE / f"{name}.ipynb", args.output_dir / f"{name}.ipynb")
        print(f"{name}: {time.perf_counter() - start:.1f} s", file=sys.stderr)


if __name__ == "__main__":
    main()
