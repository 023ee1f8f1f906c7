"""The playground's way to the gateways: their own HTTP port, so that the same keys and limits hold."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import httpx
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from shoal.cluster.gateway.errors import ApiError
from shoal.cluster.gateway.front import CLIENT_CLOSED_REQUEST, read_body
from shoal.cluster.gateway.sse import ClientGoneError, until_disconnect

CONNECT_TIMEOUT_S: Final = 5.0
READ_TIMEOUT_S: Final = 600.0  # between two events: a long prompt in front of a long queue

# Of one connection, or of the browser's talk with this origin.
_NOT_SENT_ON: Final = frozenset(
    {
        "connection", "keep-alive", "proxy-authenticate", "proxy-authorization", "te", "trailer", "transfer-encoding",
        "upgrade", "expect", "host", "content-length", "accept-encoding", "origin", "referer", "cookie",
        "sec-fetch-site", "sec-fetch-mode", "sec-fetch-dest", "sec-fetch-user",
    }
)  # fmt: skip
_NOT_SENT_BACK: Final = frozenset(
    {
        "connection", "keep-alive", "proxy-authenticate", "trailer", "transfer-encoding", "upgrade", "content-length",
        "date", "server", "set-cookie", "content-security-policy",
    }
)  # fmt: skip


class Proxy:
    """Passes requests on to a gateway. What the client sends, its key included, is neither kept nor logged."""

    def __init__(
        self,
        base_url: str,
        *,
        max_body_bytes: int,
        body_timeout_s: float,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        """`base_url` of the gateways' port. Bodies are read as they read them. `transport`: another way than TCP."""
        self._max_body_bytes = max_body_bytes
        self._body_timeout_s = body_timeout_s
        self._client = httpx.AsyncClient(
            base_url=base_url,
            timeout=httpx.Timeout(READ_TIMEOUT_S, connect=CONNECT_TIMEOUT_S, pool=CONNECT_TIMEOUT_S),
            trust_env=False,  # the environment's proxies are not for a port of this machine
            transport=transport,
            headers={"accept-encoding": "identity"},  # the answer is passed on as it is
        )

    async def close(self) -> None:
        await self._client.aclose()

    async def forward(self, http: Request) -> Response:
        """The gateway's answer, as it comes. If the client leaves, the gateway's request ends too.

        Raises ApiError where no gateway takes it.
        """
        try:
            request = self._client.build_request(
                http.method,
                http.url.path,
                headers=[(name, value) for name, value in http.headers.items() if name not in _NOT_SENT_ON],
                content=await read_body(http, max_bytes=self._max_body_bytes, timeout_s=self._body_timeout_s),
            )
            answer = await until_disconnect(http.receive, self._client.send(request, stream=True))
        except ClientGoneError:
            return Response(status_code=CLIENT_CLOSED_REQUEST)
        except httpx.HTTPError as error:
            raise ApiError(
                502,
                f"no gateway answers at {self._client.base_url} ({type(error).__name__}); trying again may help",
                type="service_unavailable_error",
                code="no_gateway",
                headers={"retry-after": "2"},
            ) from None
        return _PassedOn(answer)


class _PassedOn(Response):
    """Another server's answer, with its status and headers. That server's request is over when this one is."""

    def __init__(self, answer: httpx.Response) -> None:
        super().__init__(status_code=answer.status_code)
        self.raw_headers = list(_headers_back(answer))
        self._answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await until_disconnect(receive, self._send_all(send))
        except (ClientGoneError, OSError):  # a server may also tell by failing to send
            return
        finally:
            await self._answer.aclose()

    async def _send_all(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async for part in self._answer.aiter_raw():
            await send({"type": "http.response.body", "body": part, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def _headers_back(answer: httpx.Response) -> Iterator[tuple[bytes, bytes]]:
    for name, value in answer.headers.raw:
        if name.lower().decode("latin-1") not in _NOT_SENT_BACK:
            yield name.lower(), value
