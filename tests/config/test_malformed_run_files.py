"""Every malformed run file is refused with a message that says what is wrong."""

from __future__ import annotations

import pytest

from tests.config.malformed import MALFORMED
from vjax.config.file import load_run_file
from vjax.errors import ConfigError


def refused(path, text: str) -> list[str]:
    path.write_text(text)
    with pytest.raises(ConfigError) as e:
        load_run_file(path)
    return str(e.value).split("\n")


@pytest.mark.parametrize(("text", "fragments", "_"), MALFORMED, ids=[text for text, _, _ in MALFORMED])
def test_one_problem(tmp_path, text, fragments, _):
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "broken.jsonl").write_text('"a"\n{\n')
    path = tmp_path / "run.yaml"
    first, *problems = refused(path, text if text.startswith("prompts") else f"{text}\nprompts: [a]")
    assert first == f"{path} has a problem:"
    assert len(problems) == 1 and all(fragment in problems[0] for fragment in fragments), problems


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "is not valid YAML in line 1"),
        ("engine: {seed: 1, seed: 2}", "is not valid YAML in line 1, column 19: the key 'seed' is given twice"),
        ("a: !!python/object:os.system {}", "could not determine a constructor for the tag"),
        ("- a", "run.yaml holds a list (['a']); it must hold a mapping with the sections engine, sampling, prompts"),
        ("just text", "run.yaml holds a string ('just text'); it must hold a mapping"),
        ("extends: 3", "run.yaml: extends=3 must be the path of another run file"),
        ("extends: none.yaml", "none.yaml cannot be read (No such file or directory); correct `extends` in "),
        ("extends: run.yaml", "circle: {0} -> {0}; remove one `extends`"),
    ],
)
def test_files_that_are_no_document(tmp_path, text, message):
    path = tmp_path / "run.yaml"
    (line,) = refused(path, text)
    assert message.format(path) in line


def test_missing_file(tmp_path):
    with pytest.raises(ConfigError, match=r"no\.yaml cannot be read \(No such file or directory\); pass the path"):
        load_run_file(tmp_path / "no.yaml")
