"""How long a device waits for its coordinator, and a pipeline stage for the others: the real scheduler and core over
devices that take a fixed time.

    python bench/overlap.py [--step-ms 50] [--repeats 5]

Two tables. The first has one device of 10 ms a step: the share of a run in which it had nothing to do, with steps
planned ahead and without; the goal is at most 2 %. The second has p stages, which are processes that pass hidden states
over gloo and sleep in between, and m equal steps from idle to idle: the measured bubble beside (p - 1) / (m + p - 1)
(Huang et al. 2019, GPipe, arXiv:1811.06965); the goal is within 10 %. The time of a step is what one more adds to a
run, sleep and messages; "with messages" counts all but sleep as bubble.
"""

from __future__ import annotations

import argparse
import contextlib
import queue
import statistics
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import machine
import torch

from shoal.cluster.config import EMBEDDED_MODEL, locate_model
from shoal.engine.config import EngineConfig, EngineOptions, Machine, ModelConfig, resolve
from shoal.engine.core import EngineCore
from shoal.engine.executor import ExecutorInfo, RankInfo
from shoal.engine.group.coordinator import open_group
from shoal.engine.group.processes import ProcessLauncher
from shoal.engine.group.rank import run_process
from shoal.engine.parallel.collectives import Collectives
from shoal.engine.parallel.pipeline import StageLinks
from shoal.engine.parallel.topology import Topology
from shoal.engine.plan import ContinuedRequest, NewRequest, StepPlan, StepResult
from shoal.engine.request import Request, RequestId, SamplingParams

BE_RANK = "--be-rank"
DEVICE_STEP_S = 10e-3
STEP_COUNTS = (1, 2, 4, 8, 16)
PROMPT = 64
MODEL = ModelConfig(
    path="fixed-time device", architecture="LlamaForCausalLM", num_layers=8, hidden_size=64, num_heads=4,
    num_kv_heads=2, head_dim=16, vocab_size=1000, max_position=8192, layer_windows=(None,) * 8,
    stored_dtype="float32", num_parameters=1, eos_token_ids=(0,), hf_config={},
)  # fmt: skip


class Tokens:
    """Says token 7 for each request that has come to its end."""

    def __init__(self) -> None:
        self._num_known: dict[RequestId, int] = {}

    def result(self, plan: StepPlan) -> StepResult:
        tokens: dict[RequestId, tuple[int, ...]] = {}
        for new in plan.new:
            self._num_known[new.request_id] = len(new.token_ids)
        for known in plan.continued:
            self._num_known[known.request_id] += len(known.new_token_ids) + known.num_pending
        entries: tuple[NewRequest | ContinuedRequest, ...] = (*plan.new, *plan.continued)
        for entry in entries:
            if entry.num_computed + entry.num_new == self._num_known[entry.request_id]:
                tokens[entry.request_id] = (7,)
        return StepResult(plan.step, tokens)


def run(core: EngineCore, num_requests: int, num_tokens: int) -> None:
    """All requests from first to last token."""
    params = SamplingParams(max_tokens=num_tokens, ignore_eos=True)
    for index in range(num_requests):
        prompt_ids = tuple(1 + (index * 31 + i) % 900 for i in range(PROMPT))
        core.add(Request(RequestId(f"r{time.monotonic()}"), prompt_ids, params, seed=0, arrival_s=float(index)))
    while core.has_work:
        core.step()


# -- one device -----------------------------------------------------------------------------------------------


class Device:
    """An Executor with a device that works off its queue by itself, in order."""

    def __init__(self) -> None:
        self.busy_s = self.first_s = self.last_s = 0.0
        self._inbox: queue.SimpleQueue[StepPlan | None] = queue.SimpleQueue()
        self._done: queue.SimpleQueue[StepPlan] = queue.SimpleQueue()
        self._tokens = Tokens()
        threading.Thread(target=self._work, daemon=True).start()

    def _work(self) -> None:
        while (plan := self._inbox.get()) is not None:
            start = time.perf_counter()
            time.sleep(DEVICE_STEP_S)
            self.last_s = time.perf_counter()
            self.first_s = self.first_s or start
            self.busy_s += self.last_s - start
            self._done.put(plan)

    def start(self) -> ExecutorInfo:
        return ExecutorInfo(20_000, (RankInfo(0, 0, "here", 0, "fixed time", 0, 8, 0, 0),))

    def submit(self, plan: StepPlan) -> None:
        self._inbox.put(plan)

    def collect(self) -> StepResult:
        return self._tokens.result(self._done.get())

    def check(self) -> None:
        pass

    def close(self) -> None:
        self._inbox.put(None)


def idle_share(num_requests: int, *, is_async: bool) -> float:
    """Of a device, between its first and its last step."""
    config = resolve(EngineOptions(model="", async_scheduling=is_async), MODEL, Machine("cuda", 2**34, 2))
    device = Device()
    with contextlib.closing(EngineCore(config, device)) as core:
        core.start()
        run(core, num_requests, 60)
    return 1 - device.busy_s / (device.last_s - device.first_s)


