"""What is too much is refused quickly and in a few bytes: headers, URLs, bodies that stall, and JSON made to hurt."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

import httpx
import pytest

from shoal.cluster.gateway.front import MAX_HEADER_BYTES, MAX_HEADERS, MAX_URL_BYTES
from shoal.cluster.gateway.routes import build_app

PATHS = ["/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"]
SLOW_S = 5.0  # no refusal takes so long, on a busy machine


async def ask(
    app: Any,
    parts: AsyncIterator[bytes],
    *,
    path: str = "/v1/completions",
    query: bytes = b"",
    headers: Sequence[tuple[bytes, bytes]] = (),
) -> tuple[int, Any, dict[bytes, bytes]]:
    """Speak ASGI itself: status, error and headers of the answer to a POST whose body comes in these parts."""
    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "scheme": "http",
        "path": path, "raw_path": path.encode(), "query_string": query, "root_path": "", "headers": list(headers),
        "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 2),
    }  # fmt: skip
    sent: list[dict[str, Any]] = []

    has_ended = False

    async def receive() -> dict[str, Any]:
        nonlocal has_ended
        async for part in parts:
            return {"type": "http.request", "body": part, "more_body": True}
        if has_ended:
            await asyncio.Event().wait()
        has_ended = True
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Any) -> None:
        sent.append(message)

    await app(scope, receive, send)
    body = b"".join(message.get("body", b"") for message in sent[1:])
    return sent[0]["status"], json.loads(body).get("error"), dict(sent[0]["headers"])


async def pieces(*parts: bytes, pause_s: float = 0.0, stalls: bool = False) -> AsyncIterator[bytes]:
    for part in parts:
        await asyncio.sleep(pause_s)
        yield part
    if stalls:
        await asyncio.Event().wait()


@pytest.fixture
def app(served: Any) -> Any:
    return build_app({"smollm2": served}, max_body_bytes=2**20, body_timeout_s=0.2)


@pytest.mark.parametrize("parts", [[], [b"{"], [b'{"model": ', b'"smollm2"']])
async def test_a_body_that_stalls_is_408_and_its_connection_ends(app: Any, parts: list[bytes]) -> None:
    start = time.monotonic()
    status, error, headers = await ask(app, pieces(*parts, stalls=True))
    assert (status, error["code"]) == (408, "body_timeout")
    assert headers[b"connection"] == b"close"
    assert 0.2 <= time.monotonic() - start < SLOW_S


async def test_a_body_that_trickles_is_408_too(app: Any) -> None:
    start = time.monotonic()
    status, error, _ = await ask(app, pieces(*[b" "] * 1000, pause_s=0.01))
    assert (status, error["code"]) == (408, "body_timeout")
    assert time.monotonic() - start < SLOW_S


async def test_a_large_body_that_keeps_coming_may_take_longer(app: Any) -> None:
    body = json.dumps({"model": "smollm2", "prompt": "Hi"}).encode()
    status, error, _ = await ask(app, pieces(*[b" " * 2**15] * 5, body, pause_s=0.1))
    assert (status, error) == (200, None)


@pytest.mark.parametrize("headers", [
    [(f"x-{n}".encode(), b"1") for n in range(10_000)],
    [(f"x-{n}".encode(), b"1") for n in range(MAX_HEADERS + 1)],
    [(b"x-long", b"a" * (MAX_HEADER_BYTES + 1))],
])  # fmt: skip
async def test_too_many_or_too_long_headers_are_431(app: Any, headers: list[tuple[bytes, bytes]]) -> None:
    status, error, _ = await ask(app, pieces(stalls=True), headers=headers)
    assert (status, error["code"]) == (431, "headers_too_large")


async def test_a_url_that_is_too_long_is_414(app: Any) -> None:
    for path, query in (("/" + "a" * MAX_URL_BYTES, b""), ("/v1/completions", b"a" * MAX_URL_BYTES)):
        status, error, _ = await ask(app, pieces(stalls=True), path=path, query=query)
        assert (status, error["code"]) == (414, "url_too_long")


@pytest.mark.parametrize("declared", [b"99999999999", b"9" * 5000])
async def test_a_body_that_says_it_is_too_large_is_not_read(app: Any, declared: bytes) -> None:
    status, error, _ = await ask(app, pieces(stalls=True), headers=[(b"content-length", declared)])
    assert (status, error["code"]) == (413, "body_too_large")


async def test_a_chunked_body_is_read_no_further_than_the_limit(app: Any) -> None:
    taken = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal taken
        while True:
            taken += 2**16
            yield b" " * 2**16

    status, error, _ = await ask(app, endless(), headers=[(b"transfer-encoding", b"chunked")])
    assert (status, error["code"]) == (413, "body_too_large")
    assert taken <= 2**20 + 2**16


BOMBS = {
    "arrays": b"[" * 10**6,
    "closed arrays": b"[" * 5 * 10**5 + b"]" * 5 * 10**5,
    "objects": b'{"a":' * 2 * 10**5,
    "objects in a field": b'{"model": "smollm2", "user": ' + b'{"a":' * 10**5 + b"1" + b"}" * 10**5 + b"}",
    "a number": b'{"model": "smollm2", "seed": ' + b"9" * 10**6 + b"}",
    "a long fraction": b'{"model": "smollm2", "temperature": 0.' + b"1" * 10**6 + b"}",
    "a large exponent": b'{"model": "smollm2", "temperature": 1e' + b"9" * 10**5 + b"}",
    "NUL": b"\0" * 1000,
    "NUL in a name": b'{"mod\0el": "smollm2"}',
    "no UTF-8": b'{"model": "\xff\xfe\xfa"}',
    "half a surrogate": b'{"model": "\\ud800"}',
    "a byte order mark": b"\xef\xbb\xbf{}",
    "many fields": b"{" + b",".join(b'"f%d": 1' % n for n in range(50_000)) + b"}",
    "the same field often": b"{" + b",".join([b'"model": "a"'] * 50_000) + b"}",
    "many token ids": b'{"model": "smollm2", "tokens": [' + b",".join([b"-1"] * 200_000) + b"]}",
    "an infinity": b'{"model": "smollm2", "top_p": Infinity}',
}


@pytest.mark.parametrize("name", BOMBS)
@pytest.mark.parametrize("path", PATHS)
async def test_json_that_is_made_to_hurt_is_400_soon_and_in_few_words(served: Any, name: str, path: str) -> None:
    app = build_app({"smollm2": served})
    start = time.monotonic()
    status, error, _ = await ask(app, pieces(BOMBS[name]), path=path)
    assert status in (400, 404), (status, error)
    assert len(error["message"]) < 600
    assert len(error["param"] or "") < 300
    assert time.monotonic() - start < SLOW_S


async def test_a_large_body_of_nothing_but_fields_is_refused_without_looking_at_each(served: Any) -> None:
    app = build_app({"smollm2": served})
    for space in (b"", b" \n"):
        fields = b",".join(b'"f%d"%b: 1' % (n, space) for n in range(1_000_000))
        for body in (b"{" + fields + b"}", b'{"messages": [{' + fields + b"}]}"):
            start = time.process_time()
            status, error, _ = await ask(app, pieces(body), path="/v1/chat/completions")
            assert status == 400
            assert "fields" in error["message"]
            assert time.process_time() - start < SLOW_S


async def test_a_large_text_full_of_quotes_and_colons_is_no_field(served: Any) -> None:
    body = json.dumps({"model": "smollm2", "prompt": '":' * 300_000}).encode()
    status, error, _ = await ask(build_app({"smollm2": served}), pieces(body))
    assert (status, error["code"]) == (400, "context_length_exceeded")


async def test_a_nul_in_a_prompt_is_text_like_any_other(client: httpx.AsyncClient, backend: Any) -> None:
    answer = await client.post("/v1/completions", json={"model": "smollm2", "prompt": "a\0b"})
    assert answer.status_code == 200
    assert backend.calls
