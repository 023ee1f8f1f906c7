"""Whether a gateway should get requests: its models answer, and it does not drain."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Collection
from typing import Final

from starlette.types import ASGIApp, Receive, Scope, Send

from shoal.cluster.gateway.backend import Backend, ReplicaUnavailableError
from shoal.cluster.gateway.errors import ApiError

READY_FOR_S: Final = 1.0  # so long one look at the replicas answers every probe
LOOK_TIMEOUT_S: Final = 5.0
DRAIN_RETRY_AFTER_S: Final = 5
PROBE_PATHS: Final = frozenset(("/ping", "/health"))  # whose requests nobody waits for


class Readiness:
    """Looks at the replicas at most once in READY_FOR_S, however many ask. Lives in one event loop."""

    def __init__(
        self, backends: Callable[[], Collection[Backend]], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._backends = backends
        self._clock = clock
        self._look: asyncio.Task[ReplicaUnavailableError | None] | None = None
        self._looked_s = 0.0

    async def check(self) -> None:
        """Raise ReplicaUnavailableError unless every model answers, within LOOK_TIMEOUT_S."""
        is_old = self._look is not None and self._look.done() and self._clock() - self._looked_s >= READY_FOR_S
        if self._look is None or is_old:
            self._look = asyncio.create_task(self._look_at_all())
        problem = await asyncio.shield(self._look)  # a probe that leaves takes nobody else's look with it
        if problem is not None:
            raise problem

    async def _look_at_all(self) -> ReplicaUnavailableError | None:
        checks = (backend.check_health() for backend in self._backends())
        try:
            await asyncio.wait_for(asyncio.gather(*checks), LOOK_TIMEOUT_S)
        except ReplicaUnavailableError as error:
            return error
        except TimeoutError:
            return ReplicaUnavailableError(f"the replicas have not answered within {LOOK_TIMEOUT_S:g} s")
        finally:
            self._looked_s = self._clock()
        return None


class DrainableApp:
    """An ASGI application that finishes what it has and takes nothing new once it drains."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self.is_draining = False
        self._open: set[asyncio.Task[object]] = set()

    @property
    def num_open(self) -> int:
        """Requests, but for probes."""
        return len(self._open)

    def cut_off(self) -> None:
        """End what is open."""
        for task in self._open:
            task.cancel()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self.is_draining and scope["type"] == "http" and scope["path"] != "/ping":
            await _refusal().response()(scope, receive, send)
            return
        if scope["type"] != "http" or scope["path"] in PROBE_PATHS:
            await self._app(scope, receive, send)
            return
        task = asyncio.current_task()
        assert task is not None, "ASGI applications run in tasks"
        self._open.add(task)
        try:
            await self._app(scope, receive, send)
        finally:
            self._open.discard(task)


def _refusal() -> ApiError:
    return ApiError(
        503,
        "this server is about to stop and takes no new requests",
        type="service_unavailable_error",
        code="draining",
        headers={"retry-after": str(DRAIN_RETRY_AFTER_S), "connection": "close"},
    )
