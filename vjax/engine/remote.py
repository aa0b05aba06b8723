"""Front ends' calls to their core: weights and functions in the form in which they reach it.

The core may be in another process, so weights travel a leaf at a time, and functions as a pickle.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any

import numpy as np

from vjax.errors import VjaxValidationError
from vjax.weights.update import ArraySpec, Key

#: Method of the core, and its arguments.
CoreCall = tuple[str, tuple[Any, ...]]

SLEEP_MODES = ("abort", "wait", "keep")
WAKE_UP_TAGS = ("weights", "kv_cache", "scheduling")


def check_sleep(level: Any, mode: Any) -> None:
    """Raises: VjaxValidationError for a level or a mode that there is not."""
    if isinstance(level, bool) or level not in (0, 1, 2):
        raise VjaxValidationError(
            f"level={level!r} must be 0 (stop scheduling), 1 (free the KV cache, move weights to the host) or 2 "
            "(drop both).",
            parameter="level",
            value=level,
        )
    if mode not in SLEEP_MODES:
        raise VjaxValidationError(
            f"mode={mode!r} must be one of {', '.join(SLEEP_MODES)}: what becomes of unfinished requests.",
            parameter="mode",
            value=mode,
        )


def check_tags(tags: Any) -> list[str] | None:
    """Raises: VjaxValidationError for tags that there are not."""
    if tags is None:
        return None
    if isinstance(tags, str) or not isinstance(tags, (Sequence, set, frozenset)) or not set(tags) <= set(WAKE_UP_TAGS):
        raise VjaxValidationError(
            f"tags={tags!r} must be a list of {', '.join(WAKE_UP_TAGS)}; leave it out to wake up everything.",
            parameter="tags",
            value=tags,
        )
    return list(tags)


def weight_update(params: Any, *, partial: bool, to_host: bool) -> Generator[CoreCall, Any, None]:
    """The calls that bring new weights to a core, in order; it is sent what each of them returned.

    Once `begin_weight_update` has returned, whatever ends this early has to be followed by `abandon_weight_update`.

    Args:
        params: A mapping of names to arrays, or a sequence of leaves.
        to_host: The core wants numpy arrays.

    Raises:
        VjaxValidationError: `params` is neither, or lists what in it is no array.
    """
    arrays: dict[Any, Any]
    if isinstance(params, Mapping):
        arrays = dict(params)
    elif isinstance(params, (tuple, list)):
        arrays = dict(enumerate(params))
    else:
        raise VjaxValidationError(
            f"params is a {type(params).__name__}; pass a mapping of names to arrays, or a tuple of leaves in the "
            "order of get_weights().",
            parameter="params",
        )
    wrong = [
        f"{k!r}: {type(v).__name__}" for k, v in arrays.items() if not hasattr(v, "shape") or not hasattr(v, "dtype")
    ]
    wrong += [f"the name {k!r}" for k in arrays if isinstance(params, Mapping) and not isinstance(k, str)]
    if wrong:
        raise VjaxValidationError(
            f"params must be arrays under their names, and these are not: {', '.join(wrong[:20])}. A nested tree has "
            "to be flattened.",
            parameter="params",
        )
    specs: dict[Key, ArraySpec] = {
        key: (tuple(array.shape), str(array.dtype).removeprefix("torch.")) for key, array in arrays.items()
    }
    groups = yield "begin_weight_update", (specs, bool(partial))
    for keys in groups:
        yield "put_weights", ({key: _array(arrays[key], to_host) for key in keys},)
    yield "end_weight_update", ()


def _array(array: Any, to_host: bool) -> Any:
    """A numpy or jax array; with `to_host` a numpy one."""
    if isinstance(array, np.ndarray):
        return array
    import jax

    if not isinstance(array, jax.Array):
        if hasattr(array, "detach"):  # torch
            array = array.detach().contiguous()
        array = jax.dlpack.from_dlpack(array) if hasattr(array, "__dlpack__") else np.asarray(array)
    return np.asarray(array) if to_host else array


def remote_function(method: Any, args: Any, kwargs: Any, *, in_process: bool) -> CoreCall:
    """The call that is `collective_rpc` of a function or of a method's name.

    Raises:
        VjaxValidationError: The method is neither, or the call cannot reach the core's process.
    """
    if not isinstance(method, str) and not callable(method):
        raise VjaxValidationError(
            f"method={method!r:.100} must be the name of a method of the runner, or a function that gets the runner.",
            parameter="method",
            value=method,
        )
    if not isinstance(args, (tuple, list)) or not isinstance(kwargs, (Mapping, type(None))):
        raise VjaxValidationError("args must be a tuple and kwargs a dict, of the arguments of the call.")
    call = (method, tuple(args), dict(kwargs or {}))
    if in_process:
        return "collective_rpc", call
    if getattr(method, "__module__", None) == "__main__":
        raise _not_portable(method, "it is defined in the main program, which that process does not have")
    try:
        return "collective_rpc_pickled", (pickle.dumps(call),)
    except Exception as e:  # whatever a user's class raises
        raise _not_portable(method, f"{type(e).__name__}: {e}") from e


def _not_portable(method: Any, why: str) -> VjaxValidationError:
    return VjaxValidationError(
        f"{method!r:.100} cannot be sent to the engine's process ({why}). Define it at the top of a module that can be "
        "imported, or keep the engine in this process (VJAX_ENABLE_V1_MULTIPROCESSING=0, or multiprocess=False).",
        parameter="method",
    )


class OnModel:
    """What `apply_model` sends: `function` of the model, as a function of the runner."""

    def __init__(self, function: Callable[[Any], Any]):
        self._function = function
        self.__module__ = getattr(function, "__module__", None) or __name__

    def __call__(self, runner: Any) -> Any:
        return self._function(runner.module())
