"""Who gets in, and when: in simulated time, in front of replicas that are a queue and a few slots."""

from __future__ import annotations

import asyncio
import math
import random
import selectors
from collections.abc import AsyncGenerator, Callable, Coroutine
from typing import Any, NamedTuple, TypeVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.cluster.channel import GenerateCall
from shoal.cluster.gateway.admission import Admission, Objectives, RefusedError, Visit
from shoal.cluster.gateway.backend import Placement, Prediction, ReplicaFailedError
from shoal.engine.request import FinishReason, RequestError, RequestOutput, SamplingParams

T = TypeVar("T")
SECONDS_PER_TOKEN = 1e-3
ROUTING_S = 0.003  # until a call is known to be at its replica


class SimulatedSelector(selectors.DefaultSelector):
    """Waits in no time. Where nothing will ever happen, it fails instead of waiting."""

    now_s = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        ready = super().select(0)
        if not ready:
            assert timeout is not None, "everything waits for something that will not come"
            self.now_s += timeout
        return ready


class SimulatedLoop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self._simulated = SimulatedSelector()
        super().__init__(self._simulated)

    def time(self) -> float:
        return self._simulated.now_s


def simulate(work: Callable[[], Coroutine[Any, Any, T]]) -> T:
    with asyncio.Runner(loop_factory=SimulatedLoop) as runner:
        return runner.run(asyncio.wait_for(work(), 10_000))


def now() -> float:
    return asyncio.get_running_loop().time()


class Replicas:
    """Compute prompts one after the other each; `factor` and `noise` are how wrong their predictions are."""

    def __init__(
        self, count: int = 1, *, factor: float = 1.0, noise: float = 0.0, tpot_s: float = 0.02, num_cached: int = 0
    ) -> None:
        self.is_known = True
        self.error: Exception | None = None
        self.prediction_error: Exception | None = None
        self.fixed: Prediction | None = None
        self.num_predicted = 0
        self.started: list[str] = []
        self.computed: dict[str, float] = {}
        self._free_s = [0.0] * count
        self._factor, self._noise, self._tpot_s, self._num_cached = factor, noise, tpot_s, num_cached
        self._random = random.Random(7)
        self._placements: dict[str, Placement] = {}

    async def predict(self, call: GenerateCall) -> Prediction | None:
        self.num_predicted += 1
        if self.prediction_error is not None:
            raise self.prediction_error
        if self.fixed is not None or not self.is_known:
            return self.fixed
        wait_s = max(0.0, min(self._free_s) - now()) * self._factor
        alone_s = len(call.prompt_ids) * SECONDS_PER_TOKEN * self._factor
        return Prediction(wait_s + alone_s, self._tpot_s, wait_s=wait_s, num_replicas=len(self._free_s))

    def placement(self, call: GenerateCall) -> Placement | None:
        return self._placements.get(call.request_id)

    async def generate(self, call: GenerateCall) -> AsyncGenerator[list[RequestOutput], None]:
        self.started.append(call.request_id)
        await asyncio.sleep(ROUTING_S)
        if self.error is not None:
            raise self.error
        index = self._free_s.index(min(self._free_s))
        self._placements[call.request_id] = Placement(str(index), 0, None)
        try:
            alone_s = len(call.prompt_ids) * SECONDS_PER_TOKEN * math.exp(self._noise * self._random.gauss(0, 1))
            self._free_s[index] = max(self._free_s[index], now()) + alone_s
            await asyncio.sleep(self._free_s[index] - now())
            yield self._output(call, 1, None)
            num_rest = (call.params.max_tokens or 0) - 1
            await asyncio.sleep(self._tpot_s * num_rest)
            yield self._output(call, num_rest, FinishReason.LENGTH)
        finally:
            del self._placements[call.request_id]

    def _output(self, call: GenerateCall, num_tokens: int, reason: FinishReason | None) -> list[RequestOutput]:
        (sample_id,) = call.sample_ids
        return [RequestOutput(sample_id, (1,) * num_tokens, (), reason, num_cached_tokens=self._num_cached)]

    async def check_health(self) -> None:
        return None


class Outcome(NamedTuple):
    name: str
    ttft_s: float | None  # None: refused
    ended_s: float  # since arrival
    queue_s: float
    retry_after_s: float


