"""`vjax bench`: usage, and every benchmark once with the bundled model, on the figures that must agree."""

from __future__ import annotations

import json
import sys

import pytest

from vjax import envs, plot
from vjax.benchmarks import compare, latency, prefix_caching, process, startup
from vjax.benchmarks.records import percentiles, table
from vjax.cli.main import main
from vjax.errors import VjaxValidationError

SMALL = ["--engine.max_model_len", "64", "--engine.max_num_seqs=2", "--engine.max_num_batched_tokens", "64"]
SMALL += ["--engine.kv_cache_memory_bytes", str(16 << 20)]


@pytest.fixture
def bench(capsys):
    """Runs a benchmark in this process: (exit code, records, stderr)."""

    def run(*arguments: object):
        try:
            code = main(["bench", *map(str, arguments)])
        except SystemExit as e:  # argparse
            code = e.code
        out, err = capsys.readouterr()
        return code, [json.loads(line) for line in out.splitlines()], err

    return run


def check_setting(record):
    assert record["engine_args"]["model"] == "vjax-tiny" and record["engine_args"]["max_num_seqs"] == 2
    assert record["engine"]["max_model_len"] == 64 and record["engine"]["dtype"] == "float32"
    assert record["device"]["platform"] == "cpu" and {"vjax", "jax", "python"} <= record["versions"].keys()


# ---- usage --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["latency", "throughput", "prefix-caching", "startup", "host", "compare"])
def test_help(capsys, name):
    with pytest.raises(SystemExit, match="0"):
        main(["bench", name, "--help"])
    out = capsys.readouterr().out
    assert out.startswith(f"usage: vjax bench {name} ") and "--output-json" in out
    assert ("--engine.NAME" in out) == (name != "host") and ("--plot FILE" in out) == (name != "compare")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["latency", "--batch-size", "0"], "'0' must be an integer at least 1"),
        (["latency", "--num-iters", "many"], "'many' must be an integer at least 1"),
        (["throughput", "--random-range-ratio", "1"], "'1' must be a number in [0, 1)"),
        (["throughput", "--dataset-name", "sonnet"], "invalid choice: 'sonnet'"),
        (["throughput", "--temperature", "3"], "'3' must be a number in [0, 2]"),
        (["throughput", "--input-len", "3", "--dataset-name", "sharegpt"], "--input-len has no effect"),
        (["throughput", "--dataset-name", "custom"], "pass --dataset-path"),
        (["throughput", "--engine.max_seqs", "8"], "did you mean max_num_seqs?"),
        (["throughput", "--sampling.top_k", "8"], "is not an override of `vjax bench throughput`"),
        (["prefix-caching", "--input-length-range", "9:8"], "'9:8' must be MIN:MAX"),
        (["prefix-caching", "--input-len", "8", "--input-length-range", "8:9"], "not allowed with argument"),
        (["prefix-caching", "--input-len", "8", "--prefix-len", "8"], "--prefix-len 8 leaves nothing"),
        (["startup", "--num-iters-cold", "0", "--num-iters-warm", "0"], "at least one must be more"),
        (["host", "--output-json", "/dev/null/x"], "cannot be written"),
        (["compare", "V2"], "'V2' must be V0 or V1"),
        (["compare", "V0", "v0"], "The modes V0 V0 are not all different"),
        (["compare", "--engine.use_v1", "true"], "leave --engine.use_v1 out"),
        (["compare", "--custom-output-len", "3"], "it belongs to custom"),
    ],
)
def test_bad_input(bench, arguments, message):
    code, records, err = bench(*arguments)
    assert (code, records) == (2, []) and message in err.splitlines()[-1]


def test_requests_longer_than_the_context(bench):
    code, records, err = bench("latency", *SMALL, "--input-len", "40", "--output-len", "25")
    assert (code, records) == (2, [])
    assert "40 prompt tokens and 25 output tokens does not fit max_model_len=64" in err.splitlines()[-1]


