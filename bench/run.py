"""Every benchmark, each in a process of its own, and one table of what came out against what is wanted.

    python bench/run.py [--repeats 5] [--threads N] [--quick]

Takes some minutes; close other programs first. Results stay in bench/results/ as JSON.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import machine
import scheduler

HERE = Path(__file__).parent
SCHEDULER_STEPS = 400
NUM_RUNNING = 256

Result = Mapping[str, Any]


class Line(NamedTuple):
    """One line of the table."""

    what: str
    value: str
    goal: str = ""
    is_met: bool | None = None  # None: there is no goal


def run_scheduler() -> dict[str, Any]:
    plan_s, commit_s = scheduler.measure(NUM_RUNNING, SCHEDULER_STEPS)
    return {
        "machine": machine.facts(threads=1),
        "num_running": NUM_RUNNING,
        "plan_us": plan_s * 1e6,
        "commit_us": commit_s * 1e6,
        "step_us": (plan_s + commit_s) * 1e6,
    }


def lines(offline: Result, serving: Result, gateway: Result, front: Result, scheduling: Result) -> Iterator[Line]:
    goals = {"requests_1": 1.5, "requests_32": 2.5}
    for name in (name for name in offline if name.startswith("requests_")):
        count = name.removeprefix("requests_")
        rates = offline[name]["tokens_per_s"]
        yield Line(f"offline, {count} at once: shoal", f"{rates['shoal']:.0f} tokens/s")
        yield Line(f"offline, {count} at once: transformers", f"{rates['transformers']:.0f} tokens/s")
        yield at_least(f"offline, {count} at once: ratio", offline[name]["ratio"], goals.get(name), "x")
        yield Line(f"decode step, {count}: share of the limit", f"{offline[name]['decode_share_of_limit']:.0%}")
    decode = offline["requests_1"]["decode_tokens_per_s"]["shoal"]
    yield Line("decode, 1 request", f"{decode:.0f} tokens/s")
    prefill = offline["prefill"]
    yield Line("prefill", f"{prefill['tokens_per_s']['shoal']:.0f} tokens/s")
    yield Line("prefill: ratio", f"{prefill['ratio']:.2f} x")
    yield Line("prefill: share of the limit", f"{prefill['share_of_limit']:.0%}")
    limits = offline["limits"]
    yield Line("limit: memory", f"{limits['read_gb_per_s']:.1f} GB/s")
    yield Line("limit: bfloat16 products", f"{limits['bfloat16_tflops']:.3f} TFLOP/s")
    for name in (name for name in serving if name.startswith("clients_")):
        count, measured = name.removeprefix("clients_"), serving[name]
        yield Line(f"http, {count} clients", f"{measured['http_tokens_per_s']:.0f} tokens/s")
        goal = 0.8 if name == "clients_32" else None
        yield at_least(f"http, {count} clients: ratio to offline", measured["ratio"], goal, "x")
        times = [measured[key] * 1e3 for key in ("ttft_p50_s", "ttft_p99_s", "time_per_token_p50_s")]
        yield Line(f"http, {count} clients: ttft p50, p99; per token", "{:.0f}, {:.0f}; {:.1f} ms".format(*times))
    yield from front_lines(gateway, front)
    step_us = scheduling["step_us"]
    yield Line(f"scheduler, {NUM_RUNNING} running", f"{step_us:.0f} µs a step", "at most 300 µs", step_us <= 300)


def front_lines(gateway: Result, front: Result) -> Iterator[Line]:
    for name in (name for name in front if name.startswith("clients_")):
        count, measured = name.removeprefix("clients_"), front[name]
        yield at_least(f"front, {count} clients: ratio to offline", measured["ratio"], 0.9, "x")
        used = measured["cores_us_per_token"]
        yield Line(f"front, {count} clients: time of cores", f"{sum(used.values()):.0f} µs a token")
        for process in used:
            yield Line(f"front, {count} clients: of it {process}", f"{used[process]:.0f} µs")
    added_ms = 1000 * front["first_token"]["added_s"]
    yield Line("front: added to the first token", f"{added_ms:.1f} ms", "at most 10 ms", added_ms <= 10)
    ready_s = front["start_s"]["ready"]
    yield Line("front: ready after", f"{ready_s:.1f} s", "at most 15 s", ready_s <= 15)
    for way in ("shoal", "shoal_paced", "ray_serve", "ray_serve_one_process"):
        for streams, measured in gateway[way].items():
            what = f"gateway, {streams.removeprefix('streams_')} streams: {way.replace('_', ' ')}"
            goal = 20_000 if way == "shoal" else None
            yield at_least(what, measured["tokens_per_cpu_s"], goal, "tokens/s a core", digits=0)


def conditions(offline: Result) -> str:
    facts = offline["machine"]
    return (
        f"{facts['cpu']}, {facts['cores']} cores, {facts['memory_gib']} GiB, {facts['threads']} threads; "
        f"torch {facts['torch']}, transformers {facts['transformers']}, {offline['model']} in {offline['dtype']}, "
        f"prompt {offline['num_prompt']}, {offline['num_new']} new, medians of {offline['repeats']}"
    )


def print_lines(printed: Iterable[Line]) -> None:
    print(f"{'':48}{'measured':>26}  {'goal':28}")
    for what, value, goal, is_met in printed:
        verdict = "" if is_met is None else "met" if is_met else "MISSED"
        print(f"{what:48}{value:>26}  {goal:28}{verdict}".rstrip())


def at_least(what: str, value: float, goal: float | None, unit: str, *, digits: int = 2) -> Line:
    shown = f"{value:.{digits}f} {unit}"
    return Line(what, shown) if goal is None else Line(what, shown, f"at least {goal:g} {unit}", value >= goal)


def main() -> None:
    results: Path = machine.options(__doc__).results
    scripts = ("offline", "serving", "gateway", "front")
    for script in scripts:
        print(f"\n{script}.py", flush=True)
        subprocess.run([sys.executable, str(HERE / f"{script}.py"), *sys.argv[1:]], check=True)
    scheduling = run_scheduler()
    machine.write_result(results, "scheduler", scheduling)
    offline, serving, gateway, front = (json.loads((results / f"{name}.json").read_text()) for name in scripts)
    print(f"\n{conditions(offline)}\n")
    print_lines(lines(offline, serving, gateway, front, scheduling))


if __name__ == "__main__":
    main()
