"""Host cost of a step: plan and commit at 1 to 256 running requests, pure Python, no device.

    python bench/scheduler.py [--repeat 400]

The goal is at most 300 µs a step at 256 running requests on one core.
"""

from __future__ import annotations

import argparse
import statistics
import time

from shoal.engine.memory.kv_manager import KVManager
from shoal.engine.plan import ContinuedRequest, NewRequest, StepPlan, StepResult
from shoal.engine.request import Request, RequestId, SamplingParams
from shoal.engine.scheduling.scheduler import Scheduler
from shoal.engine.scheduling.waiting_queue import WaitingQueue


def build(num_running: int, max_tokens: int) -> Scheduler:
    kv = KVManager(num_blocks=num_running * 60 + 2, block_size=16, watermark=0.01)
    scheduler = Scheduler(
        kv,
        WaitingQueue("fcfs", 30.0),
        max_step_tokens=65536,
        max_running_requests=num_running,
        max_model_len=4096,
        eos_token_ids=(0,),
    )
    params = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
    for index in range(num_running):
        prompt_ids = tuple(range(index + 1, index + 129))
        scheduler.add(Request(RequestId(f"request-{index}"), prompt_ids, params, seed=0, arrival_s=float(index)))
    commit(scheduler, scheduler.plan())
    return scheduler


def commit(scheduler: Scheduler, plan: StepPlan) -> float:
    """Seconds that commit takes, for a device that answers token 7 to every request."""
    entries: tuple[NewRequest | ContinuedRequest, ...] = (*plan.new, *plan.continued)
    tokens: dict[RequestId, tuple[int, ...]] = {entry.request_id: (7,) for entry in entries}
    start = time.perf_counter()
    scheduler.commit(plan, StepResult(plan.step, tokens))
    return time.perf_counter() - start


def measure(num_running: int, repeat: int) -> tuple[float, float]:
    """Median seconds of plan and of commit in steady decode."""
    scheduler = build(num_running, max_tokens=repeat + 10)
    plans, commits = [], []
    for _ in range(repeat):
        start = time.perf_counter()
        plan = scheduler.plan()
        plans.append(time.perf_counter() - start)
        commits.append(commit(scheduler, plan))
    return statistics.median(plans), statistics.median(commits)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=400, help="steps to take the median of")
    repeat = parser.parse_args().repeat
    print(f"{'running':>8} {'plan µs':>9} {'commit µs':>10} {'step µs':>9}")
    for num_running in (1, 8, 32, 128, 256):
        plan_s, commit_s = measure(num_running, repeat)
        print(f"{num_running:8d} {plan_s * 1e6:9.0f} {commit_s * 1e6:10.0f} {(plan_s + commit_s) * 1e6:9.0f}")


if __name__ == "__main__":
    main()
