"""The loop of an engine core that serves clients outside of its own thread, or process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

from vjax.engine.protocol import AbortRequests, AddRequests, Call, Command, Outputs, Reply, Stop
from vjax.errors import VjaxValidationError
from vjax.messages import EngineOutput

if TYPE_CHECKING:
    from vjax.engine.core import EngineCore


def run_engine(
    core: EngineCore,
    receive: Callable[[bool], Sequence[Command]],
    send: Callable[[Outputs | Reply], None],
    wake: Callable[[], None],
    *,
    log_stats: bool,
) -> None:
    """Obeys commands and steps while there is something to do, until `Stop`; waits for commands while there is not.

    Args:
        receive: Returns the commands that have arrived; given True it waits for one where there is none.
        send: Takes what is for the clients.
        wake: Ends the waiting of `receive`, by a `Wake` to itself; called in any thread.
        log_stats: Send the scheduler's numbers after every step, also where it gave no outputs.
    """
    core.wake_by(wake)
    while True:
        for command in receive(not core.has_work):
            if isinstance(command, Stop):
                return
            _obey(core, command, send)
        if not core.has_work:
            continue
        outputs = core.step()
        if log_stats:
            send(Outputs(outputs, core.stats()))
        elif outputs:
            send(Outputs(outputs))


def _obey(core: EngineCore, command: Command, send: Callable[[Outputs | Reply], None]) -> None:
    if isinstance(command, AddRequests):
        for request in command.requests:
            try:
                core.add_request(request)
            except VjaxValidationError as e:
                # Front ends check first; one that did not has its own request fail.
                send(Outputs([EngineOutput(request.request_id, [], "error", error=str(e))]))
    elif isinstance(command, AbortRequests):
        core.abort_requests(command.request_ids)
    elif isinstance(command, Call):
        try:
            value = getattr(core, command.method)(*command.arguments)
        except Exception as e:
            send(Reply(command.call_id, error=e))
            return
        if isinstance(value, Future):
            # A later step does the rest; its outputs follow the reply.
            value.add_done_callback(lambda done: send(_reply(command.call_id, done)))
        else:
            send(Reply(command.call_id, value))


def _reply(call_id: int, done: Future[Any]) -> Reply:
    return Reply(call_id, error=error) if (error := done.exception()) is not None else Reply(call_id, done.result())
