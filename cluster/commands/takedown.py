"""How an application goes: gateways refuse what is new, what is open finishes, and then it is deleted."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from typing import Final

from shoal.cluster.channel import DrainState

POLL_S: Final = 0.1
ASK_TIMEOUT_S: Final = 5.0
GONE_TIMEOUT_S: Final = 30.0  # for idle replicas to end, once nothing is open


def is_deployed() -> bool:
    from ray import serve

    from shoal.cluster.app import APP_NAME

    return APP_NAME in serve.status().applications


def drain(
    timeout_s: float | None, say: Callable[[str], None] = lambda text: None, *, node_id: str | None = None
) -> bool:
    """Let the gateways refuse new requests and finish the open ones; whether all have finished.

    A gateway that does not answer has not.

    Those that have not after `timeout_s` (None: the configuration's drain_timeout) are cut off. With `node_id`, only
    the gateways of that node.
    """
    begin = time.monotonic()
    told = ""
    while True:
        answers, num_silent = _ask(node_id, is_over=False)
        states = [state for state in answers if state.is_draining]
        num_open = sum(state.num_open for state in states)
        if num_open == num_silent == 0:
            return True
        limit_s = timeout_s
        if limit_s is None:
            limit_s = max((state.timeout_s for state in states), default=GONE_TIMEOUT_S)
        open_ones = f"{num_open} requests" + (f", and those of {num_silent} silent gateways," if num_silent else "")
        if time.monotonic() - begin > limit_s:
            _ask(node_id, is_over=True)
            say(f"{open_ones} were cut off after {limit_s:g} s")
            return False
        if open_ones != told:
            say(f"{open_ones} are open")
            told = open_ones
        time.sleep(POLL_S)


def delete(timeout_s: float = GONE_TIMEOUT_S) -> bool:
    """Delete the application; whether it is gone within `timeout_s`."""
    from ray import serve

    from shoal.cluster.app import APP_NAME

    serve.delete(APP_NAME, _blocking=False)
    deadline = time.monotonic() + timeout_s
    while is_deployed():
        if time.monotonic() > deadline:
            return False
        time.sleep(POLL_S)
    return True


def _ask(node_id: str | None, *, is_over: bool) -> tuple[list[DrainState], int]:
    """What the gateways that run answer, and how many of them do not. Raises what one of them raises."""
    from ray import serve
    from ray.exceptions import RayTaskError
    from ray.serve.exceptions import DeploymentUnavailableError

    from shoal.cluster.app import APP_NAME, GATEWAY_NAME

    deadline = time.monotonic() + ASK_TIMEOUT_S
    while True:
        app = serve.status().applications.get(APP_NAME)
        gateways = app.deployments.get(GATEWAY_NAME) if app is not None else None
        num_running = gateways.replica_states.get("RUNNING", 0) if gateways is not None else 0
        if not num_running:
            return [], 0
        handle = serve.get_deployment_handle(GATEWAY_NAME, APP_NAME)
        if not handle.is_initialized:  # Serve keeps it
            handle._init(_run_router_in_separate_loop=True)  # there is no event loop here, whatever SERVE_ENV says
        answers: list[object] = []
        with contextlib.suppress(TimeoutError, DeploymentUnavailableError):
            asked = handle.broadcast("drain", node_id, is_over)
            answers = asked.results(timeout_s=ASK_TIMEOUT_S, return_exceptions=True)
        if failed := next((answer for answer in answers if isinstance(answer, RayTaskError)), None):
            raise failed
        states = [answer for answer in answers if isinstance(answer, DrainState)]
        # A handle that is new knows of no replica yet.
        if len(states) >= num_running or time.monotonic() > deadline:
            return states, max(0, num_running - len(states))
        time.sleep(POLL_S)
