"""One compilation of each program for the engines of a test process, which build the same ones over and over.

A compiled program holds no state: its arrays are arguments. So engines whose steps and shapes are the same may run the
same objects. Tests of compilation itself do without.
"""

from __future__ import annotations

from typing import Any

import pytest

from vjax.runner.executables import Executables
from vjax.runner.exported import StepDescription
from vjax.runner.step import Step


def share(patch: pytest.MonkeyPatch, programs: dict[Any, Any]) -> None:
    """Until `patch` is undone, an engine takes from `programs` what is there, and adds what it compiles."""
    compile_one = Executables.compile

    def compile_once(self: Executables, key: Any, exported: Any = None) -> Any:
        # A step of a test's own, one with processors of users and one of several devices are not described.
        if type(self.step) is not Step or self.step.logits_processors or self.mesh.size > 1:
            return compile_one(self, key, exported)
        name = (repr(StepDescription.of(self.step, self.mesh, self.platform)), self.step.thinking, key)
        if name in programs:
            self._ready[key] = programs[name]
        else:
            programs[name] = compile_one(self, key, exported)
        return programs[name]

    patch.setattr(Executables, "compile", compile_once)