# ---- figures ------------------------------------------------------------------------------------------------------


def test_latency(bench):
    lengths = ["--input-len", "8", "--output-len", "6", "--batch-size", "3"]
    code, [record], err = bench("latency", *SMALL, *lengths, "--num-iters-warmup", "1", "--num-iters", "3")
    assert code == 0 and (record["bench"], record["batch_size"]) == ("latency", 3)
    assert len(record["latencies"]) == 3 and record["avg_latency"] == pytest.approx(sum(record["latencies"]) / 3)
    assert record["percentiles"]["10"] <= record["percentiles"]["50"] <= record["percentiles"]["99"]
    assert record["detokenize"] and record["num_compilations"] == 0
    check_setting(record)
    heading, row = err.splitlines()[-2:]
    assert "p99 s" in heading and f"{record['avg_latency']:.4f}" in row


def test_throughput(bench, tmp_path):
    path = tmp_path / "results" / "throughput.json"
    arguments = ["--num-prompts", "7", "--input-len", "20", "--output-len", "6", "--disable-detokenize"]
    code, records, err = bench("throughput", *SMALL, *arguments, "--output-json", path)
    assert (code, records) == (0, []) and f"wrote 1 results to {path}" in err
    [record] = [json.loads(line) for line in path.read_text().splitlines()]
    assert (record["num_requests"], record["num_prompt_tokens"], record["num_output_tokens"]) == (7, 140, 42)
    assert record["total_num_tokens"] == 182
    for rate, count in (("requests", 7), ("tokens", 182), ("output_tokens", 42)):
        assert record[f"{rate}_per_second"] * record["elapsed_time"] == pytest.approx(count)
    assert record["dataset"]["name"] == "random" and record["engine_args"]["skip_tokenizer_init"]
    assert record["num_compilations"] == 0 and record["mean_first_token_latency"] is None
    check_setting(record)


def test_throughput_of_a_file(bench, tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "import os\\n", "output_tokens": 3}\n{"prompt": "def f("}\n')
    data = ["--dataset-name", "custom", "--dataset-path", path, "--num-prompts", "2", "--custom-output-len", "5"]
    code, [record], _ = bench("throughput", *SMALL, *data, "--engine.use_v1", "false", "--disable-detokenize")
    assert code == 0 and record["num_output_tokens"] == 8
    assert not record["engine"]["use_v1"] and not record["detokenize"]


def test_prefix_caching(bench):
    lengths = ["--num-prompts", "6", "--repeat-count", "2", "--prefix-len", "32", "--input-len", "50"]
    code, (off, on), err = bench("prefix-caching", *SMALL, *lengths, "--output-len", "3", "--disable-detokenize")
    assert code == 0
    for record in (off, on):
        assert (record["num_requests"], record["num_prompt_tokens"], record["num_output_tokens"]) == (12, 600, 36)
        check_setting(record)
    assert not off["engine"]["enable_prefix_caching"] and off["num_cached_tokens"] == 0
    # All but the first request find the prefix, two blocks, and the second one of each prompt its third block.
    assert on["engine"]["enable_prefix_caching"] and on["num_cached_tokens"] == 11 * 32 + 6 * 16
    assert on["hit_rate"] == pytest.approx(on["num_cached_tokens"] / 600)
    assert [line.split()[0] for line in err.splitlines()[-2:]] == ["off", "on"]


def test_prefix_caching_with_one_setting(bench, monkeypatch):
    asked = []
    monkeypatch.setattr(prefix_caching, "_measure", lambda _, engine: asked.append(engine.enable_prefix_caching) or {})
    monkeypatch.setattr(prefix_caching, "row", lambda _: {"a": "b"})
    assert bench("prefix-caching", "--engine.enable_prefix_caching", "true")[0] == 0 and asked == [True]
    assert bench("prefix-caching")[0] == 0 and asked == [True, False, True]


