"""Logging: one line per record on stderr, under the logger "vjax" (so an application can reconfigure it as usual).

With VJAX_LOG_FORMAT=json a line is a JSON object: "time", "level", "logger", "message", "exception" where there is one,
and the numbers of the message by name where the record has them (`extra={"fields": {...}}`).
"""

from __future__ import annotations

import json
import logging
import sys
import threading
from datetime import UTC, datetime

from vjax import envs

_FORMAT = "%(levelname)s %(asctime)s [%(name)s] %(message)s"
_TIME_FORMAT = "%m-%d %H:%M:%S"

_lock = threading.Lock()
_said: set[tuple[str, int, str]] = set()


class _StderrHandler(logging.StreamHandler):
    """Writes to what sys.stderr is at the time of the record, which test runners and notebooks replace."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self):  # pyright: ignore[reportIncompatibleVariableOverride]
        return sys.stderr


class _JsonFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        fields = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            fields["exception"] = self.formatException(record.exc_info)
        return json.dumps(fields, default=str)


def logger(name: str = "") -> logging.Logger:
    """The logger "vjax.<name>" ("vjax" for an empty name; a name that starts with "vjax" is used as it is).

    The first call sets level, format and handler of "vjax", unless the application already gave that logger a handler.
    """
    _configure()
    if not name or name == "vjax" or name.startswith("vjax."):
        return logging.getLogger(name or "vjax")
    return logging.getLogger(f"vjax.{name}")


def info_once(log: logging.Logger, message: str) -> None:
    """Logs a text at level INFO the first time that it is given in this process."""
    _once(log, logging.INFO, message)


def warning_once(log: logging.Logger, message: str) -> None:
    """Logs a text at level WARNING the first time that it is given in this process."""
    _once(log, logging.WARNING, message)


def _once(log: logging.Logger, level: int, message: str) -> None:
    key = (log.name, level, message)
    with _lock:
        if key in _said:
            return
        _said.add(key)
    log.log(level, "%s", message)


def _configure() -> None:
    root = logging.getLogger("vjax")
    with _lock:
        if root.handlers:
            return
        level = envs.log_level()
        is_json = envs.log_format() == "json"
        handler = _StderrHandler()
        handler.setFormatter(_JsonFormatter() if is_json else logging.Formatter(_FORMAT, _TIME_FORMAT))
        root.addHandler(handler)
        root.setLevel(level)
        root.propagate = False
