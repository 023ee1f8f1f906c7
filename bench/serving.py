"""Streams of /v1/completions from a server of our own, against the offline engine at the same work, in turn.

    python bench/serving.py [--repeats 5] [--threads N] [--quick]

Starts `shoal serve` on a free port. Each wave sends as many requests as there are clients, at once, each a prompt of
token ids that is completed greedily to its full length; an offline wave is the same prompts in one `generate`.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Coroutine, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast

import machine
import uvloop
from machine import Workload

from shoal.cluster.config import EMBEDDED_MODEL, locate_model
from shoal.engine import LLM, SamplingParams

HOST = "127.0.0.1"
KV_BYTES = 2**30
START_TIMEOUT_S = 180.0
STOP_TIMEOUT_S = 40.0
STREAM_TIMEOUT_S = 120.0

# Who takes part, by words of the command.
PROCESSES = {
    "replica": "ServeReplica:shoal:replica",
    "gateway": "ServeReplica:shoal:gateway",
    "admin": "ServeReplica:shoal:admin",
    "haproxy": "haproxy",
    "ray": "/ray/",  # its own programs
    "serve": "ray::",  # controller, proxies
}

T = TypeVar("T")


class Answer(NamedTuple):
    """One stream, as its client saw it. Seconds from sending the request."""

    first_s: float  # first event
    last_s: float  # end of the answer
    events: list[bytes]  # JSON

    @property
    def usage(self) -> Mapping[str, Any]:
        """Of the last event."""
        usage: Mapping[str, Any] = json.loads(self.events[-1])["usage"]
        return usage


class Served(NamedTuple):
    """A server that is up."""

    port: int
    ready_s: float  # from the command to "ready"
    output: str  # what it had printed by then


class ServerError(RuntimeError):
    """The server did not start, or answered something other than a stream."""


@contextlib.contextmanager
def server(threads: int) -> Iterator[Served]:
    """`shoal serve` of the embedded model as a process of its own."""
    port = free_port()
    with tempfile.TemporaryFile("w+") as log:
        start = time.perf_counter()
        process = subprocess.Popen(command(port, threads), stdout=log, stderr=subprocess.STDOUT)
        try:
            output = wait_until_ready(port, process, log.fileno())
            yield Served(port, time.perf_counter() - start, output)
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(STOP_TIMEOUT_S)


def command(port: int, threads: int) -> list[str]:
    """`shoal serve` with the embedded model in bfloat16."""
    settings = {
        "--port": port,
        "--admin-port": free_port(),
        "--dtype": "bfloat16",
        "--num-threads": threads,
        "--kv-memory": KV_BYTES,
    }
    arguments = [str(word) for pair in settings.items() for word in pair]
    return [sys.executable, "-m", "shoal.cluster.cli", "serve", *arguments]


def wait_until_ready(port: int, process: subprocess.Popen[bytes], log: int) -> str:
    """What the server has printed once it is ready. `log`: descriptor of the file that it writes to."""
    deadline = time.monotonic() + START_TIMEOUT_S
    path = Path(f"/proc/self/fd/{log}")
    while "ready after" not in (output := path.read_text()):
        if process.poll() is not None or time.monotonic() > deadline:
            raise ServerError(f"`shoal serve` on port {port} did not come up:\n{output}")
        time.sleep(0.05)
    return output


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
        return port


def request_bytes(port: int, path: str, body: Mapping[str, Any]) -> bytes:
    """A POST whose connection ends with the answer."""
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: {HOST}:{port}\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(data)}\r\nConnection: close\r\n\r\n".encode() + data


def completion_request(port: int, prompt: Sequence[int], num_new: int) -> bytes:
    """A streamed greedy completion of full length."""
    return request_bytes(
        port,
        "/v1/completions",
        {
            "model": EMBEDDED_MODEL,
            "prompt": prompt,
            "max_tokens": num_new,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        },
    )


class Client(asyncio.Protocol):
    """One request on a connection of its own. It only keeps what comes, and when: it shares the cores with what it
    measures.
    """

    def __init__(self, request: bytes) -> None:
        self._request = request
        self._pieces: list[bytes] = []
        self._start = self._last = 0.0
        self._first: float | None = None  # piece that holds an event
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        cast(asyncio.WriteTransport, transport).write(self._request)
        self._start = time.perf_counter()

    def data_received(self, data: bytes) -> None:
        self._last = time.perf_counter()
        if self._first is None and b"data: " in data:
            self._first = self._last
        self._pieces.append(data)

    def connection_lost(self, error: Exception | None) -> None:
        self.ended.set_exception(error) if error is not None else self.ended.set_result(None)

    def answer(self) -> Answer:
        """Raises ServerError for anything but a whole stream."""
        head, _, body = b"".join(self._pieces).partition(b"\r\n\r\n")
        if not head.startswith(b"HTTP/1.1 200") or b"transfer-encoding: chunked" not in head.lower():
            raise ServerError((head + body[:2000]).decode(errors="replace"))
        *events, done = [line[6:] for line in dechunked(body).split(b"\n") if line.startswith(b"data: ")]
        if done != b"[DONE]" or self._first is None:
            raise ServerError(f"a stream was cut off: {body[-500:]!r}")
        return Answer(self._first - self._start, self._last - self._start, events)


def dechunked(body: bytes) -> bytes:
    """The content of a body in HTTP/1.1's chunked transfer coding."""
    parts, at = [], 0
    while size := int(body[at : (end := body.index(b"\r\n", at))], 16):
        parts.append(body[end + 2 : end + 2 + size])
        at = end + 2 + size + 2
    return b"".join(parts)


