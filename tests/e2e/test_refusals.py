"""A real server with keys, asked by everybody at once: each gets the answer due to him, and good streams go on."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest

from shoal.cluster.commands.keys import append_entry
from shoal.cluster.config import EMBEDDED_MODEL
from shoal.cluster.keys import KEY_PREFIX, hash_key, new_key

pytestmark = pytest.mark.slow

BODY = {"model": EMBEDDED_MODEL, "prompt": "The capital of France is", "max_tokens": 12, "temperature": 0}
TIMEOUT_S = 2.0  # of headers and of bodies
CONFIG = f"""
models: [{{engine: {{max_model_len: 512, kv_memory: 256MiB}}}}]
http: {{max_body_bytes: 64KiB, header_timeout: {TIMEOUT_S}, body_timeout: {TIMEOUT_S}}}
gateways: 2
auth: {{keys_file: keys.yaml}}
"""
RATE = 12


class Guarded(NamedTuple):
    """A server, its keys by what they are for, and its keys file."""

    server: Any
    keys: dict[str, str]
    file: Path

    @contextlib.asynccontextmanager
    async def client(self, name: str | None) -> AsyncIterator[httpx.AsyncClient]:
        headers = {"authorization": f"Bearer {self.keys[name]}"} if name else {}
        async with httpx.AsyncClient(base_url=self.server.url, timeout=60, headers=headers) as client:
            yield client

    def memory(self) -> dict[str, int]:
        """Resident bytes of the gateways and of HAProxy."""
        found: Counter[str] = Counter()
        for pid, command in self.server.processes().items():
            for name in ("gateway", "/bin/haproxy "):
                if name in command:
                    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
                    found[name.strip()] += pages * 4096
        return dict(found)


@pytest.fixture(scope="module")
def guarded(make_server: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    folder = tmp_path_factory.mktemp("guarded")
    (folder / "shoal.yaml").write_text(CONFIG)
    made = {
        "good": new_key("acme"),
        "other": new_key("umbrella", models=["another"]),
        "slow": new_key("acme", limits={"requests_per_minute": RATE}),
        "narrow": new_key("acme", limits={"max_concurrent_requests": 2}),
        "leaving": new_key("acme"),
        "expired": new_key("acme", expires="2020-01-01"),
    }
    for one in made.values():
        append_entry(folder / "keys.yaml", one)
    with make_server(str(folder / "shoal.yaml")) as server:
        server.wait_for("ready after")
        yield Guarded(server, {name: one.key for name, one in made.items()}, folder / "keys.yaml")


async def raw(url: str, pieces: list[bytes], pause_s: float) -> tuple[int, float]:
    """Send these bytes with pauses until the server answers or closes: the status, 0 without one, and the seconds."""
    host, port = url.removeprefix("http://").split(":")
    start = time.monotonic()
    reader, writer = await asyncio.open_connection(host, int(port))
    answer = b""

    async def send() -> None:
        for piece in pieces:
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(pause_s)

    sending = asyncio.create_task(send())
    try:
        async with asyncio.timeout(30):
            answer = await reader.readline()
    except (ConnectionError, asyncio.IncompleteReadError):
        pass
    finally:
        sending.cancel()
        await asyncio.gather(sending, return_exceptions=True)
        writer.close()
    return int(answer.split()[1]) if answer.startswith(b"HTTP/1.") else 0, time.monotonic() - start


async def stream(client: httpx.AsyncClient) -> str:
    """One good stream, to its end."""
    async with client.stream("POST", "/v1/completions", json=BODY | {"stream": True}) as answer:
        assert answer.status_code == 200, await answer.aread()
        *events, last = [line.removeprefix("data: ") async for line in answer.aiter_lines() if line]
    assert last == "[DONE]"
    return "".join(json.loads(event)["choices"][0]["text"] for event in events)


def bad_requests(guarded: Guarded) -> dict[str, tuple[Callable[[], Awaitable[int]], set[int]]]:
    """Each kind of bad request, and the statuses that are right for it; 0 is a connection that was closed."""
    url, good = guarded.server.url, f"authorization: Bearer {guarded.keys['good']}\r\n".encode()
    start = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\n"

    def asked(
        name: str | None, content: Callable[[], Any] | None = None, **options: Any
    ) -> Callable[[], Awaitable[int]]:
        async def ask() -> int:
            body = {"json": BODY} if content is None else {"content": content()}
            async with guarded.client(name) as client:
                return (await client.post("/v1/completions", **body, **options)).status_code

        return ask

    def spoken(pieces: list[bytes], pause_s: float = 0.0) -> Callable[[], Awaitable[int]]:
        async def ask() -> int:
            status, seconds = await raw(url, pieces, pause_s)
            assert seconds < TIMEOUT_S + 15, seconds
            assert status or seconds >= TIMEOUT_S, f"closed without a word after {seconds:.1f} s"
            return status

        return ask

    async def pieces() -> AsyncIterator[bytes]:
        for _ in range(40):
            yield b" " * 4096

    many_headers = b"".join(b"x-%d: 1\r\n" % n for n in range(10_000))
    return {
        "missing": (asked(None), {401}),
        "wrong": (asked(None, headers={"authorization": f"Bearer {KEY_PREFIX}{'x' * 43}"}), {401}),
        "expired": (asked("expired"), {401}),
        "wrong model": (asked("other"), {403}),
        "oversize": (asked("good", lambda: b" " * 100_000), {413}),
        "oversize without a key": (asked(None, lambda: b" " * 60_000), {401}),
        "oversize in chunks": (asked("good", pieces), {413}),
        "no JSON": (asked("good", lambda: b"[" * 50_000), {400}),
        "10,000 headers": (spoken([start + good + many_headers + b"\r\n"]), {400, 431}),
        "a long URL": (spoken([b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\n\r\n"]), {400, 414}),
        "slow headers": (spoken([start, *[b"x-%d: 1\r\n" % n for n in range(400)]], 0.1), {0, 408}),
        "slow body": (spoken([start + good + b"content-length: 500\r\n\r\n", *[b" "] * 400], 0.1), {0, 408}),
        "a body that stalls": (spoken([start + good + b"content-length: 500\r\n\r\n{"]), {0, 408}),
    }


async def attack(guarded: Guarded, rounds: int) -> dict[str, Counter[int]]:
    """All kinds of bad requests at once, so often, while good streams go on. Answers the statuses of each kind."""
    kinds = bad_requests(guarded)
    seen: dict[str, Counter[int]] = {name: Counter() for name in kinds}
    async with guarded.client("good") as client:
        expected = await stream(client)
        is_over = asyncio.Event()

        async def stay_good() -> int:
            count = 0
            while not is_over.is_set():
                assert await stream(client) == expected
                count += 1
            return count

        good = asyncio.create_task(stay_good())
        for _ in range(rounds):
            statuses = await asyncio.gather(*(ask() for ask, _ in kinds.values()))
            for name, status in zip(kinds, statuses, strict=True):
                seen[name][status] += 1
        is_over.set()
        assert await good >= rounds
    return seen


def check_statuses(guarded: Guarded, seen: dict[str, Counter[int]]) -> None:
    allowed = {name: statuses for name, (_, statuses) in bad_requests(guarded).items()}
    wrong = {name: dict(statuses) for name, statuses in seen.items() if not set(statuses) <= allowed[name]}
    assert not wrong


async def test_bad_requests_of_every_kind_get_their_status_while_good_streams_go_on(guarded: Guarded) -> None:
    check_statuses(guarded, await attack(guarded, 2))


async def test_a_limit_a_minute_holds_over_both_gateways(guarded: Guarded) -> None:
    start = time.monotonic()
    statuses: Counter[int] = Counter()
    async with guarded.client("slow") as client:
        for _ in range(3 * RATE):
            # A connection each, so that both gateways have some.
            answer = await client.post(
                "/v1/completions", json=BODY | {"max_tokens": 1}, headers={"connection": "close"}
            )
            statuses[answer.status_code] += 1
            if answer.status_code == 429:
                assert int(answer.headers["retry-after"]) >= 1
                assert answer.json()["error"]["code"] == "rate_limit_exceeded"
    seconds = time.monotonic() - start
    assert set(statuses) == {200, 429}
    # What comes back meanwhile, and what one gateway lets in before the first word of the other.
    assert RATE <= statuses[200] <= RATE + RATE * seconds / 60 + 4


async def test_requests_at_once_are_limited_and_their_places_come_back(guarded: Guarded) -> None:
    async with guarded.client("narrow") as client:
        for _ in range(2):
            long = BODY | {"max_tokens": 64, "ignore_eos": True}
            answers = await asyncio.gather(*(client.post("/v1/completions", json=long) for _ in range(8)))
            statuses = Counter(answer.status_code for answer in answers)
            assert set(statuses) == {200, 429}
            assert 2 <= statuses[200] <= 4
            await asyncio.sleep(1.0)


async def test_a_revoked_key_is_refused_within_moments_and_its_open_stream_ends_well(guarded: Guarded) -> None:
    text = guarded.file.read_text()
    async with guarded.client("leaving") as client:
        body = BODY | {"max_tokens": 100, "ignore_eos": True, "stream": True}
        async with client.stream("POST", "/v1/completions", json=body) as answer:
            assert answer.status_code == 200
            lines = answer.aiter_lines()
            await anext(lines)
            entries = text.split("- id: ")
            own = hash_key(guarded.keys["leaving"])
            revoked = [f"{entry.rstrip()}\n  revoked: true\n" if own in entry else entry for entry in entries]
            guarded.file.write_text("- id: ".join(revoked))
            deadline = time.monotonic() + 4
            refused = 0
            while refused < 6:  # both gateways
                is_refused = (await client.get("/v1/models", headers={"connection": "close"})).status_code == 401
                refused = refused + 1 if is_refused else 0
                assert time.monotonic() < deadline
            rest = [line async for line in lines if line]
            assert rest[-1] == "data: [DONE]"


def test_no_key_is_in_what_the_server_wrote(guarded: Guarded) -> None:
    for key in guarded.keys.values():
        assert key not in guarded.server.output


@pytest.mark.soak
async def test_memory_stays_flat_under_minutes_of_bad_requests(guarded: Guarded) -> None:
    check_statuses(guarded, await attack(guarded, 3))
    before = guarded.memory()
    check_statuses(guarded, await attack(guarded, 40))
    after = guarded.memory()
    assert set(before) == {"gateway", "/bin/haproxy"}
    assert all(after[name] - before[name] < 24 * 2**20 for name in before), (before, after)