async def send(
    admission: Admission, name: str, num_prompt: int = 100, *, tenant: str = "", priority: int = 0, num_new: int = 2
) -> Outcome:
    call = GenerateCall(name, (0,) * num_prompt, SamplingParams(max_tokens=num_new), priority=priority)
    visit = Visit(call, tenant, admission.objectives, now())
    try:
        async for _ in admission.run(visit):
            pass
    except RefusedError as refusal:
        return Outcome(name, None, now() - visit.arrived_s, visit.queue_s, refusal.retry_after_s)
    assert visit.first_s is not None
    return Outcome(name, visit.first_s - visit.arrived_s, now() - visit.arrived_s, visit.queue_s, 0.0)


def make(replicas: Replicas, ttft_s: float | None = None, tpot_s: float | None = None, **options: Any) -> Admission:
    return Admission(replicas, objectives=Objectives(ttft_s, tpot_s), clock=now, **options)


async def open_loop(admission: Admission, rate: float, seconds: float, seed: int = 1) -> list[Outcome]:
    numbers = random.Random(seed)
    tasks = []
    while now() < seconds:
        num_prompt = max(16, int(numbers.lognormvariate(math.log(200), 0.5)))
        tasks.append(asyncio.create_task(send(admission, str(len(tasks)), num_prompt, num_new=20)))
        await asyncio.sleep(numbers.expovariate(rate))
    return await asyncio.gather(*tasks)


async def test_a_call_passes_straight_through_where_nobody_waits() -> None:
    replicas = Replicas()
    admission = Admission(replicas, clock=now)
    outcome = await asyncio.wait_for(send(admission, "only", 10), 5)
    assert outcome.queue_s == 0.0
    assert replicas.num_predicted == 0, "nobody asked"


@pytest.mark.parametrize(
    ("factor", "noise"), [(1.0, 0.0), (0.5, 0.0), (2.0, 0.0), (1.0, 0.3)], ids=["right", "half", "double", "noisy"]
)
def test_under_three_times_the_load_goodput_stays_and_refusals_are_prompt(factor: float, noise: float) -> None:
    """Whatever is wrong with the predictions: what gets in finishes in time."""
    objective_s, seconds = 1.0, 60.0

    def offered(rate: float) -> list[Outcome]:
        return simulate(lambda: open_loop(make(Replicas(2, factor=factor, noise=noise), objective_s), rate, seconds))

    def goodput(outcomes: list[Outcome]) -> float:
        return sum(one.ttft_s is not None and one.ttft_s <= objective_s for one in outcomes) / seconds

    capacity = max(goodput(offered(rate)) for rate in (4.0, 6.0, 8.0, 10.0))
    outcomes = offered(27.0)
    assert goodput(outcomes) >= 0.95 * capacity
    served = [one for one in outcomes if one.ttft_s is not None]
    refused = sorted(one.ended_s for one in outcomes if one.ttft_s is None)
    assert sum(one.ttft_s > objective_s for one in served if one.ttft_s) <= 0.05 * len(served)
    assert len(refused) > len(served)
    assert refused[int(0.99 * len(refused))] < 0.05


def test_who_comes_back_after_the_time_it_was_told_gets_in() -> None:
    async def run() -> tuple[Outcome, Outcome]:
        admission = make(Replicas(), ttft_s=1.0)
        others = [asyncio.create_task(send(admission, f"other {n}", 450)) for n in range(2)]
        await asyncio.sleep(0.01)
        refused = await send(admission, "first try", 400)
        await asyncio.sleep(refused.retry_after_s)
        again = await send(admission, "second try", 400)
        await asyncio.gather(*others)
        return refused, again

    refused, again = simulate(run)
    assert refused.ttft_s is None
    assert refused.retry_after_s == 1
    assert again.ttft_s is not None
    assert again.ttft_s <= 1.0


def test_a_prompt_that_is_too_long_even_alone_is_told_so() -> None:
    async def run() -> None:
        admission = make(Replicas(), ttft_s=0.2)
        visit = Visit(GenerateCall("long", (0,) * 1000, SamplingParams(max_tokens=1)), "", admission.objectives, now())
        with pytest.raises(RefusedError, match=r"1000 ms.*1000 ms of them for the prompt alone.*200 ms.*x-slo-ttft-ms"):
            await anext(admission.run(visit))

    simulate(run)


def test_without_an_objective_nobody_is_refused() -> None:
    async def run() -> list[Outcome]:
        admission = make(Replicas(factor=3.0))
        return await asyncio.gather(*(send(admission, str(n), 500) for n in range(40)))

    assert all(one.ttft_s is not None for one in simulate(run))