async def stream(port: int, requests: Sequence[bytes]) -> tuple[float, list[Answer]]:
    """All requests at once, a connection each: seconds until the last answer's end, and the answers."""
    loop = asyncio.get_running_loop()
    start = time.perf_counter()
    connections = [loop.create_connection(lambda request=request: Client(request), HOST, port) for request in requests]  # type: ignore[misc]  # fmt: skip
    clients = [client for _, client in await asyncio.gather(*connections)]
    async with asyncio.timeout(STREAM_TIMEOUT_S):
        await asyncio.gather(*(client.ended for client in clients))
    seconds = time.perf_counter() - start
    return seconds, [client.answer() for client in clients]


def wave(port: int, prompts: Sequence[list[int]], num_new: int) -> tuple[float, list[Answer]]:
    """A streamed completion of each prompt, all at once: seconds until the last answer's end, and the answers."""
    requests = [completion_request(port, prompt, num_new) for prompt in prompts]
    seconds, answers = run(stream(port, requests))
    wrong = [answer for answer in answers if answer.usage["completion_tokens"] != num_new]
    assert not wrong, f"{len(wrong)} of {len(answers)} streams do not have {num_new} tokens: {wrong[0]}"
    return seconds, answers


def run(work: Coroutine[Any, Any, T]) -> T:
    """In an event loop that takes little of the cores."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(work)


def warm_up(llm: LLM, port: int, workload: Workload, count: int) -> None:
    prompts = workload.prompts(count, workload.num_prompt, seed=-1)
    wave(port, prompts, num_new=4)
    llm.generate(prompts, SamplingParams(max_tokens=4, temperature=0, ignore_eos=True), use_tqdm=False)


def measure(llm: LLM, port: int, workload: Workload, count: int) -> dict[str, Any]:
    """`count` clients at once over HTTP, and as many prompts offline, in turn. Beside that, who takes the cores while
    tokens go over HTTP: microseconds of processor time a token.
    """
    params = SamplingParams(max_tokens=workload.num_new, temperature=0, ignore_eos=True)
    offline_seconds, http_seconds, answers = [], [], []
    cores_s = dict.fromkeys(PROCESSES, 0.0)
    for repeat in range(workload.repeats):
        prompts = workload.prompts(count, workload.num_prompt, seed=repeat)
        start = time.perf_counter()
        llm.generate(prompts, params, use_tqdm=False)
        offline_seconds.append(time.perf_counter() - start)
        before = machine.processor_seconds_of(PROCESSES)
        seconds, streamed = wave(port, prompts, workload.num_new)
        for name, now in machine.processor_seconds_of(PROCESSES).items():
            cores_s[name] += (now or 0.0) - (before[name] or 0.0)
        http_seconds.append(seconds)
        answers.extend(streamed)
        print(
            f"  {count:2d} clients, {repeat + 1}/{workload.repeats}:  offline {offline_seconds[-1]:7.3f} s  "
            f"http {seconds:7.3f} s",
            flush=True,
        )
    first = [answer.first_s for answer in answers]
    num_tokens = count * workload.num_new
    return {
        "offline_seconds": offline_seconds,
        "http_seconds": http_seconds,
        "offline_tokens_per_s": num_tokens / statistics.median(offline_seconds),
        "http_tokens_per_s": num_tokens / statistics.median(http_seconds),
        "ratio": statistics.median(offline_seconds) / statistics.median(http_seconds),
        "ttft_p50_s": statistics.median(first),
        "ttft_p99_s": percentile(first, 99),
        "time_per_token_p50_s": statistics.median((a.last_s - a.first_s) / (workload.num_new - 1) for a in answers),
        "cores_us_per_token": {name: 1e6 * used / (num_tokens * workload.repeats) for name, used in cores_s.items()},
    }


def percentile(values: Sequence[float], percent: int) -> float:
    """The nearest rank."""
    ordered = sorted(values)
    return ordered[-(-len(ordered) * percent // 100) - 1]


def measure_all(workload: Workload, threads: int) -> dict[str, Any]:
    """What goes into the result file."""
    print("starting the server, and loading the model here", flush=True)
    options: dict[str, Any] = {"num_threads": threads, "kv_memory_bytes": KV_BYTES}
    with server(threads) as (port, ready_s, _), LLM(locate_model(EMBEDDED_MODEL), dtype="bfloat16", **options) as llm:
        for count in workload.request_counts:
            warm_up(llm, port, workload, count)
        return {
            "machine": machine.facts(threads),
            "model": EMBEDDED_MODEL,
            "dtype": "bfloat16",
            "num_prompt": workload.num_prompt,
            "num_new": workload.num_new,
            "repeats": workload.repeats,
            "ready_s": ready_s,
            **{f"clients_{count}": measure(llm, port, workload, count) for count in workload.request_counts},
        }


def main() -> None:
    given = machine.options(__doc__)
    print(machine.write_result(given.results, "serving", measure_all(given.workload, given.threads)))


if __name__ == "__main__":
    main()
