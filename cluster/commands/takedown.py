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

    Those that have not after `timeout_s` (None: the configuration's drain_timeout) are cut off. With `node_id`, only
    the gateways of that node.
    """
    begin = time.monotonic()
    told = -1
    while True:
        states = [state for state in _ask(node_id, is_over=False) if state.is_draining]
        num_open = sum(state.num_open for state in states)
        if num_open == 0:
            return True
        limit_s = timeout_s if timeout_s is not None else max(state.timeout_s for state in states)
        if time.monotonic() - begin > limit_s:
            _ask(node_id, is_over=True)
            say(f"{num_open} requests were cut off after {limit_s:g} s")
            return False
        if num_open != told:
            say(f"{num_open} requests are open")
            told = num_open
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


def _ask(node_id: str | None, *, is_over: bool) -> list[DrainState]:
    """What the gateways that run answer. Raises what one of them raises."""
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
            return []
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
            return states
        time.sleep(POLL_S)
