"""What a browser may do with the admin port: this page only, under names that nobody else can point here."""

from __future__ import annotations

import ipaddress
from collections.abc import Collection, Sequence
from typing import Final
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from shoal.cluster.gateway.errors import ApiError

# Of networks, not of the Internet: no stranger can register a name in them and point it at this machine.
_LOCAL_SUFFIXES: Final = (".localhost", ".local", ".internal", ".lan", ".home.arpa", ".svc", ".cluster.local")
SECURITY_HEADERS: Final = {
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "content-security-policy": "default-src 'none'; frame-ancestors 'none'",
}


class Guard:
    """Refuses requests that another site's page may have sent, and gives every answer SECURITY_HEADERS.

    Against DNS rebinding, a Host must be an address, a name inside a network, or one of `hosts`. A POST must be JSON,
    which browsers do not send to another origin unasked, and of this origin where it says of which one it is.
    """

    def __init__(self, app: ASGIApp, hosts: Collection[str] = ()) -> None:
        self._app = app
        self._hosts = {host.lower() for host in hosts}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in SECURITY_HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        try:
            self._check(scope["method"], Headers(scope=scope))
        except ApiError as error:
            await error.response()(scope, receive, send_with_headers)
            return
        await self._app(scope, receive, send_with_headers)

    def _check(self, method: str, headers: Headers) -> None:
        hosts = headers.getlist("host")
        if not self._is_known(hosts):
            raise ApiError(
                421,
                f"the admin port is not known as {', '.join(hosts)[:200]!r}: use its address, or list the name in "
                f"admin.hosts",
                code="unknown_host",
            )
        if method in ("GET", "HEAD", "OPTIONS"):
            return
        origin = headers.get("origin")
        if origin is not None and urlsplit(origin).netloc.lower() != hosts[0].lower():
            raise ApiError(403, "this came from another site's page", code="cross_site")
        if headers.get("sec-fetch-site", "none") not in ("same-origin", "none"):
            raise ApiError(403, "this came from another site's page", code="cross_site")
        if headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise ApiError(415, "the content-type must be application/json", code="not_json")

    def _is_known(self, hosts: Sequence[str]) -> bool:
        if len(hosts) != 1:
            return False
        try:
            name = urlsplit(f"//{hosts[0]}").hostname
        except ValueError:
            return False
        if not name:
            return False
        return _is_address(name) or "." not in name or name.endswith(_LOCAL_SUFFIXES) or name in self._hosts


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
