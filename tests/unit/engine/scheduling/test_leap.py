"""Many steps at once leave everything as the same steps one by one would."""

from __future__ import annotations

import random
from dataclasses import asdict, fields

from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.engine.config import SchedulingPolicy
from shoal.engine.memory.kv_manager import KVManager
from shoal.engine.plan import StepPlan, StepResult
from shoal.engine.request import Request, RequestId, SamplingParams
from shoal.engine.scheduling.scheduler import Scheduler
from shoal.engine.scheduling.waiting_queue import WaitingQueue
from shoal.engine.step_time import StepWork, work_of

BLOCK = 4
# A leap writes the chunks of its steps down as one.
FIELDS = [field.name for field in fields(Request) if field.name not in ("params", "trace")]


class Replica:
    """A scheduler that is told token 0 whenever it asks."""

    def __init__(self, num_blocks: int, max_step_tokens: int, max_running: int, policy: SchedulingPolicy) -> None:
        self.kv = KVManager(num_blocks, BLOCK, watermark=0.05, record_events=True)
        self.scheduler = Scheduler(
            self.kv,
            WaitingQueue(policy, 30.0),
            max_step_tokens=max_step_tokens,
            max_running_requests=max_running,
            max_model_len=(num_blocks - 1) * BLOCK,
            eos_token_ids=(),
            clock=lambda: 0.0,
        )
        self.requests: dict[RequestId, Request] = {}

    def add(self, name: str, prompt_ids: tuple[int, ...], max_tokens: int) -> None:
        params = SamplingParams(max_tokens=max_tokens)
        request = Request(RequestId(name), prompt_ids, params, seed=0, arrival_s=float(len(self.requests)))
        self.requests[request.request_id] = request
        self.scheduler.add(request)

    def step(self) -> StepPlan:
        plan = self.scheduler.plan()
        if not plan.is_empty:
            ends = {
                entry.request_id: (0,)
                for entry in (*plan.new, *plan.continued)
                if entry.num_computed + entry.num_new == self.requests[entry.request_id].num_known
            }
            self.scheduler.commit(plan, StepResult(plan.step, ends))
        return plan

    def state(self) -> object:
        """All that later steps depend on, and what was told of it."""
        known = [{name: getattr(request, name) for name in FIELDS} for request in self.requests.values()]
        tables = {key: self.kv.table(key) for key in self.requests if self.kv.holds(key)}
        load = self.scheduler.load(None, 0.0)
        return (
            known,
            tables,
            self.kv._pool.free_blocks(),
            self.kv.take_events(),
            load,
            asdict(self.scheduler.counters),
        )


def twins(seed: int, policy: SchedulingPolicy) -> tuple[Replica, Replica]:
    rng = random.Random(seed)
    arguments = (rng.choice([20, 40, 400]), rng.choice([6, 12, 40]), rng.choice([2, 6]), policy)
    return Replica(*arguments), Replica(*arguments)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**9), st.sampled_from(["shortest_first", "fcfs", "priority"]))
def test_a_leap_is_as_many_steps(seed: int, policy: SchedulingPolicy) -> None:
    one_by_one, leaping = twins(seed, policy)
    rng = random.Random(seed)
    most = one_by_one.kv.num_usable_blocks * BLOCK
    for count in range(rng.randrange(1, 14)):
        prompt = tuple([rng.randrange(2)] * rng.choice([1, 7, 16, min(60, most - 2)]) + [count])
        max_tokens = rng.randrange(1, max(2, min(60, most - len(prompt))))
        for replica in (one_by_one, leaping):
            replica.add(f"r{count}", prompt, max_tokens)
        for _ in range(rng.randrange(4)):
            one_by_one.step()
            leaping.step()
    while leaping.scheduler.has_work:
        num_steps = leaping.scheduler.most_alike_steps()
        if num_steps == 0:
            leaping.step()
            one_by_one.step()
        else:
            num_steps = rng.randrange(1, num_steps + 1)
            before = {key: len(each.output_ids) for key, each in leaping.requests.items()}
            outputs = leaping.scheduler.leap(num_steps)
            for _ in range(num_steps):
                plan = one_by_one.step()
                assert not plan.new
            assert {output.request_id: len(output.token_ids) for output in outputs} == {
                key: len(each.output_ids) - before[key]
                for key, each in one_by_one.requests.items()
                if len(each.output_ids) > before[key]
            }
            assert leaping.state() == one_by_one.state()
            leaping.scheduler.check()
    assert not one_by_one.scheduler.has_work


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**9))
def test_alike_steps_are_alike(seed: int) -> None:
    replica, _ = twins(seed, "shortest_first")
    rng = random.Random(seed)
    most = replica.kv.num_usable_blocks * BLOCK
    for count in range(4):
        replica.add(f"r{count}", (count,) * rng.choice([5, 60]), rng.randrange(1, min(60, most - 60)))
    while replica.scheduler.has_work:
        num_steps = replica.scheduler.most_alike_steps()
        if num_steps == 0:
            replica.step()
            continue
        work = replica.scheduler.next_work()
        for _ in range(num_steps):
            assert work_of(replica.step()) == work
            work = work._replace(num_context=work.num_context + work.num_prefill + work.num_decode)


def test_a_long_answer_alone_is_one_leap() -> None:
    replica = Replica(400, 64, 4, "shortest_first")
    replica.add("r", (1, 2, 3), 1000)
    replica.step()
    assert replica.scheduler.most_alike_steps() == 998
    (output,) = replica.scheduler.leap(998)
    assert output.token_ids == (0,) * 998
    (output,) = replica.scheduler.commit(
        plan := replica.scheduler.plan(), StepResult(plan.step, {RequestId("r"): (0,)})
    )
    assert output.finish_reason is not None


def test_a_long_prompt_alone_is_one_leap_and_a_step() -> None:
    replica = Replica(400, 64, 4, "shortest_first")
    replica.add("r", tuple(range(1000)), 1)
    replica.step()
    assert replica.scheduler.next_work() == StepWork(64, 0, 64)
    assert replica.scheduler.most_alike_steps() == (1000 - 64 - 1) // 64
    replica.scheduler.leap(replica.scheduler.most_alike_steps())
    replica.step()
    assert not replica.scheduler.has_work
