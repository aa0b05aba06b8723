"""The argument parser of all commands: says of an unknown option which one may be meant."""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

from vjax.config.checks import nearest


class ArgumentParser(argparse.ArgumentParser):
    """As argparse's, and its subparsers are of this class too: an unknown option is refused by the command that it was
    given to. The default `takes_overrides` names the sections whose keys a command takes as --section.key."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        found, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}{self._meant(unknown[0])}")
        return found, unknown

    def _meant(self, argument: str) -> str:
        """A clause with the option, or the override, whose name resembles that of an unknown one; or nothing."""
        if not argument.startswith("--"):
            return ""
        overrides = {
            name: f"--{section}.{name}"
            for section in self.get_default("takes_overrides") or ()
            for name in _section_keys(section)
        }
        options = {_plain(option): option for action in self._actions for option in action.option_strings}
        spellings = overrides | options
        meant = nearest(_plain(argument.partition("=")[0]), spellings)
        return "" if meant is None else f"; did you mean {spellings[meant]}?"


def _plain(option: str) -> str:
    return option.lstrip("-").replace("-", "_")


def _section_keys(section: str) -> tuple[str, ...]:
    from vjax.config.engine_args import EngineArgs
    from vjax.config.file import SAMPLING_FIELDS

    return SAMPLING_FIELDS if section == "sampling" else tuple(field.name for field in dataclasses.fields(EngineArgs))
