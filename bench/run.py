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


def lines(offline: Result, serving: Result, scheduling: Result) -> Iterator[Line]:
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
    yield Line("http: ready after", f"{serving['ready_s']:.1f} s")
    step_us = scheduling["step_us"]
    yield Line(f"scheduler, {NUM_RUNNING} running", f"{step_us:.0f} µs a step", "at most 300 µs", step_us <= 300)


def conditions(offline: Result) -> str:
    facts = offline["machine"]
    return (
        f"{facts['cpu']}, {facts['cores']} cores, {facts['memory_gib']} GiB, {facts['threads']} threads; "
        f"torch {facts['torch']}, transformers {facts['transformers']}, {offline['model']} in {offline['dtype']}, "
        f"prompt {offline['num_prompt']}, {offline['num_new']} new, medians of {offline['repeats']}"
    )


def print_lines(printed: Iterable[Line]) -> None:
    print(f"{'':48}{'measured':>26}  {'goal':16}")
    for what, value, goal, is_met in printed:
        verdict = "" if is_met is None else "met" if is_met else "MISSED"
        print(f"{what:48}{value:>26}  {goal:16}{verdict}".rstrip())


def at_least(what: str, value: float, goal: float | None, unit: str) -> Line:
    if goal is None:
        return Line(what, f"{value:.2f} {unit}")
    return Line(what, f"{value:.2f} {unit}", f"at least {goal:g} {unit}", value >= goal)


def main() -> None:
    results: Path = machine.options(__doc__).results
    for script in ("offline.py", "serving.py"):
        print(f"\n{script}", flush=True)
        subprocess.run([sys.executable, str(HERE / script), *sys.argv[1:]], check=True)
    scheduling = run_scheduler()
    machine.write_result(results, "scheduler", scheduling)
    offline, serving = (json.loads((results / f"{name}.json").read_text()) for name in ("offline", "serving"))
    print(f"\n{conditions(offline)}\n")
    print_lines(lines(offline, serving, scheduling))


if __name__ == "__main__":
    main()
