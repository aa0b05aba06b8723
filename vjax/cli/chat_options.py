"""The chat template on the command line."""

from __future__ import annotations

import argparse
from pathlib import Path

from vjax.errors import ConfigError


def add_template(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--chat-template", metavar="FILE", type=Path, help="a Jinja template (default: that of the model's tokenizer)"
    )


def read_template(path: Path | None) -> str | None:
    """The text of the file, or None where none is named.

    Raises:
        ConfigError: It cannot be read.
    """
    if path is None:
        return None
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        why = e.strerror if isinstance(e, OSError) else "it is not UTF-8 text"
        raise ConfigError(f"--chat-template {path} cannot be read ({why}); pass the path of a Jinja template.") from e
