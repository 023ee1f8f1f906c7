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
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import machine
from machine import Workload

from shoal.cluster.config import EMBEDDED_MODEL, locate_model
from shoal.engine import LLM, SamplingParams

HOST = "127.0.0.1"
KV_BYTES = 2**30
START_TIMEOUT_S = 180.0
STOP_TIMEOUT_S = 40.0


class Answer(NamedTuple):
    """One stream, as its client saw it. Seconds from sending the request."""

    first_s: float  # first text
    last_s: float  # last text
    num_tokens: int


class ServerError(RuntimeError):
    """The server did not start, or answered something other than a stream."""


@contextlib.contextmanager
def server(threads: int) -> Iterator[tuple[int, float]]:
    """`shoal serve` as a process of its own: its port, and the seconds from the command to "ready"."""
    port = free_port()
    with tempfile.TemporaryFile("w+") as log:
        start = time.perf_counter()
        process = subprocess.Popen(command(port, threads), stdout=log, stderr=subprocess.STDOUT)
        try:
            wait_until_ready(port, process, log.fileno())
            yield port, time.perf_counter() - start
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


def wait_until_ready(port: int, process: subprocess.Popen[bytes], log: int) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    path = Path(f"/proc/self/fd/{log}")
    while "ready after" not in path.read_text():
        if process.poll() is not None or time.monotonic() > deadline:
            raise ServerError(f"`shoal serve` on port {port} did not come up:\n{path.read_text()}")
        time.sleep(0.1)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
        return port


async def complete(port: int, prompt: Sequence[int], num_new: int) -> Answer:
    """One streamed completion. Raises ServerError for any other answer."""
    body = json.dumps(
        {
            "model": EMBEDDED_MODEL,
            "prompt": prompt,
            "max_tokens": num_new,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
    ).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {HOST}:{port}\r\nContent-Type: application/json\r\n"
    start = time.perf_counter()
    reader, writer = await asyncio.open_connection(HOST, port)
    writer.write(f"{head}Content-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode() + body)
    times, num_tokens = [], 0
    async for event in _events(reader):
        if event["choices"]:
            times.append(time.perf_counter() - start)
        if event.get("usage"):
            num_tokens = event["usage"]["completion_tokens"]
    writer.close()
    return Answer(times[0], times[-1], num_tokens)


async def _events(reader: asyncio.StreamReader) -> AsyncIterator[dict[str, Any]]:
    """Server-sent events of a chunked HTTP/1.1 answer."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode()
    if not head.startswith("HTTP/1.1 200") or "transfer-encoding: chunked" not in head.lower():
        raise ServerError(head + (await reader.read(2000)).decode(errors="replace"))
    pending = b""
    while size := int(await reader.readline(), 16):
        pending += (await reader.readexactly(size + 2))[:-2]
        *lines, pending = pending.split(b"\n")
        for line in lines:
            if line.startswith(b"data: ") and line != b"data: [DONE]":
                yield json.loads(line.removeprefix(b"data: "))


async def wave(port: int, prompts: Sequence[list[int]], num_new: int) -> tuple[float, list[Answer]]:
    """All prompts at once, a connection each: seconds until the last answer's end, and the answers."""
    start = time.perf_counter()
    answers = await asyncio.gather(*(complete(port, prompt, num_new) for prompt in prompts))
    seconds = time.perf_counter() - start
    wrong = [answer for answer in answers if answer.num_tokens != num_new]
    assert not wrong, f"{len(wrong)} of {len(answers)} streams do not have {num_new} tokens: {wrong[0]}"
    return seconds, answers


def measure(llm: LLM, port: int, workload: Workload, count: int) -> dict[str, Any]:
    """`count` clients at once over HTTP, and as many prompts offline, in turn."""
    params = SamplingParams(max_tokens=workload.num_new, temperature=0, ignore_eos=True)
    offline_seconds, http_seconds, answers = [], [], []
    for repeat in range(workload.repeats):
        prompts = workload.prompts(count, workload.num_prompt, seed=repeat)
        start = time.perf_counter()
        llm.generate(prompts, params, use_tqdm=False)
        offline_seconds.append(time.perf_counter() - start)
        seconds, streamed = asyncio.run(wave(port, prompts, workload.num_new))
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
        "time_per_token_p50_s": statistics.median((a.last_s - a.first_s) / (a.num_tokens - 1) for a in answers),
    }


def percentile(values: Sequence[float], percent: int) -> float:
    """The nearest rank."""
    ordered = sorted(values)
    return ordered[-(-len(ordered) * percent // 100) - 1]


def run(workload: Workload, threads: int) -> dict[str, Any]:
    """Measure everything; answers what goes into the result file."""
    print("starting the server, and loading the model here", flush=True)
    options: dict[str, Any] = {"num_threads": threads, "kv_memory_bytes": KV_BYTES}
    with server(threads) as (port, ready_s), LLM(locate_model(EMBEDDED_MODEL), dtype="bfloat16", **options) as llm:
        warm = Workload(workload.num_prompt, 4, (), 0, 1)
        for count in workload.request_counts:
            asyncio.run(wave(port, warm.prompts(count, warm.num_prompt, seed=-1), warm.num_new))
            llm.generate(warm.prompts(count, warm.num_prompt, seed=-1), use_tqdm=False)
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
    print(machine.write_result(given.results, "serving", run(given.workload, given.threads)))


if __name__ == "__main__":
    main()
