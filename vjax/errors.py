"""Exceptions whose type says who must act.

`VjaxValidationError` and its subclasses (all `ValueError`): the caller passed something that cannot work; the text says
what was got, what is allowed and what to do. `EngineStepError`: the device failed a step; the engine itself goes on.
`EngineDeadError`: the engine is gone, with all of its requests. `EngineAsleepError`: somebody has to wake it up first.
`NotImplementedError` is used as is, for a path that cannot serve a valid request while another one can.
"""

from __future__ import annotations


class VjaxValidationError(ValueError):
    """Bad input: a parameter, a prompt or an argument is out of its domain.

    Args:
        message: What was got, what is allowed and what to do.
        parameter: Name of the offending parameter, if there is one.
        value: The offending value.
    """

    def __init__(self, message: str, *, parameter: str | None = None, value: object = None):
        super().__init__(message)
        self.parameter = parameter
        self.value = value


class ConfigError(VjaxValidationError):
    """An engine argument or a config file cannot be used."""


class ModelLoadError(VjaxValidationError):
    """A checkpoint cannot be read, is not supported or does not fit its config.json."""


class OutOfMemoryError(VjaxValidationError):
    """Weights, temporaries or the KV cache do not fit; the text names the numbers and the knob."""


class EngineStepError(RuntimeError):
    """A step failed on the device. Only the requests of that step are lost."""


class EngineAsleepError(RuntimeError):
    """The engine sleeps and cannot do this now; the text says what to wake, or to call, first."""


class EngineDeadError(RuntimeError):
    """The engine, or the process that it ran in, has ended; whoever waits for it gets this. Create a new engine."""