def test_where_nothing_is_predicted_nobody_is_refused() -> None:
    async def run() -> list[Outcome]:
        replicas = Replicas()
        replicas.is_known = False
        admission = make(replicas, ttft_s=0.01)
        return await asyncio.gather(*(send(admission, str(n), 500) for n in range(40)))

    assert all(one.ttft_s is not None for one in simulate(run))


def test_tokens_that_would_come_too_slowly_are_refused() -> None:
    async def run() -> tuple[Outcome, Outcome]:
        slow = await send(make(Replicas(tpot_s=0.2), tpot_s=0.1), "slow")
        return slow, await send(make(Replicas(tpot_s=0.05), tpot_s=0.1), "fast")

    slow, fast = simulate(run)
    assert slow.ttft_s is None
    assert fast.ttft_s is not None


def test_the_line_is_bounded() -> None:
    async def run() -> tuple[list[Outcome], Admission]:
        admission = make(Replicas(), max_waiting=3, window_s=0.1)
        first = asyncio.create_task(send(admission, "at the replica", 300))
        await asyncio.sleep(2 * ROUTING_S)
        others = await asyncio.gather(*(send(admission, str(n), 300) for n in range(7)))
        return [await first, *others], admission

    outcomes, admission = simulate(run)
    refused = [one for one in outcomes if one.ttft_s is None]
    assert len(refused) == 8 - 1 - 3
    assert all(one.retry_after_s >= 1 and one.ended_s == 0.0 for one in refused)
    values = {(point.metric, point.labels): point.value for point in admission.snapshot("m")}
    assert values["shoal:requests_refused", ("m", "queue_full")] == 4.0
    assert values["shoal:requests_refused", ("m", "objective_unreachable")] == 0.0


def test_replicas_are_never_idle_while_calls_are_held() -> None:
    async def run() -> float:
        admission = make(Replicas(2), window_s=0.2)
        await asyncio.gather(*(send(admission, str(n), 100) for n in range(100)))
        return now()

    assert simulate(run) == pytest.approx(100 * 100 * SECONDS_PER_TOKEN / 2, rel=0.02)


def test_a_flood_does_not_hurt_who_asks_for_little() -> None:
    """Its own prompt, what is at the replica already, and a request of the flood: never the flood itself."""
    window_s = 0.3

    async def run() -> list[Outcome]:
        admission = make(Replicas(), window_s=window_s)
        flood = [asyncio.create_task(send(admission, f"flood {n}", 100, tenant="flood")) for n in range(400)]
        calm = []
        for n in range(15):
            await asyncio.sleep(1.0)
            calm.append(await send(admission, f"calm {n}", 100, tenant="calm"))
        assert sum(not task.done() for task in flood) > 100, "the flood is still there"
        await asyncio.gather(*flood)
        return calm

    slowest_s = max(one.ttft_s for one in simulate(run) if one.ttft_s is not None)
    assert slowest_s < window_s + 3 * 100 * SECONDS_PER_TOKEN + 0.05


def test_backlogged_tenants_are_served_by_their_weights() -> None:
    replicas = Replicas()

    async def run() -> None:
        admission = make(replicas, window_s=0.1, weights={"heavy": 3.0})
        tasks = [
            asyncio.create_task(send(admission, f"{tenant} {n}", 100, tenant=tenant, num_new=2))
            for n in range(200)
            for tenant in ("heavy", "plain")
        ]
        await asyncio.gather(*tasks)

    simulate(run)
    tenants = [name.split()[0] for name in replicas.started[20:180]]
    assert tenants.count("heavy") / tenants.count("plain") == pytest.approx(3.0, rel=0.1)


def test_cached_tokens_are_not_counted_against_a_tenant() -> None:
    async def run() -> float:
        admission = make(Replicas(num_cached=96))
        await send(admission, "a", 100, tenant="t", num_new=2)
        return admission._queue.counters["t"]

    assert simulate(run) == pytest.approx(100 - 96 + 2 * 2.0)


def test_a_better_priority_overtakes_those_that_are_held() -> None:
    replicas = Replicas()

    async def run() -> None:
        admission = make(replicas, window_s=0.1)
        tasks = [asyncio.create_task(send(admission, f"usual {n}", 200)) for n in range(20)]
        await asyncio.sleep(0.05)
        tasks.append(asyncio.create_task(send(admission, "urgent", 200, priority=-1)))
        await asyncio.gather(*tasks)

    simulate(run)
    assert replicas.started.index("urgent") <= 3


