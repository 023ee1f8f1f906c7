"""Answers over time: server-sent events, and the watch for a client that goes away."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping
from contextlib import aclosing
from typing import Any, TypeVar

from fastapi import Response
from starlette.types import Receive, Scope, Send

from shoal.cluster.gateway.responses import encode

DONE = b"data: [DONE]\n\n"

_T = TypeVar("_T")


class ClientGoneError(Exception):
    """The client closed its connection; there is nobody to answer."""


class ChunkWriter:
    """Events of one stream. What all its chunks share is encoded once; a chunk costs only what is new in it."""

    def __init__(self, *, id: str, object: str, created: int, model: str, has_usage: bool) -> None:
        head: bytes = encode({"id": id, "object": object, "created": created, "model": model})
        self._start = b"data: " + head[:-1] + b',"choices":['
        self._end = b'],"usage":null}\n\n' if has_usage else b"]}\n\n"

    def chunk(self, choice: Any, usage: Any = None) -> bytes:
        """One event for one choice, with the usage so far where the client asked for it."""
        end = self._end if usage is None else b'],"usage":' + encode(usage) + b"}\n\n"
        return self._start + encode(choice) + end

    def usage_chunk(self, usage: Any, timeline: Mapping[str, float] | None = None) -> bytes:
        """The last event before [DONE]: no choice, the usage of the whole call, and where its time went if that was
        asked for. OpenAI's clients keep a key that they do not know.
        """
        end = b"}\n\n" if timeline is None else b',"timeline":' + encode(timeline) + b"}\n\n"
        return self._start + b'],"usage":' + encode(usage) + end


def error_event(body: Any) -> bytes:
    """An error after the stream began; clients see it as data, and [DONE] follows so that none waits."""
    return b"data: " + encode(body) + b"\n\n"


async def until_disconnect(receive: Receive, work: Coroutine[Any, Any, _T]) -> _T:
    """Do `work`, but cancel it and raise ClientGoneError when the client disconnects first."""
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientGoneError
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Sends events as they come, several at a time when they come together.

    The generator is closed whichever way the answer ends: with its last event, with an exception, or because the
    client went away. Nothing is sent before the first event, so an exception until then becomes a proper error answer,
    and `first_headers` is asked for more headers then.
    """

    media_type = "text/event-stream"

    def __init__(
        self, events: AsyncGenerator[bytes, None], first_headers: Callable[[], Mapping[str, str]] = dict
    ) -> None:
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._events = events
        self._first_headers = first_headers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await until_disconnect(receive, self._send_all(send, scope["state"]["server_send"]))
        except (ClientGoneError, OSError):  # a server may also tell by failing to send
            return

    async def _send_all(self, send: Send, server_send: Send) -> None:
        """`server_send`: for what no middleware looks at."""
        async with aclosing(self._events) as events:
            has_started = False
            async for event in events:
                if not has_started:
                    self.headers.update(self._first_headers())
                    await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
                    has_started = True
                await server_send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})
