"""Traces of `jax.profiler` on demand: what runs between `start` and `stop`, on the host and on the device."""

from __future__ import annotations

from pathlib import Path

import jax

from vjax.errors import VjaxValidationError
from vjax.log import logger

log = logger(__name__)


class Profiler:
    """Writes traces for TensorBoard, XProf and Perfetto.

    Args:
        folder: Where to; None refuses to start.
    """

    def __init__(self, folder: str | None):
        self._folder = folder
        self._writes_to: Path | None = None

    def start(self, prefix: str | None = None) -> None:
        """Begins a trace.

        Args:
            prefix: Folder of this trace, inside the profiler's.

        Raises:
            VjaxValidationError: There is no folder, or the prefix leads out of it.
            RuntimeError: A trace is being recorded, by this engine or by somebody else in its process.
        """
        if self._folder is None:
            raise VjaxValidationError(
                "There is no folder for profiles: create the engine with profiler_dir=FOLDER, or set the variable "
                "VJAX_PROFILER_DIR before.",
                parameter="profiler_dir",
            )
        if prefix is not None and (not isinstance(prefix, str) or Path(prefix).is_absolute() or ".." in prefix):
            raise VjaxValidationError(
                f"profile_prefix={prefix!r} must be a name, which becomes a folder in {self._folder}; leave it out to "
                "write there directly.",
                parameter="profile_prefix",
                value=prefix,
            )
        if self._writes_to is not None:
            raise RuntimeError(f"A profile is being recorded into {self._writes_to}; call stop_profile() first.")
        folder = Path(self._folder, prefix or "").expanduser().absolute()
        folder.mkdir(parents=True, exist_ok=True)
        jax.profiler.start_trace(str(folder))
        self._writes_to = folder
        log.info("recording a profile into %s", folder)

    def stop(self) -> None:
        """Ends the trace and writes it.

        Raises:
            RuntimeError: None is being recorded.
        """
        if self._writes_to is None:
            raise RuntimeError("No profile is being recorded; call start_profile() first.")
        folder, self._writes_to = self._writes_to, None
        jax.profiler.stop_trace()
        log.info("the profile is in %s", folder)

    def shutdown(self) -> None:
        """Ends a trace that is being recorded."""
        if self._writes_to is not None:
            self.stop()