# -- stages ---------------------------------------------------------------------------------------------------


class SleepingWorker:
    """A stage that passes hidden states on, and sleeps for as long as its command line says instead of computing."""

    def __init__(
        self,
        config: EngineConfig,
        topology: Topology,
        collectives: Collectives,
        links: StageLinks,
        *,
        ranks_on_host: int,
    ) -> None:
        self._topology = topology
        self._links = links
        self._hidden_size = config.model.hidden_size
        self._dtype = getattr(torch, config.dtype)
        self._tokens = Tokens()
        self._step_s = float(sys.argv[-1])

    def load(self, progress: Callable[[str, int, int], None]) -> None:
        pass

    def num_blocks_possible(self) -> int:
        return 20_000

    def allocate(self, num_blocks: int) -> int:
        return 0

    def info(self, kv_bytes: int, node: str) -> RankInfo:
        return RankInfo(self._topology.stage, self._topology.tensor_rank, "here", 0, "fixed time", 0, 1, 0, 0)

    def expect(self, plan: StepPlan) -> None:
        self._links.expect_hidden(plan.num_tokens)

    def launch(self, plan: StepPlan) -> Slept:
        hidden = self._links.receive_hidden()
        end_s = time.perf_counter() + self._step_s
        time.sleep(self._step_s - 2e-4)
        while time.perf_counter() < end_s:
            pass
        if hidden is None:
            hidden = torch.zeros(plan.num_tokens, self._hidden_size, dtype=self._dtype)
        self._links.send_hidden(hidden)
        return Slept(self._tokens.result(plan))


class Slept:
    def __init__(self, result: StepResult) -> None:
        self._result = result

    def wait(self) -> StepResult:
        return self._result


def spans(num_stages: int, step_counts: tuple[int, ...], step_s: float, repeats: int) -> dict[int, float]:
    """Seconds from the first plan's way out to the last result's arrival, by number of steps; medians."""
    options = EngineOptions(
        str(locate_model(EMBEDDED_MODEL)), device="cpu", pipeline_parallel=num_stages, num_threads=1,
        max_step_tokens=PROMPT, max_running_requests=32, async_scheduling=True,
        enable_prefix_caching=False,
    )  # fmt: skip
    config, executor = open_group(
        options, ProcessLauncher((__file__, BE_RANK, str(step_s))), lambda what, done, total: None
    )
    with contextlib.closing(EngineCore(config, executor)) as core:
        core.start()
        run(core, 4, 1)
        found: dict[int, list[float]] = {count: [] for count in step_counts}
        for count in step_counts * repeats:
            start = time.perf_counter()
            run(core, count, 1)
            found[count].append(time.perf_counter() - start)
    return {count: statistics.median(seconds) for count, seconds in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--step-ms", type=float, default=50.0, help="time that a stage takes for a step")
    parser.add_argument("--repeats", type=int, default=5, help="runs to take the median of")
    args = parser.parse_args()
    idle, shapes = [], []
    print(f"{'requests':>8} {'idle, planned ahead':>20} {'idle, one by one':>17}")
    for num_requests in (1, 32, 256):
        ahead, behind = (
            statistics.median(idle_share(num_requests, is_async=is_async) for _ in range(args.repeats))
            for is_async in (True, False)
        )
        print(f"{num_requests:8d} {ahead:20.2%} {behind:17.2%}", flush=True)
        idle.append({"requests": num_requests, "async": ahead, "sync": behind})
    print(
        f"\n{'stages':>6} {'steps':>6} {'step ms':>8} {'bubble':>8} {'formula':>8} {'ratio':>6} {'with messages':>14}"
    )
    for num_stages in (2, 3, 4):
        measured = spans(num_stages, STEP_COUNTS, args.step_ms / 1e3, args.repeats)
        few, many = STEP_COUNTS[0], STEP_COUNTS[-1]
        step_s = (measured[many] - measured[few]) / (many - few)
        for num_steps, span_s in measured.items():
            bubble, nominal = 1 - num_steps * step_s / span_s, 1 - num_steps * args.step_ms / 1e3 / span_s
            formula = (num_stages - 1) / (num_steps + num_stages - 1)
            print(
                f"{num_stages:6d} {num_steps:6d} {step_s * 1e3:8.2f} {bubble:8.3f} {formula:8.3f} "
                f"{bubble / formula:6.2f} {nominal:14.3f}",
                flush=True,
            )
            shapes.append(
                {
                    "stages": num_stages, "steps": num_steps, "step_ms": step_s * 1e3, "bubble": bubble,
                    "formula": formula, "bubble_with_messages": nominal,
                }
            )  # fmt: skip
    report: dict[str, Any] = {"machine": machine.facts(threads=1), "idle": idle, "bubbles": shapes}
    print(f"\nwritten to {machine.write_result(machine.RESULTS, 'overlap', report)}")


if __name__ == "__main__":
    run_process(SleepingWorker) if BE_RANK in sys.argv else main()