def test_cold_startup(bench):
    code, [record], _ = bench("startup", *SMALL, "--num-iters-cold", "1", "--num-iters-warm", "0")
    assert code == 0 and record["cache"] == "cold"
    check_setting(record)
    [startup], [first_token] = record["startup_times"], record["first_token_times"]
    assert record["avg_startup_time"] == record["percentiles"]["50"] == startup
    assert record["avg_import_time"] + record["avg_engine_time"] <= startup < first_token


def test_caches_of_starts(bench, monkeypatch):
    folders = []

    def call(task, arguments, environment):
        folders.append(environment["VJAX_CACHE_DIR"])
        names = ("startup_time", "import_time", "engine_time", "first_token_time")
        return dict.fromkeys(names, len(folders)) | {"setting": {}}

    monkeypatch.setattr(startup, "call", call)
    iters = ["--num-iters-cold", "2", "--num-iters-warmup", "2", "--num-iters-warm", "3"]
    code, (cold, warm), _ = bench("startup", *iters)
    assert code == 0 and (cold["startup_times"], warm["startup_times"]) == ([1, 2], [5, 6, 7])
    assert len(set(folders[:3])) == 3 and set(folders[2:]) == {folders[2]}
    assert warm["avg_engine_time"] == 6
    assert len(bench("startup", "--num-iters-cold", "0")[1]) == 1


def test_host(bench):
    code, records, err = bench("host", "--num-seqs", "4", "8", "--steps", "5")
    assert code == 0 and [record["num_seqs"] for record in records] == [4, 8]
    assert "total p99 ms" in err.splitlines()[-3]