def test_who_goes_away_leaves_the_line_at_once_and_takes_no_turn() -> None:
    replicas = Replicas()

    async def run() -> None:
        admission = make(replicas, window_s=0.1)
        tasks = [asyncio.create_task(send(admission, str(n), 200)) for n in range(10)]
        await asyncio.sleep(0.05)
        waiting = admission.num_waiting
        tasks[7].cancel()
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert admission.num_waiting == waiting - 1
        await asyncio.gather(*tasks, return_exceptions=True)
        assert admission.num_waiting == 0

    simulate(run)
    assert "7" not in replicas.started
    assert len(replicas.started) == 9


def test_a_prediction_that_fails_is_that_calls_error_and_the_others_go_on() -> None:
    replicas = Replicas()

    async def run() -> list[Outcome | BaseException]:
        admission = make(replicas, window_s=0.1)
        tasks = [asyncio.create_task(send(admission, str(n), 300)) for n in range(4)]
        await asyncio.sleep(0.001)
        replicas.prediction_error = ValueError("broken")
        await asyncio.sleep(0.05)
        replicas.prediction_error = None
        tasks.append(asyncio.create_task(send(admission, "later", 300)))
        return await asyncio.gather(*tasks, return_exceptions=True)

    *early, later = simulate(run)
    assert any(isinstance(one, ValueError) for one in early)
    assert isinstance(later, Outcome)


def test_predictions_that_stay_bad_hold_nobody_for_ever() -> None:
    replicas = Replicas()
    replicas.fixed = Prediction(1000.0, 0.0, wait_s=1000.0)

    async def run() -> list[Outcome]:
        admission = make(replicas)
        return await asyncio.gather(*(send(admission, str(n)) for n in range(5)))

    assert max(one.ended_s for one in simulate(run)) < 30


@settings(max_examples=40, deadline=None)
@given(
    arrivals=st.lists(
        st.tuples(
            st.floats(0, 0.5),
            st.integers(1, 600),
            st.sampled_from("abc"),
            st.integers(-1, 1),
            st.sampled_from(["stays", "stays", "leaves"]),
            st.floats(0, 1),
        ),
        min_size=1,
        max_size=40,
    ),
    objective_s=st.none() | st.floats(0.05, 2),
    window_s=st.floats(0, 1),
    max_waiting=st.none() | st.integers(0, 10),
    fails=st.booleans(),
)
def test_every_call_ends_and_nothing_is_left_behind(
    arrivals: list[tuple[float, int, str, int, str, float]],
    objective_s: float | None,
    window_s: float,
    max_waiting: int | None,
    fails: bool,
) -> None:
    async def run() -> None:
        replicas = Replicas()
        replicas.error = ReplicaFailedError("gone") if fails else None
        admission = make(replicas, objective_s, window_s=window_s, max_waiting=max_waiting)
        tasks = []
        for number, (gap_s, num_prompt, tenant, priority, fate, after_s) in enumerate(arrivals):
            await asyncio.sleep(gap_s)
            task = asyncio.create_task(send(admission, str(number), num_prompt, tenant=tenant, priority=priority))
            if fate == "leaves":
                asyncio.get_running_loop().call_later(after_s, task.cancel)
            tasks.append(task)
        ends = await asyncio.gather(*tasks, return_exceptions=True)
        for end in ends:
            assert isinstance(end, Outcome | ReplicaFailedError | asyncio.CancelledError), end
        assert admission.num_waiting == 0
        await asyncio.sleep(1)
        late = await asyncio.gather(send(admission, "late", 1), return_exceptions=True)
        assert isinstance(late[0], Outcome | ReplicaFailedError)
        assert not admission._starting
        assert not admission._unplaced

    simulate(run)


@pytest.mark.parametrize("text", ["fast", "", "0", "-5", "nan", "inf"])
def test_a_bad_objective_is_refused_by_the_name_of_its_header(text: str) -> None:
    with pytest.raises(RequestError, match="x-slo-tpot-ms"):
        Objectives().overridden({"x-slo-tpot-ms": text})


def test_headers_override_the_models_objectives_one_by_one() -> None:
    model = Objectives.of_milliseconds(500, 50)
    assert model.overridden({}) == model
    assert model.overridden({"x-slo-ttft-ms": "1500"}) == Objectives(1.5, 0.05)
