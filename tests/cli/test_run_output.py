"""The output file of a run: begun, continued after any kill, and finished in the order of the prompts."""

from __future__ import annotations

import json
import os

import pytest

from vjax.cli.run_output import open_run_output
from vjax.errors import ConfigError

CONFIG = {"engine.seed": 0, "sampling": None, "prompts": "3 with hash abc"}
#: In the order in which the requests finish.
FINISHED = [2, 0, 1]


def records(index: int, n: int, **others: object) -> list[dict[str, object]]:
    return [{"prompt_index": index, "index": i, "text": f"é{index}\n{i}", "error": None, **others} for i in range(n)]


def run(path, n: int = 2, prompts=FINISHED, *, config=CONFIG, overwrite: bool = False) -> frozenset[int]:
    """Runs what is missing of `prompts`; returns what was there."""
    with open_run_output(path, config, n, overwrite=overwrite) as output:
        before = output.done
        for index in prompts:
            if index not in before:
                output.write(index, records(index, n))
        output.finish()
    return before


def test_lines_are_there_as_soon_as_they_are_written_and_sorted_at_the_end(tmp_path):
    path = tmp_path / "new" / "out.jsonl"
    with open_run_output(path, CONFIG, 2, overwrite=False) as output:
        for count, index in enumerate(FINISHED, 1):
            output.write(index, records(index, 2))
            assert len(path.read_text().splitlines()) == 2 * count
        assert [json.loads(line)["prompt_index"] for line in path.read_text().splitlines()] == [2, 2, 0, 0, 1, 1]
        output.finish()
    found = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(r["prompt_index"], r["index"]) for r in found] == [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1)]
    assert sorted(os.listdir(path.parent)) == ["out.jsonl", "out.jsonl.run.json"]


@pytest.mark.parametrize("n", [1, 2])
def test_killed_after_any_byte(tmp_path, n):
    """Whatever a kill leaves of the file, the next run completes it to the same bytes."""
    undisturbed, path = tmp_path / "undisturbed.jsonl", tmp_path / "out.jsonl"
    run(undisturbed, n)
    with open_run_output(path, CONFIG, n, overwrite=False) as output:
        for index in FINISHED:
            output.write(index, records(index, n))
        written = path.read_bytes()
    ends = [sum(len(line) for line in written.splitlines(True)[: n * i]) for i in range(len(FINISHED) + 1)]
    line_ends = [i + 1 for i, byte in enumerate(written) if byte == 10]
    sizes = {*range(0, len(written), 11), *(end + around for end in line_ends for around in (-1, 0, 1))}
    for size in sorted(sizes):
        path.write_bytes(written[:size])
        before = run(path, n)
        assert before == set(FINISHED[: sum(end <= size for end in ends) - 1]), size
        assert path.read_bytes() == undisturbed.read_bytes(), size


def test_killed_before_the_sidecar_is_whole(tmp_path):
    path = tmp_path / "out.jsonl"
    for content in ("", '{"engine.se'):
        path.write_text("")
        (tmp_path / "out.jsonl.run.json").write_text(content)
        assert run(path) == frozenset()


def test_a_complete_file_is_left_alone(tmp_path):
    path = tmp_path / "out.jsonl"
    run(path)
    content, modified = path.read_bytes(), path.stat().st_mtime_ns
    assert run(path) == {0, 1, 2}
    assert (path.read_bytes(), path.stat().st_mtime_ns) == (content, modified)


def test_failed_requests_are_run_again(tmp_path):
    path = tmp_path / "out.jsonl"
    with open_run_output(path, CONFIG, 1, overwrite=False) as output:
        output.write(0, records(0, 1))
        output.write(1, records(1, 1, error="the device failed"))
        output.write(2, records(2, 1))
        output.finish()
    assert run(path, 1) == {0, 2}
    assert "failed" not in path.read_text() and len(path.read_text().splitlines()) == 3


def test_another_configuration(tmp_path):
    path = tmp_path / "out.jsonl"
    run(path)
    before = path.read_bytes()
    with pytest.raises(ConfigError) as e:
        run(path, config={"engine.seed": 1, "sampling.n": 2, "prompts": "3 with hash abc"})
    lines = str(e.value).splitlines()
    assert lines[:3] == [
        f"{path} was begun with another configuration:",
        "  engine.seed: 0 then, 1 now",
        "  sampling.n: None then, 2 now",
    ]
    assert "run what it was begun with; else pass --overwrite to start afresh, or choose another --output." in lines[3]
    assert path.read_bytes() == before
    assert run(path, config={"engine.seed": 1}, prompts=[0], overwrite=True) == frozenset()
    assert run(path, config={"engine.seed": 1}) == {0}


def test_a_deleted_file_is_begun_anew(tmp_path):
    path = tmp_path / "out.jsonl"
    run(path)
    path.unlink()
    assert run(path, config={"engine.seed": 5}) == frozenset()


def test_a_file_that_is_no_runs(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("precious\n")
    with pytest.raises(ConfigError, match=r"holds something, but notes\.txt\.run\.json.* is missing; pass --overwrite"):
        run(path)
    assert path.read_text() == "precious\n" and os.listdir(tmp_path) == ["notes.txt"]
    path.write_text("")
    assert run(path) == frozenset()


@pytest.mark.parametrize("line", ["precious", "[1]", "{}", "3"])
def test_a_line_that_is_no_completion(tmp_path, line):
    path = tmp_path / "out.jsonl"
    run(path)
    content = f"{line}\n{path.read_text()}"
    path.write_text(content)
    with pytest.raises(ConfigError, match=r"out\.jsonl, line 1 is not a completion; pass --overwrite"):
        run(path)
    assert path.read_text() == content


def test_a_broken_sidecar(tmp_path):
    path = tmp_path / "out.jsonl"
    run(path)
    (tmp_path / "out.jsonl.run.json").write_text("{")
    with pytest.raises(ConfigError, match=r"out\.jsonl\.run\.json is not JSON .*; pass --overwrite"):
        run(path)


def test_two_runs_at_once(tmp_path):
    path = tmp_path / "out.jsonl"
    with open_run_output(path, CONFIG, 1, overwrite=False):
        for overwrite in (False, True):
            with pytest.raises(ConfigError, match="is being written by another run; wait for it"):
                run(path, overwrite=overwrite)
    assert run(path) == frozenset()


def test_links_stay_links(tmp_path):
    target, link = tmp_path / "target.jsonl", tmp_path / "link.jsonl"
    link.symlink_to(target)
    run(link)
    assert link.is_symlink() and len(target.read_text().splitlines()) == 6


def test_pipes_get_the_lines_as_they_come(tmp_path):
    path = tmp_path / "pipe"
    os.mkfifo(path)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        run(path, 1)
        lines = os.read(reader, 1 << 16).decode().splitlines()
    finally:
        os.close(reader)
    assert [json.loads(line)["prompt_index"] for line in lines] == FINISHED
    assert os.listdir(tmp_path) == ["pipe"]


def test_a_path_that_cannot_be_written(tmp_path):
    with pytest.raises(ConfigError, match=r"output='/dev/null/x' cannot be written .*; choose another file"):
        run(type(tmp_path)("/dev/null/x"))