def test_compare(bench, tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "new" / "modes.png"
    names = ["--dataset-name", "random", "prefix_repetition", "--prefix-repetition-prefix-len", "16"]
    names += ["--output-len", "4", "--prefix-repetition-suffix-len", "4", "--input-len", "8"]
    code, records, err = bench("compare", "v0", "V1", *SMALL, *names, "--num-prompts", 6, "--output", path)
    assert code == 0, err
    cases = [(r["mode"], r["engine"]["use_v1"], r["dataset"]["name"]) for r in records]
    modes = (("V0", False), ("V1", True))
    assert cases == [(*mode, name) for mode in modes for name in ("random", "prefix_repetition")]
    assert [r["num_output_tokens"] for r in records] == [6 * 4, 6 * 4] * 2
    assert [r["num_prompt_tokens"] for r in records] == [6 * 8, 6 * 20] * 2
    assert [r["num_cached_tokens"] for r in records] == [0, 0, 0, 2 * 16]  # two prompts of six share a prefix
    assert all(r["mean_first_token_latency"] > 0 and r["num_compilations"] == 0 for r in records)
    check_setting(records[0])
    assert path.read_bytes().startswith(b"\x89PNG") and f"wrote {path}" in err
    plot.save(compare.figure([r for r in records if r["mode"] == "V1"]), tmp_path / "one.svg")
    assert "<svg" in (tmp_path / "one.svg").read_text()


def test_compare_checks_the_picture_first(bench, tmp_path):
    pytest.importorskip("matplotlib")
    code, _, err = bench("compare", "--output", tmp_path / "picture.doc")
    assert code == 2 and "must end in one of" in err and ".png" in err
    code, _, err = bench("compare", "--output", "/dev/null/picture.png")
    assert code == 2 and "cannot be written" in err


def test_compare_without_matplotlib(bench, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.backend_bases", None)
    code, _, err = bench("compare")
    assert code == 2 and err.endswith("The picture needs matplotlib: pip install 'vjax[bench]'.\n")


# ---- pictures -----------------------------------------------------------------------------------------------------


def test_plot_of_throughput(bench, tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "new" / "steps.png"
    arguments = ["--num-prompts", "5", "--input-len", "20", "--output-len", "6", "--disable-detokenize"]
    code, [record], err = bench("throughput", *SMALL, *arguments, "--plot", path)
    assert code == 0 and path.read_bytes().startswith(b"\x89PNG") and f"wrote {path}" in err
    assert sum(step["prefill_tokens"] for step in record["steps"]) == 5 * 20
    assert sum(step["decode_tokens"] for step in record["steps"]) == 5 * (6 - 1)


def test_plot_of_host(bench, tmp_path):
    pytest.importorskip("matplotlib")
    assert bench("host", "--num-seqs", "4", "8", "--steps", "5", "--plot", tmp_path / "host.svg")[0] == 0
    assert "8 running" in (tmp_path / "host.svg").read_text()
    code, records, err = bench("host", "--plot", tmp_path / "host.doc")
    assert (code, records) == (2, []) and "must end in one of" in err


def test_figures_of_records(tmp_path):
    pytest.importorskip("matplotlib")
    measured_on = {
        "versions": {"vjax": "1"},
        "engine_args": {"model": "m"},
        "engine": {"dtype": "float32", "enable_prefix_caching": True},
        "device": {"kind": "cpu"},
    }
    batches = {"batch_size": 2, "input_len": 3, "output_len": 4, "latencies": [0.1, 0.2]}
    figure = latency.figure([batches | {"percentiles": {"50": 0.15, "99": 0.2}} | measured_on])
    assert "2 requests at once, 3 tokens in, 4 out" in figure.get_suptitle()
    tokens = {"num_prompt_tokens": 10, "num_cached_tokens": 8, "num_requests": 2, "elapsed_time": 1.5}
    assert [t.get_text() for t in prefix_caching.figure([tokens | measured_on]).axes[0].texts] == ["8", "2"]
    times = {"avg_startup_time": 5.0, "avg_import_time": 2.0, "avg_engine_time": 2.5, "avg_first_token_time": 6.0}
    [axes] = startup.figure([times | {"cache": "cold"} | measured_on]).axes
    assert [t.get_text() for t in axes.texts] == ["0.50", "2.00", "2.50", "1.00", "  6.00"]


# ---- parts --------------------------------------------------------------------------------------------------------


def test_a_child_that_refuses_and_one_that_fails(capfd):
    with pytest.raises(VjaxValidationError, match="block_size=8 must be one of"):
        process.call("startup", {"engine": {"block_size": 8}, "started": 0.0})
    with pytest.raises(process.ProcessFailed, match="ended with code 1"):
        process.call("startup", {"started": 0.0})
    assert "TypeError" in capfd.readouterr().err


def test_environment_with_a_compile_cache(monkeypatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "elsewhere")
    monkeypatch.setenv("VJAX_COMPILE_CACHE", "0")
    monkeypatch.setenv("OTHER", "kept")
    environment = envs.with_compile_cache("here")
    assert (environment["VJAX_CACHE_DIR"], environment["VJAX_COMPILE_CACHE"]) == ("here", "1")
    assert environment["OTHER"] == "kept" and "JAX_COMPILATION_CACHE_DIR" not in environment


def test_table():
    assert table([{"a": "1", "long": "2"}, {"a": "333", "long": "4"}]).splitlines() == [
        "  a  long",
        "  1     2",
        "333     4",
    ]


def test_percentiles():
    assert percentiles([1.0, 2.0, 3.0]) == pytest.approx(
        {"10": 1.2, "25": 1.5, "50": 2.0, "75": 2.5, "90": 2.8, "99": 2.98}
    )


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--output-len", "4"], "--profile needs at least"),
        (["--output-len", "64"], "--profile traces a GPU's kernels, and JAX runs on cpu"),
    ],
)
def test_profile_refuses_early(bench, tmp_path, options, text):
    pytest.importorskip("matplotlib")
    code, _, err = bench("latency", *options, "--profile", str(tmp_path / "new"))
    assert code == 2 and text in err
