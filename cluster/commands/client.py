"""A client's view of a running server, over the standard library's HTTP."""

from __future__ import annotations

import http.client
import json
import os
import urllib.error
import urllib.request
from collections.abc import Generator
from typing import Any, Final

_TIMEOUT_S: Final = 10.0
KEY_ENV: Final = "SHOAL_API_KEY"  # not an argument: those are seen by everybody on the machine
_STREAM_TIMEOUT_S: Final = 600.0  # a long prompt in front of a long queue


class ServerError(RuntimeError):
    """The server is not there, or answered with an error; the message says what to do."""


def get(url: str) -> str:
    """Raises ServerError."""
    with _open(urllib.request.Request(url), _TIMEOUT_S) as response:
        return str(response.read().decode())


def get_json(url: str) -> Any:
    """Raises ServerError."""
    return json.loads(get(url))


def stream_events(url: str, body: dict[str, Any]) -> Generator[dict[str, Any], None, None]:
    """POST `body` and yield the answer's server-sent events. Raises ServerError, also for an event that is one."""
    request = urllib.request.Request(url, json.dumps(body).encode(), {"content-type": "application/json"})
    with _open(request, _STREAM_TIMEOUT_S) as response:
        for line in response:
            data = line.decode().removeprefix("data: ").strip()
            if not line.startswith(b"data: ") or data == "[DONE]":
                continue
            event = json.loads(data)
            if "error" in event:
                raise ServerError(event["error"]["message"])
            yield event


def _open(request: urllib.request.Request, timeout_s: float) -> http.client.HTTPResponse:
    if key := os.environ.get(KEY_ENV):
        request.add_unredirected_header("authorization", f"Bearer {key}")
    try:
        response: http.client.HTTPResponse = urllib.request.urlopen(request, timeout=timeout_s)
    except urllib.error.HTTPError as error:
        raise ServerError(_message(error)) from None
    except (urllib.error.URLError, http.client.HTTPException, OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        raise ServerError(
            f"no server answers at {request.full_url} ({reason}): "
            f"start one with `shoal serve`, or name another with --url"
        ) from None
    return response


def _message(error: urllib.error.HTTPError) -> str:
    text = error.read().decode(errors="replace")
    try:
        return str(json.loads(text)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return f"{error.code} {error.reason}: {text[:200]}"
