"""How an application goes: gateways refuse what is new, what is open finishes, and then it is deleted."""

from __future__ import annotations

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
    """What the gateways that run answer."""
    from ray import serve
    from ray.serve.exceptions import DeploymentUnavailableError

    from shoal.cluster.app import APP_NAME, GATEWAY_NAME

    app = serve.status().applications.get(APP_NAME)
    gateways = app.deployments.get(GATEWAY_NAME) if app is not None else None
    if gateways is None or not gateways.replica_states.get("RUNNING"):
        return []
    handle = serve.get_deployment_handle(GATEWAY_NAME, APP_NAME)
    try:
        answers = handle.broadcast("drain", node_id, is_over).results(timeout_s=ASK_TIMEOUT_S, return_exceptions=True)
    except (TimeoutError, DeploymentUnavailableError):
        return []
    return [answer for answer in answers if isinstance(answer, DrainState)]
