"""Goodput of `shoal serve` under more load than it can take: what objectives and early refusals are worth.

    python bench/overload.py [--ttft-ms 2000] [--seconds 30] [--threads N] [--quick]

Starts `shoal serve` with an objective for the time to the first token, on a free port. Requests arrive at random, at a
given rate, whether or not others have been answered; each prompt is new. A ramp of rates finds the capacity: the most
requests a second that are finished within the objective. Then 0.5, 1, 2 and 3 times as many are offered.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import machine
import serving
import torch
import yaml

from shoal.cluster.config import EMBEDDED_MODEL

LOADS: Final = (0.5, 1.0, 2.0, 3.0)  # of the capacity
FIRST_RATE: Final = 1.0  # requests a second
RAMP: Final = 1.5  # from one rate to the next
SATURATED: Final = 0.75  # where so little of what is offered is good, the capacity was passed
MAX_STEPS: Final = 12
KV_BYTES: Final = 2**29  # touched as a whole during the ramp, so that memory is flat from then on
PAGE_BYTES: Final = os.sysconf("SC_PAGE_SIZE")


class Outcome(NamedTuple):
    """What became of one request. Seconds from when it was due, so that a late client is no faster server."""

    status: int
    first_s: float  # first event, or the refusal
    last_s: float
    retry_after_s: float | None


class Load(NamedTuple):
    num_prompt: int
    num_new: int
    objective_s: float


@contextlib.contextmanager
def server(threads: int, load: Load) -> Iterator[tuple[int, int]]:
    """`shoal serve` in a session of its own: its port and that session."""
    port = serving.free_port()
    model = {
        "model": EMBEDDED_MODEL,
        "engine": {"dtype": "bfloat16", "num_threads": threads, "kv_memory": KV_BYTES},
        "objectives": {"ttft_ms": load.objective_s * 1000},
    }
    with tempfile.TemporaryDirectory() as folder:
        config, output = Path(folder) / "shoal.yaml", Path(folder) / "output.txt"
        ports = {"http": {"port": port}, "admin": {"port": serving.free_port()}}
        config.write_text(yaml.safe_dump({"models": [model], **ports}))
        with output.open("w") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "shoal.cluster.cli", "serve", str(config)],
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                serving.wait_until_ready(port, process, log.fileno())
                yield port, process.pid
            finally:
                os.killpg(process.pid, signal.SIGINT)
                process.wait(serving.STOP_TIMEOUT_S)


async def ask(port: int, prompt: Sequence[int], load: Load, due_s: float) -> Outcome:
    """One streamed completion, or its refusal. Raises ServerError for other answers.

    due_s: when it should have been sent, of time.perf_counter().
    """
    body = json.dumps(
        {
            "model": EMBEDDED_MODEL,
            "prompt": prompt,
            "max_tokens": load.num_new,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
        }
    ).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {serving.HOST}:{port}\r\nContent-Type: application/json\r\n"
    reader, writer = await asyncio.open_connection(serving.HOST, port)
    try:
        writer.write(f"{head}Content-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode() + body)
        answer = (await reader.readuntil(b"\r\n\r\n")).decode()
        headers = dict(line.lower().split(": ", 1) for line in answer.split("\r\n")[1:] if ": " in line)
        first_s = time.perf_counter() - due_s
        status = int(answer.split()[1])
        whole = await reader.read()
        last_s = time.perf_counter() - due_s
    finally:
        writer.close()
    if status not in (200, 429) or (status == 200 and b"data: [DONE]" not in whole):
        raise serving.ServerError(answer + whole[:2000].decode(errors="replace"))
    return Outcome(status, first_s, last_s, float(headers["retry-after"]) if "retry-after" in headers else None)


async def offer(port: int, rate: float, seconds: float, load: Load, seed: int) -> list[Outcome]:
    """Requests at `rate` a second for so long, each on a connection of its own, and what became of them."""
    numbers = random.Random(seed)
    start, due_s = time.perf_counter(), 0.0
    asked: list[asyncio.Task[Outcome]] = []
    while (due_s := due_s + numbers.expovariate(rate)) < seconds:
        prompt = [numbers.randrange(100, 48_000) for _ in range(load.num_prompt)]
        await asyncio.sleep(max(0.0, start + due_s - time.perf_counter()))
        asked.append(asyncio.create_task(ask(port, prompt, load, start + due_s)))
    return await asyncio.gather(*asked)


def measure(port: int, session: int, rate: float, seconds: float, load: Load, seed: int) -> dict[str, Any]:
    """What a rate gives; requests are counted over the time in which they were sent."""
    before = resident_bytes(session)
    outcomes = asyncio.run(offer(port, rate, seconds, load, seed))
    served = [outcome for outcome in outcomes if outcome.status == 200]
    refused = [outcome for outcome in outcomes if outcome.status == 429]
    good = [outcome for outcome in served if outcome.first_s <= load.objective_s]
    assert all(outcome.retry_after_s and outcome.retry_after_s >= 1 for outcome in refused), "a 429 says when to retry"
    result: dict[str, Any] = {
        "offered_per_s": len(outcomes) / seconds,
        "goodput_per_s": len(good) / seconds,
        "refused_share": len(refused) / max(1, len(outcomes)),
        "missed_share": (len(served) - len(good)) / max(1, len(served)),
        "ttft_p50_s": percentile([outcome.first_s for outcome in served], 50),
        "ttft_p99_s": percentile([outcome.first_s for outcome in served], 99),
        "refusal_p50_s": percentile([outcome.last_s for outcome in refused], 50),
        "refusal_p99_s": percentile([outcome.last_s for outcome in refused], 99),
        "resident_bytes_before": before,
        "resident_bytes_after": resident_bytes(session),
    }
    growth = result["resident_bytes_after"] - before
    print(
        f"  {result['offered_per_s']:6.1f}/s offered  {result['goodput_per_s']:6.2f}/s good  "
        f"{result['refused_share']:4.0%} refused  ttft p50 {shown(result['ttft_p50_s'])} p99 "
        f"{shown(result['ttft_p99_s'])}  refusal p99 {shown(result['refusal_p99_s'])}  "
        f"memory {before / 2**20:.0f} {growth / 2**20:+.0f} MiB",
        flush=True,
    )
    return result


def percentile(values: Sequence[float], percent: int) -> float | None:
    return serving.percentile(values, percent) if values else None


def shown(seconds: float | None) -> str:
    return "   -    " if seconds is None else f"{seconds * 1000:5.0f} ms"


def resident_bytes(session: int) -> int:
    """Of all processes of a session: the server, Ray, the gateway and the replica."""
    total = 0
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # gone meanwhile
            if int((folder / "stat").read_text().rpartition(")")[2].split()[3]) == session:
                total += int((folder / "statm").read_text().split()[1]) * PAGE_BYTES
    return total


def ramp(port: int, session: int, seconds: float, load: Load) -> list[dict[str, Any]]:
    """Rates that grow until a part of what is offered is lost."""
    steps: list[dict[str, Any]] = []
    for number in range(MAX_STEPS):
        steps.append(measure(port, session, FIRST_RATE * RAMP**number, seconds, load, seed=number))
        if number > 1 and steps[-1]["goodput_per_s"] < SATURATED * steps[-1]["offered_per_s"]:
            break
    return steps


def run(given: argparse.Namespace) -> dict[str, Any]:
    load = Load(16, 4, given.ttft_ms / 1000) if given.quick else Load(256, 16, given.ttft_ms / 1000)
    seconds = 3.0 if given.quick else given.seconds
    print("starting the server", flush=True)
    with server(given.threads, load) as (port, session):
        asyncio.run(offer(port, 1.0, min(10.0, seconds), load, seed=-1))  # until step times are known
        print("the ramp", flush=True)
        steps = ramp(port, session, seconds / 2, load)
        capacity = max(step["goodput_per_s"] for step in steps)
        print(f"capacity {capacity:.2f}/s", flush=True)
        loads = {
            f"load_{times:g}": measure(port, session, capacity * times, seconds, load, seed=100 + number)
            for number, times in enumerate(LOADS)
        }
    most = max(capacity, *(loads[f"load_{times:g}"]["goodput_per_s"] for times in LOADS if times <= 1))
    overload = loads[f"load_{LOADS[-1]:g}"]
    return {
        "machine": machine.facts(given.threads),
        "model": EMBEDDED_MODEL,
        "dtype": "bfloat16",
        "num_prompt": load.num_prompt,
        "num_new": load.num_new,
        "ttft_objective_s": load.objective_s,
        "seconds": seconds,
        "ramp": steps,
        "capacity_per_s": most,
        **loads,
        "overload_goodput_share": overload["goodput_per_s"] / most,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ttft-ms", type=float, default=2000.0, help="the objective (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=30.0, help="of each load (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: %(default)s")
    parser.add_argument("--quick", action="store_true", help="a tiny run that only shows that the script works")
    parser.add_argument(
        "--results", type=Path, default=machine.RESULTS, help="folder for the result (default: %(default)s)"
    )
    given = parser.parse_args()
    result = run(given)
    print(f"goodput at {LOADS[-1]:g}x: {result['overload_goodput_share']:.1%} of capacity")
    print(machine.write_result(given.results, "overload", result))


if __name__ == "__main__":
    main()
