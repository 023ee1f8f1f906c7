"""What is refused before anybody looks at what a request wants: too many headers, too long a URL, too slow a body.

HAProxy stands in front and refuses most of it itself; this holds where it does not.
"""

from __future__ import annotations

import asyncio
from typing import Final

from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp, Receive, Scope, Send

from shoal.cluster.gateway.errors import ApiError

MAX_HEADERS: Final = 100
MAX_HEADER_BYTES: Final = 32 * 2**10
MAX_URL_BYTES: Final = 8 * 2**10
# A body that comes this fast, in bytes a second, is waited for however large it is.
LEAST_BODY_RATE: Final = 64 * 2**10
CLIENT_CLOSED_REQUEST: Final = 499  # nginx's code for an answer that nobody reads


class FrontMiddleware:
    """Answers 431 and 414."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        error = _refusal(scope) if scope["type"] == "http" else None
        await (self._app if error is None else error.response())(scope, receive, send)


def _refusal(scope: Scope) -> ApiError | None:
    headers = scope["headers"]
    if len(headers) > MAX_HEADERS or sum(len(name) + len(value) for name, value in headers) > MAX_HEADER_BYTES:
        return ApiError(
            431,
            f"too many headers, or too long ones: this server takes {MAX_HEADERS}, of {MAX_HEADER_BYTES} bytes in all",
            code="headers_too_large",
        )
    if len(scope.get("raw_path") or scope["path"]) + len(scope["query_string"]) > MAX_URL_BYTES:
        return ApiError(414, f"the URL is longer than {MAX_URL_BYTES} bytes", code="url_too_long")
    return None


async def read_body(http: Request, *, max_bytes: int, timeout_s: float) -> bytes:
    """All of a request's body. Raises ApiError: 413, 408 for one that stalls or trickles, 499 if the client leaves.

    It may take timeout_s, and a second more for each LEAST_BODY_RATE bytes that have come.
    """
    too_large = ApiError(
        413, f"the body is larger than {max_bytes} bytes, the limit of this server", code="body_too_large"
    )
    declared = http.headers.get("content-length", "")
    if declared.isdecimal() and int(declared[:20]) > max_bytes:
        raise too_large
    data = bytearray()
    try:
        async with asyncio.timeout(timeout_s) as deadline:
            first_s = deadline.when() or 0.0
            async for part in http.stream():
                data += part
                if len(data) > max_bytes:
                    raise too_large
                deadline.reschedule(first_s + len(data) / LEAST_BODY_RATE)
            return bytes(data)
    except TimeoutError:
        raise ApiError(
            408,
            f"the body did not come in {timeout_s:g} s: send it without pauses",
            code="body_timeout",
            headers={"connection": "close"},
        ) from None
    except ClientDisconnect:
        raise ApiError(CLIENT_CLOSED_REQUEST, "the client closed the connection") from None
