"""An HTTP server inside a process that is not its own: a port, and an ASGI application on it."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
import time
from collections.abc import Iterator
from typing import Final

import uvicorn
from starlette.types import ASGIApp

BIND_PERIOD_S: Final = 0.2
BACKLOG: Final = 128
SHUTDOWN_S: Final = 2  # for answers that are under way
KEEP_ALIVE_S: Final = 30


class PortTakenError(RuntimeError):
    """Somebody else listens there."""


async def bind(host: str, port: int, *, timeout_s: float) -> socket.socket:
    """A listening socket. Whoever holds the port may leave within `timeout_s`, as the process before this one does in
    a rolling update.

    Raises PortTakenError naming the setting.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            return _bind_now(host, port)
        except OSError as error:
            if error.errno != errno.EADDRINUSE or time.monotonic() > deadline:
                raise PortTakenError(
                    f"cannot listen on {host}:{port} ({error.strerror or error}): stop what listens there, or choose "
                    f"another admin.port or admin.host"
                ) from None
        await asyncio.sleep(BIND_PERIOD_S)


def _bind_now(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(BACKLOG)
    except OSError:
        listener.close()
        raise
    return listener


class HttpServer:
    """Serves `app` in the running event loop, from `start` to `close`."""

    def __init__(self, app: ASGIApp) -> None:
        config = uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            lifespan="off",
            server_header=False,
            timeout_keep_alive=KEEP_ALIVE_S,
            timeout_graceful_shutdown=SHUTDOWN_S,
        )
        self._server = _Server(config)
        self._serving: asyncio.Task[None] | None = None

    def start(self, listener: socket.socket) -> None:
        """Answer on a listening socket from now on."""
        self._serving = asyncio.create_task(self._server.serve(sockets=[listener]))

    def check(self) -> None:
        """Raise RuntimeError if it has ended."""
        if self._serving is None or self._serving.done():
            raise RuntimeError("the HTTP server of the admin port has ended")

    async def close(self) -> None:
        """Give open answers SHUTDOWN_S to end."""
        self._server.should_exit = True
        if self._serving is not None:
            await asyncio.wait((self._serving,), timeout=2 * SHUTDOWN_S)


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """None: they are the process's, not this server's."""
        yield
