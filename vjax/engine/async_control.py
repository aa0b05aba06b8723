"""Control of a running engine as coroutines: sleep and pauses, new weights, calls into the runner, profiles."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from vjax.engine.client import EngineClient
from vjax.engine.remote import OnModel, check_sleep, check_tags, remote_function, weight_update
from vjax.log import logger

log = logger(__name__)


class AsyncControl:
    """Part of `AsyncLLM`. All coroutines raise an EngineDeadError where the engine has ended, or ends meanwhile."""

    _client: EngineClient
    #: Guards `_is_updating`, as the rest of `AsyncLLM`.
    _lock: threading.Lock
    _is_updating = False

    def _check_alive(self) -> None:
        raise NotImplementedError

    async def _abort_all(self) -> None:
        raise NotImplementedError

    async def _call(self, method: str, *arguments: Any) -> Any:
        """A method of the engine core, by its name."""
        return await asyncio.wrap_future(self._client.call(method, *arguments))

    async def reset_prefix_cache(self, reset_running_requests: bool = False) -> bool:
        """Forgets all cached prefixes; False (with a warning) while requests hold blocks.

        Args:
            reset_running_requests: Running requests give their blocks back first, and are computed again.
        """
        done = await self._call("reset_prefix_cache", reset_running_requests)
        if not done:
            log.warning("the prefix cache was not reset: unfinished requests hold blocks; finish or abort them first")
        return done

    async def sleep(self, level: int = 1, mode: str = "abort") -> None:
        """As `LLM.sleep`; callers of `generate` wait until `wake_up`. With "abort" the callers of now get their last
        outputs."""
        check_sleep(level, mode)
        self._check_alive()
        if mode == "abort":
            await self._abort_all()
        await self._call("sleep", level, mode == "wait")

    async def wake_up(self, tags: Sequence[str] | None = None) -> None:
        """As `LLM.wake_up`."""
        await self._call("wake_up", check_tags(tags))

    async def is_sleeping(self) -> bool:
        """Asleep at any level, in part as well."""
        return await self._call("is_sleeping")

    async def pause_generation(self, *, mode: str = "abort", clear_cache: bool = True) -> None:
        """Stops scheduling until `resume_generation`, and keeps the memory: `sleep(0, mode)` under another name.

        Args:
            mode: What becomes of unfinished requests, as `sleep`. Further ones wait.
            clear_cache: Forgets the prefix cache too; requests that wait in the middle ("keep") compute their KV again.

        Raises:
            VjaxValidationError: There is no such mode.
        """
        await self.sleep(0, mode)
        if clear_cache:
            await self._call("reset_prefix_cache", True)

    async def resume_generation(self) -> None:
        """Ends `pause_generation`; nothing happens where generation is not paused.

        Raises:
            EngineAsleepError: Weights or KV cache sleep; that takes `wake_up`.
        """
        if await self.is_paused():
            await self.wake_up(["scheduling"])

    async def is_paused(self) -> bool:
        """Whether requests wait for `resume_generation` or `wake_up`."""
        return await self.is_sleeping()

    async def update_weights(self, params: Mapping[str, Any] | Sequence[Any], *, partial: bool = False) -> None:
        """As `LLM.update_weights`. Requests that come meanwhile wait. Who is cancelled half-way leaves an engine that
        sleeps without weights.

        Raises:
            RuntimeError: Another update is under way.
        """
        with self._lock:
            if self._is_updating:
                raise RuntimeError("Another update of the weights is under way; wait for it.")
            self._is_updating = True
        calls = weight_update(params, partial=partial, to_host=not self._client.in_process)
        try:
            method, arguments = next(calls)
            while True:
                method, arguments = calls.send(await self._call(method, *arguments))
        except StopIteration:
            return
        except BaseException:
            self._client.call("abandon_weight_update")
            raise
        finally:
            self._is_updating = False

    async def get_weights(self, names: Sequence[str] | None = None) -> dict[str, np.ndarray]:
        """As `LLM.get_weights`."""
        wanted = await self._call("weight_names") if names is None else names
        return {name: await self._call("get_weight", name) for name in wanted}

    async def collective_rpc(
        self,
        method: str | Callable[..., Any],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
        *,
        timeout: float | None = None,
    ) -> list[Any]:
        """As `LLM.collective_rpc`.

        Args:
            timeout: Seconds to wait for the result; None: without limit. The call itself goes on.

        Raises:
            TimeoutError: They have passed.
        """
        name, arguments = remote_function(method, args, kwargs, in_process=self._client.in_process)
        return [await asyncio.wait_for(self._call(name, *arguments), timeout)]

    async def apply_model(self, func: Callable[[Any], Any]) -> list[Any]:
        """As `LLM.apply_model`."""
        return await self.collective_rpc(OnModel(func))

    async def start_profile(self, profile_prefix: str | None = None) -> None:
        """As `LLM.start_profile`: of the engine's process, or of this one."""
        await self._call("start_profile", profile_prefix)

    async def stop_profile(self) -> None:
        """As `LLM.stop_profile`."""
        await self._call("stop_profile")
