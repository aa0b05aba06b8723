"""One compilation of each program for the engines of a test process, which build the same ones over and over.

What is compiled depends on what `StepDescription` names and on the program's key, and a compiled program holds no state:
its arrays are arguments. So engines of one description may run the same objects. Tests of compilation itself do without.
"""

from __future__ import annotations

from typing import Any

import pytest

from vjax.runner.executables import Executables
from vjax.runner.exported import StepDescription


def share(patch: pytest.MonkeyPatch, programs: dict[tuple[str, Any], Any]) -> None:
    """Until `patch` is undone, an engine takes from `programs` what is there, and adds what it compiles."""
    compile_one = Executables.compile

    def compile_once(self: Executables, key: Any, exported: Any = None) -> Any:
        # Any other step, of a test or of several devices, is compiled as ever.
        if type(self.step).__module__ != "vjax.runner.step" or self.mesh.size > 1:
            return compile_one(self, key, exported)
        name = (repr(StepDescription.of(self.step, self.mesh, self.platform)), key)
        if name in programs:
            self._ready[key] = programs[name]
        else:
            programs[name] = compile_one(self, key, exported)
        return programs[name]

    patch.setattr(Executables, "compile", compile_once)
