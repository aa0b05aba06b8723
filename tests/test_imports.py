"""Who may import whom, and what is never imported at all. The picture is in vjax/README.md."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections import defaultdict
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

LEAVES = {"beam_search", "config", "envs", "errors", "log", "logits_processor", "logprobs", "messages", "metrics"}
LEAVES |= {"outputs", "pooling_params", "request", "sampling_params", "structured_outputs"}
#: Package of vjax -> the packages that it may import, leaves apart.
ALLOWED: dict[str, set[str]] = {
    "__main__": {"cli"},
    "benchmarks": {"llm", "plot", "runner", "scheduler"},
    "cli": {"benchmarks", "llm", "models", "plot", "text", "weights"},
    "engine": {"models", "parallel", "runner", "scheduler", "structured", "text", "v1", "weights"},
    "kv": set(),
    "layers": {"models", "parallel"},
    "llm": {"engine", "llm_pooling", "text"},
    "llm_pooling": {"engine"},
    "models": {"layers"},
    "parallel": set(),
    "parsers": set(),
    "plot": set(),
    "runner": {"models", "parallel", "sample", "weights"},
    "sample": set(),
    "scheduler": {"kv"},
    "structured": {"text"},
    "text": set(),
    "v1": {"engine"},
    "weights": {"layers", "models", "parallel"},
    **{leaf: set() for leaf in LEAVES},
}
#: Packages that call kernels.
USE_KERNELS = {"layers", "sample", "quant", "lora"}
#: They ask which kernels there are, plan a step for them, or compile programs as these are tuned for.
PLAN_KERNELS = {
    "vjax.cli.collect_env",
    "vjax.engine.builder",
    "vjax.runner.executables",
    "vjax.runner.exported",
    "vjax.runner.step",
}
NO_JAX = LEAVES | {"benchmarks", "cli", "kv", "parsers", "plot", "scheduler", "structured", "text"}
#: The only modules that read or set environment variables: the settings, and what JAX itself takes from there.
#: Where torch may be imported, inside a function.
COMPARE_WITH_TORCH = {"pallas_kernels.bench.attention"}
USE_ENVIRONMENT = {"vjax.envs", "vjax.runner.platform"}


@cache
def modules() -> dict[str, ast.Module]:
    """Every module of the two packages, parsed."""
    found = {}
    for package in ("vjax", "pallas_kernels"):
        for path in (ROOT / package).rglob("*.py"):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = ast.parse(path.read_text())
    return found


def imports(name: str, *, at_import: bool = False) -> set[str]:
    """Modules (ours by their full name, others as written) that a module imports.

    Args:
        at_import: Only those that importing it imports: not the ones in functions or under TYPE_CHECKING.
    """
    tree = modules()[name]
    nodes = _executed(tree.body) if at_import else ast.walk(tree)
    found: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"{name} has a relative import"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.add(inner if inner in modules() else node.module)
    return found


def _executed(body: list[ast.stmt]):
    for node in body:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        yield node
        for block in ("body", "orelse", "finalbody"):
            if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                yield from _executed(getattr(node, block, []))
        for handler in getattr(node, "handlers", []):
            yield from _executed(handler.body)


def package_of(name: str) -> str:
    """ "vjax.kv.manager" -> "kv"; "" for vjax itself."""
    return name.partition(".")[2].partition(".")[0]


def of_vjax() -> list[str]:
    return [name for name in modules() if name.startswith("vjax.")]


def test_packages_import_only_what_the_layers_allow():
    wrong = [
        f"{name} imports {other}"
        for name in of_vjax()
        for other in sorted(imports(name))
        if other.startswith("vjax.")
        and package_of(other) not in {package_of(name)} | ALLOWED[package_of(name)] | LEAVES
    ]
    assert not wrong, wrong


def test_every_package_has_its_rule():
    assert {package_of(name) for name in of_vjax()} == set(ALLOWED)


def test_scheduler_and_runner_meet_in_messages_alone():
    for name in of_vjax():
        seen = {package_of(other) for other in imports(name) if other.startswith("vjax.")} | {package_of(name)}
        if {"scheduler", "runner"} <= seen:
            assert package_of(name) in ("engine", "benchmarks"), name


def test_kernels_import_jax_and_numpy_only():
    for name in modules():
        if name.startswith("pallas_kernels"):
            tops = {other.partition(".")[0] for other in imports(name)}
            others = {"torch"} if name in COMPARE_WITH_TORCH else set()
            assert tops - set(sys.stdlib_module_names) <= {"jax", "jaxlib", "numpy", "pallas_kernels"} | others, name


def test_who_uses_the_kernels():
    for name in of_vjax():
        if any(other.partition(".")[0] == "pallas_kernels" for other in imports(name)):
            assert package_of(name) in USE_KERNELS or name in PLAN_KERNELS, name


def test_only_the_public_names_of_the_kernels_are_used():
    for name in of_vjax():
        for other in imports(name):
            assert not other.startswith("pallas_kernels.") or other.count(".") <= 1, f"{name} imports {other}"


def test_no_import_cycles():
    graph: dict[str, set[str]] = defaultdict(set)
    for name in modules():
        graph[name] = {other for other in imports(name, at_import=True) if other in modules()} - {name, "vjax"}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as e:
        pytest.fail(f"import cycle: {' -> '.join(e.args[1])}")


def test_environment_variables_are_read_in_one_place():
    for name, tree in modules().items():
        used = {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        assert not used & {"os.environ", "os.getenv", "os.putenv"} or name in USE_ENVIRONMENT, name


def test_torch_and_transformers_stay_out():
    """transformers serves tokenizers that have no tokenizer.json, and nothing else; torch is what the kernel benchmark
    compares with where it is installed, and nothing else."""
    for name in modules():
        tops = {other.partition(".")[0] for other in imports(name)}
        assert not tops & {"torch", "tensorflow", "triton"} or name in COMPARE_WITH_TORCH, name
        assert "transformers" not in tops or name == "vjax.text.hf_tokenizer", name


# ---- what a fresh interpreter has imported ------------------------------------------------------------------------

_OFFENDERS = """
import importlib, sys
for name in {names!r}:
    importlib.import_module(name)
    bad = sorted({banned!r} & sys.modules.keys())
    assert not bad, f"importing {{name}} imports {{bad}}"
