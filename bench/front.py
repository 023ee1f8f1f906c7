"""What stands in front of the engine: its share of the throughput, of the time to the first token, and of a start.

    python bench/front.py [--repeats 5] [--threads N] [--quick]

Starts `shoal serve` several times: seconds from the command to "ready", and where they go. In the last of these: many
streams over HTTP against the offline engine at the same work, in turn, as serving.py does; and the time to the first
token of one request at the idle server against that of the offline engine. bench/gateway.py measures the gateway alone.
"""

from __future__ import annotations

import dataclasses
import re
import statistics
import time
from collections.abc import Mapping
from typing import Any, Final

import machine
import serving
from machine import Workload

from shoal.cluster.config import EMBEDDED_MODEL, locate_model
from shoal.engine import LLM, SamplingParams

STREAM_COUNTS: Final = (32, 128)
NUM_FIRST: Final = 25  # requests whose time to the first token is measured
NUM_WARM: Final = 3
NUM_STARTS: Final = 3


def phases(served: serving.Served) -> dict[str, float]:
    """Where the seconds of a start went, of what `shoal serve` says while it starts."""
    told = [(float(s), what) for s, what in re.findall(r"^ +([\d.]+) s  (.*)$", served.output, re.MULTILINE)]
    ray_s, deploy_s = told[0][0], told[1][0]
    loading = [seconds for seconds, what in told if "loading weights" in what]
    (inside,) = re.findall(r"ready after ([\d.]+) s", served.output)
    own_s = served.ready_s - float(inside)
    return {
        "command": own_s + ray_s,  # Python, imports, checks
        "ray": deploy_s - ray_s,
        "processes": loading[0] - deploy_s,  # Serve, and a replica with its imports
        "weights": loading[-1] - loading[0],
        "gateway": float(inside) - loading[-1],
        "ready": served.ready_s,
    }


def time_to_first(llm: LLM, port: int, num_prompt: int, count: int) -> dict[str, Any]:
    """One request at a time, over HTTP and offline in turn. Seconds."""
    params = SamplingParams(max_tokens=1, temperature=0, ignore_eos=True)
    http, offline = [], []
    for prompts in (Workload().prompts(1, num_prompt, seed=number) for number in range(-NUM_WARM, count)):
        _, (answer,) = serving.wave(port, prompts, num_new=2)
        start = time.perf_counter()
        llm.generate(prompts, params, use_tqdm=False)
        offline.append(time.perf_counter() - start)
        http.append(answer.first_s)
    http_s, offline_s = statistics.median(http[NUM_WARM:]), statistics.median(offline[NUM_WARM:])
    return {"http_s": http_s, "offline_s": offline_s, "added_s": http_s - offline_s, "http": http, "offline": offline}


def measure_server(workload: Workload, threads: int, *, num_starts: int, num_first: int) -> dict[str, Any]:
    options: dict[str, Any] = {"num_threads": threads, "kv_memory_bytes": serving.KV_BYTES}
    starts = []
    for _ in range(num_starts - 1):
        with serving.server(threads) as served:
            starts.append(phases(served))
        print(f"  ready after {served.ready_s:.1f} s", flush=True)
    with (
        serving.server(threads) as served,
        LLM(locate_model(EMBEDDED_MODEL), dtype="bfloat16", **options) as llm,
    ):
        starts.append(phases(served))
        first = time_to_first(llm, served.port, workload.num_prompt, num_first)
        print(
            f"  first token: http {first['http_s'] * 1e3:.1f} ms, offline {first['offline_s'] * 1e3:.1f} ms", flush=True
        )
        for count in workload.request_counts:
            serving.warm_up(llm, served.port, workload, count)
        streams = {
            f"clients_{count}": serving.measure(llm, served.port, workload, count) for count in workload.request_counts
        }
    median = {name: statistics.median(start[name] for start in starts) for name in starts[0]}
    return {"start_s": median, "starts": starts, "first_token": first, **streams}


def main() -> None:
    given = machine.options(__doc__)
    workload: Workload = given.workload
    num_starts, num_first = 1, 2
    if not given.quick:
        workload = dataclasses.replace(workload, request_counts=STREAM_COUNTS)
        num_starts, num_first = NUM_STARTS, NUM_FIRST
    result: Mapping[str, Any] = {
        "machine": machine.facts(given.threads),
        "model": EMBEDDED_MODEL,
        "dtype": "bfloat16",
        "num_prompt": workload.num_prompt,
        "num_new": workload.num_new,
        "repeats": workload.repeats,
        **measure_server(workload, given.threads, num_starts=num_starts, num_first=num_first),
    }
    print(machine.write_result(given.results, "front", result))


if __name__ == "__main__":
    main()
