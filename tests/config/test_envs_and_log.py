from __future__ import annotations

import json
import logging
from datetime import UTC, datetime
from pathlib import Path

import pytest

from vjax import envs, log
from vjax.errors import ConfigError


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    for name in (
        "VJAX_USE_V1",
        "VLLM_USE_V1",
        "VJAX_ENABLE_V1_MULTIPROCESSING",
        "VLLM_ENABLE_V1_MULTIPROCESSING",
        "VJAX_CACHE_DIR",
        "VJAX_COMPILE_CACHE",
        "VJAX_LOG_LEVEL",
        "VJAX_LOG_FORMAT",
    ):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("vjax", "vllm", "expected"),
    [(None, None, True), ("0", None, False), (None, "0", False), ("1", "0", True), ("0", "1", False), ("", "0", False)],
)
def test_use_v1_prefers_its_own_variable(monkeypatch, vjax, vllm, expected):
    for name, value in (("VJAX_USE_V1", vjax), ("VLLM_USE_V1", vllm)):
        if value is not None:
            monkeypatch.setenv(name, value)
    assert envs.use_v1() is expected


@pytest.mark.parametrize(
    ("vjax", "vllm", "default", "expected"),
    [(None, None, True, True), (None, None, False, False), ("0", "1", True, False), (None, "1", False, True)],
)
def test_enable_multiprocessing(monkeypatch, vjax, vllm, default, expected):
    for name, value in (("VJAX_ENABLE_V1_MULTIPROCESSING", vjax), ("VLLM_ENABLE_V1_MULTIPROCESSING", vllm)):
        if value is not None:
            monkeypatch.setenv(name, value)
    assert envs.enable_multiprocessing(default) is expected


def test_bad_switch_names_variable_and_values(monkeypatch):
    monkeypatch.setenv("VJAX_USE_V1", "2")
    with pytest.raises(ConfigError, match="VJAX_USE_V1='2' must be 0 or 1"):
        envs.use_v1()


def test_cache_dir_and_compile_cache(monkeypatch):
    assert envs.cache_dir() == Path.home() / ".cache" / "vjax" and envs.compile_cache_enabled()
    monkeypatch.setenv("VJAX_CACHE_DIR", "~/elsewhere")
    monkeypatch.setenv("VJAX_COMPILE_CACHE", "0")
    assert envs.cache_dir() == Path.home() / "elsewhere" and not envs.compile_cache_enabled()


def test_log_level(monkeypatch):
    assert envs.log_level() == "INFO"
    monkeypatch.setenv("VJAX_LOG_LEVEL", "debug")
    assert envs.log_level() == "DEBUG"
    monkeypatch.setenv("VJAX_LOG_LEVEL", "loud")
    with pytest.raises(ConfigError, match="VJAX_LOG_LEVEL='LOUD' must be one of DEBUG, INFO, WARNING, ERROR"):
        envs.log_level()


def test_log_format(monkeypatch):
    assert envs.log_format() == "text"
    monkeypatch.setenv("VJAX_LOG_FORMAT", "JSON")
    assert envs.log_format() == "json"
    monkeypatch.setenv("VJAX_LOG_FORMAT", "xml")
    with pytest.raises(ConfigError, match="VJAX_LOG_FORMAT='xml' must be one of text, json"):
        envs.log_format()


def test_json_records(monkeypatch, capsys):
    monkeypatch.setenv("VJAX_LOG_FORMAT", "json")
    monkeypatch.setattr(logging.getLogger("vjax"), "handlers", [])
    logger = log.logger("part")
    logger.info("two\nlines, %d%%", 50)
    logger.info("rate %.1f", 2.5, extra={"fields": {"rate": 2.5, "where": Path("a")}})
    try:
        raise ValueError("bad")
    except ValueError:
        logger.exception("it failed")
    logger.debug("not at level INFO")
    out, err = capsys.readouterr()
    assert out == ""
    first, second, third = map(json.loads, err.splitlines())
    now = datetime.now(UTC)
    assert abs((datetime.fromisoformat(first.pop("time")) - now).total_seconds()) < 60
    assert first == {"level": "INFO", "logger": "vjax.part", "message": "two\nlines, 50%"}
    assert (second["message"], second["rate"], second["where"]) == ("rate 2.5", 2.5, "a")
    assert third["level"] == "ERROR" and third["message"] == "it failed"
    assert third["exception"].startswith("Traceback") and third["exception"].endswith("ValueError: bad")


def test_one_line_on_stderr(capsys):
    logger = log.logger("some.part")
    assert logger.name == "vjax.some.part" and log.logger("vjax.some.part") is logger
    logger.warning("two words")
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    assert err.startswith("WARNING ") and err.endswith("[vjax.some.part] two words\n")


def test_once_means_once_per_text(capsys):
    logger = log.logger("once")
    for text in ("a 100% text", "a 100% text", "another"):
        log.warning_once(logger, text)
    assert capsys.readouterr().err.count("[vjax.once]") == 2


def test_handler_of_the_application_is_kept(monkeypatch):
    root = logging.getLogger("vjax")
    own = logging.NullHandler()
    monkeypatch.setattr(root, "handlers", [own])
    log.logger("x")
    assert root.handlers == [own]
