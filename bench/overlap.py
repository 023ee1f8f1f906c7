"""How long a device waits for its coordinator, and a pipeline stage for the others: the real scheduler and core over
devices that take a fixed time.

    python bench/overlap.py [--step-ms 10] [--repeat 5]

Two tables. The first has one device: the share of a run in which it had nothing to do, with steps planned ahead and
without; the goal is at most 2 % at 10 ms a step. The second has p stages in a row and m equal steps from idle to idle:
the measured bubble beside (p - 1) / (m + p - 1) (Huang et al. 2019, GPipe, arXiv:1811.06965); the goal is within 10 %.
"""

from __future__ import annotations

import argparse
import queue
import statistics
import threading
import time
from typing import Any

import machine

from shoal.engine.config import EngineConfig, EngineOptions, Machine, ModelConfig, resolve
from shoal.engine.core import EngineCore
from shoal.engine.executor import ExecutorInfo, RankInfo
from shoal.engine.plan import StepPlan, StepResult
from shoal.engine.request import Request, RequestId, SamplingParams

MODEL = ModelConfig(
    path="fixed-time device", architecture="LlamaForCausalLM", num_layers=8, hidden_size=64, num_heads=4,
    num_kv_heads=2, head_dim=16, vocab_size=1000, max_position=8192, layer_windows=(None,) * 8,
    stored_dtype="float32", num_parameters=1, eos_token_ids=(0,), hf_config={},
)  # fmt: skip
PROMPT = 64


class Stage:
    """A device that takes `step_s` for each step and works off its queue by itself, in order."""

    def __init__(self, step_s: float, following: Stage | None) -> None:
        self.inbox: queue.SimpleQueue[StepPlan | None] = queue.SimpleQueue()
        self.done: queue.SimpleQueue[StepPlan] = queue.SimpleQueue()
        self.busy_s = 0.0
        self.first_s = self.last_s = 0.0
        self._step_s = step_s
        self._following = following
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while (plan := self.inbox.get()) is not None:
            start = time.perf_counter()
            time.sleep(self._step_s)
            self.last_s = time.perf_counter()
            self.first_s = self.first_s or start
            self.busy_s += self.last_s - start
            (self._following.inbox if self._following else self.done).put(plan)
        if self._following:
            self._following.inbox.put(None)


class FixedTimeExecutor:
    """Stages in a row; the last one says token 7 for each request that has come to its end."""

    def __init__(self, config: EngineConfig, step_s: float) -> None:
        self._num_known: dict[RequestId, int] = {}
        following = None
        self.stages: list[Stage] = []
        for _ in range(config.pipeline_parallel):
            following = Stage(step_s, following)
            self.stages.insert(0, following)

    def start(self) -> ExecutorInfo:
        return ExecutorInfo(20_000, (RankInfo(0, 0, "here", 0, "fixed time", 0, 8, 0, 0),))

    def submit(self, plan: StepPlan) -> None:
        self.stages[0].inbox.put(plan)

    def collect(self) -> StepResult:
        plan = self.stages[-1].done.get()
        tokens: dict[RequestId, tuple[int, ...]] = {}
        for new in plan.new:
            self._num_known[new.request_id] = len(new.token_ids)
        for entry in plan.continued:
            self._num_known[entry.request_id] += len(entry.new_token_ids) + entry.num_pending
        for entry in (*plan.new, *plan.continued):
            if entry.num_computed + entry.num_new == self._num_known[entry.request_id]:
                tokens[entry.request_id] = (7,)
        return StepResult(plan.step, tokens)

    def check(self) -> None:
        pass

    def close(self) -> None:
        self.stages[0].inbox.put(None)


def run(num_requests: int, num_tokens: int, step_s: float, **options: Any) -> FixedTimeExecutor:
    """All requests from first to last token."""
    config = resolve(EngineOptions(model="", **options), MODEL, Machine("cuda", 2**34, 2))
    executor = FixedTimeExecutor(config, step_s)
    core = EngineCore(config, executor)
    core.start()
    params = SamplingParams(max_tokens=num_tokens, ignore_eos=True)
    for index in range(num_requests):
        prompt_ids = tuple(1 + (index * 31 + i) % 900 for i in range(PROMPT))
        core.add(Request(RequestId(f"r{index}"), prompt_ids, params, seed=0, arrival_s=float(index)))
    while core.has_work:
        core.step()
    core.close()
    return executor


def idle_share(num_requests: int, step_s: float, *, is_async: bool) -> float:
    """Of a single device, between its first and its last step."""
    stage = run(num_requests, 60, step_s, async_scheduling=is_async).stages[0]
    return 1 - stage.busy_s / (stage.last_s - stage.first_s)


def bubble(num_stages: int, num_steps: int, step_s: float) -> float:
    """Share of all stages' time, from the first step's start to the last one's end, in which they had nothing to do."""
    stages = run(
        num_steps, 1, step_s, pipeline_parallel=num_stages, max_step_tokens=PROMPT, max_running_requests=16
    ).stages
    span = stages[-1].last_s - stages[0].first_s
    return 1 - sum(stage.busy_s for stage in stages) / (num_stages * span)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--step-ms", type=float, default=10.0, help="time that a device takes for a step")
    parser.add_argument("--repeat", type=int, default=5, help="runs to take the median of")
    args = parser.parse_args()
    step_s = args.step_ms / 1e3
    idle, bubbles = [], []
    print(f"{'requests':>8} {'idle, planned ahead':>20} {'idle, one by one':>17}")
    for num_requests in (1, 32, 256):
        ahead, behind = (
            statistics.median(idle_share(num_requests, step_s, is_async=is_async) for _ in range(args.repeat))
            for is_async in (True, False)
        )
        print(f"{num_requests:8d} {ahead:20.2%} {behind:17.2%}")
        idle.append({"requests": num_requests, "async": ahead, "sync": behind})
    print(f"\n{'stages':>6} {'steps':>6} {'bubble':>8} {'formula':>8} {'ratio':>6}")
    for num_stages in (2, 3, 4):
        for num_steps in (1, 2, 4, 8, 16):
            found = statistics.median(bubble(num_stages, num_steps, step_s) for _ in range(args.repeat))
            formula = (num_stages - 1) / (num_steps + num_stages - 1)
            print(f"{num_stages:6d} {num_steps:6d} {found:8.3f} {formula:8.3f} {found / formula:6.2f}")
            bubbles.append({"stages": num_stages, "steps": num_steps, "bubble": found, "formula": formula})
    report = {"machine": machine.facts(threads=1), "step_ms": args.step_ms, "idle": idle, "bubbles": bubbles}
    print(f"\nwritten to {machine.write_result(machine.RESULTS, 'overlap', report)}")


if __name__ == "__main__":
    main()