"""


def run_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_vjax_is_cheap():
    banned = {"jax", "jaxlib", "flax", "torch", "transformers", "tokenizers", "huggingface_hub", "numpy"}
    run_python(_OFFENDERS.format(names=["vjax"], banned=banned))


@pytest.mark.parametrize("package", sorted(NO_JAX))
def test_modules_without_jax(package):
    names = [n for n in of_vjax() if package_of(n) == package and n != "vjax.text.hf_tokenizer"]
    assert names
    run_python(_OFFENDERS.format(names=names, banned={"jax", "jaxlib", "flax", "torch", "transformers"}))


def test_parts_without_jax():
    names = ["vjax.models.registry", "vjax.models.hf_config", "vjax.weights.hub", "vjax.weights.checkpoint"]
    run_python(_OFFENDERS.format(names=names, banned={"jax", "jaxlib", "flax", "torch", "transformers"}))


def test_generating_imports_neither_torch_nor_transformers():
    code = """
import sys
from vjax import LLM, SamplingParams
small = dict(max_model_len=256, max_num_seqs=8, max_num_batched_tokens=128, kv_cache_memory_bytes=16 << 20)
with LLM("vjax-tiny", **small) as llm:
    params = SamplingParams(temperature=0, max_tokens=4)
    llm.generate("def f(", params, use_tqdm=False)
    llm.chat([{"role": "user", "content": "Hi"}], params, use_tqdm=False)
print(sorted({"torch", "transformers", "tensorflow", "triton", "orbax"} & sys.modules.keys()))
"""
    assert run_python(code) == "[]\n"
