"""Who gets in, and when: a call that cannot meet its objective is refused at once, the others go in a fair order.

Calls go straight through while the replicas keep up. When even the best of them would let a call wait longer than a
small window, calls are held here, where their order can still be decided (fairness.py), and let in as first tokens
come, as calls end, and by a timer. So the replicas always have a window of work, and no more than that is out of reach
of a tenant or a priority that should go first.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from typing import Final, Literal

from shoal.cluster.gateway.backend import Backend, GenerateCall, Placement, Prediction
from shoal.cluster.gateway.calibration import Calibration, DrainRate
from shoal.cluster.gateway.fairness import OUTPUT_WEIGHT, FairQueue
from shoal.cluster.metrics import (
    GATEWAY_QUEUE_SECONDS,
    GATEWAY_TOKENS,
    GATEWAY_WAITING,
    REQUESTS_REFUSED,
    Histogram,
    Point,
    Snapshot,
)
from shoal.engine.request import RequestError, RequestOutput, RequestTimes

TTFT_HEADER: Final = "x-slo-ttft-ms"
TPOT_HEADER: Final = "x-slo-tpot-ms"
WINDOW_S: Final = 0.5
_LOOK_S: Final = 0.02  # how long calls are held before somebody looks again, if nothing happens
_MAX_STILL_S: Final = 5.0  # how long predictions may keep everybody waiting while nobody gets in

RefusalReason = Literal["objective_unreachable", "queue_full"]


class RefusedError(RuntimeError):
    """There is too much to do for this call. Answered with 429 and Retry-After."""

    def __init__(self, message: str, *, code: RefusalReason, retry_after_s: float) -> None:
        super().__init__(message)
        self.code = code
        self.retry_after_s = max(1, math.ceil(retry_after_s))


@dataclass(frozen=True, slots=True)
class Objectives:
    """Seconds to the first token, and from one to the next; None where it may take as long as it takes."""

    ttft_s: float | None = None
    tpot_s: float | None = None

    @property
    def has_any(self) -> bool:
        return self.ttft_s is not None or self.tpot_s is not None

    @classmethod
    def of_milliseconds(cls, ttft_ms: float | None, tpot_ms: float | None) -> Objectives:
        return cls(
            ttft_ms / 1000 if ttft_ms is not None else None,
            tpot_ms / 1000 if tpot_ms is not None else None,
        )

    def overridden(self, headers: Mapping[str, str]) -> Objectives:
        """Those of the headers, and these where they say nothing. Raises RequestError naming the header."""
        return Objectives(
            _seconds(headers, TTFT_HEADER, self.ttft_s),
            _seconds(headers, TPOT_HEADER, self.tpot_s),
        )


def _seconds(headers: Mapping[str, str], name: str, default_s: float | None) -> float | None:
    text = headers.get(name)
    if text is None:
        return default_s
    try:
        milliseconds = float(text)
    except ValueError:
        milliseconds = math.nan
    if not 0 < milliseconds < math.inf:
        raise RequestError(f"{name} must be a number of milliseconds above 0, got {text[:40]!r}", param=name)
    return milliseconds / 1000


def _too_late(expected_s: float, objective_s: float, alone_s: float) -> RefusedError:
    """`alone_s`: what the prompt takes where nobody is before it."""
    reason = f"the first token would come after about {expected_s * 1000:.0f} ms"
    way_out = "try again later"
    if alone_s > objective_s:
        reason += f", {alone_s * 1000:.0f} ms of them for the prompt alone"
        way_out = "shorten the prompt"
    return RefusedError(
        f"{reason}, and the objective is {objective_s * 1000:g} ms: {way_out}, or raise {TTFT_HEADER}",
        code="objective_unreachable",
        retry_after_s=expected_s - objective_s,  # a second of waiting work is done in a second
    )


@dataclass(slots=True, eq=False)
class Visit:
    """One call from its arrival to its end. Times are of the admission's clock."""

    call: GenerateCall
    tenant: str
    objectives: Objectives
    arrived_s: float
    work_s: float = 0.0  # to compute its prompt, as predicted
    predicted_ttft_s: float | None = None  # at arrival, with what was held then; not corrected
    predicted_tpot_s: float | None = None
    turn: asyncio.Future[None] | None = None  # while it is held
    queue_s: float = 0.0  # how long it was held
    placement: Placement | None = None  # from its first output on
    first_s: float | None = None
    last_s: float = 0.0
    num_tokens: int = 0  # of all its samples
    num_cached_tokens: int = 0
    held_since_s: float | None = None
    num_ahead: int = 0  # calls that were held when it began to be, whoever's turn it was
    num_tenants_ahead: int = 0
    sent_s: float | None = None  # to a replica
    ended_s: float | None = None
    num_prompt_tokens: int = field(init=False)
    times: list[RequestTimes] = field(default_factory=list)  # of the samples that finished; a replica's clock

    def __post_init__(self) -> None:
        self.num_prompt_tokens = len(self.call.prompt_ids)

    def forget_prompt(self) -> None:
        """Once it is over, so that it takes no memory where its times are kept."""
        self.call = GenerateCall(self.call.request_id, (), self.call.params)


class Admission:
    """Stands in front of one model's replicas, in one event loop.

    objectives: of calls that name none. window_s: predicted wait at a replica above which calls are held here.
    weights: of tenants by name. max_waiting: calls held at once, None for any number; more are refused. clock: seconds.
    """

    def __init__(
        self,
        backend: Backend,
        *,
        objectives: Objectives | None = None,
        window_s: float = WINDOW_S,
        weights: Mapping[str, float] | None = None,
        max_waiting: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.objectives = objectives or Objectives()
        self.clock = clock
        self._backend = backend
        self._window_s = window_s
        self._max_waiting = max_waiting
        self._queue: FairQueue[Visit] = FairQueue(weights)
        self._starting: set[Visit] = set()  # let in, without a first token yet
        self._unplaced: set[Visit] = set()  # of those, not known to be at a replica yet: no prediction counts them
        self._changed = asyncio.Event()
        self._releasing: asyncio.Task[None] | None = None  # runs while calls are held
        self._let_in_s = -math.inf  # when somebody was last let in
        self._ttft = Calibration()
        self._tpot = Calibration()
        self._drain = DrainRate()
        self._refused: Counter[RefusalReason] = Counter({"objective_unreachable": 0, "queue_full": 0})
        self._queue_seconds = Histogram(GATEWAY_QUEUE_SECONDS)
        self._num_prompt_tokens = self._num_generated = 0

    @property
    def num_waiting(self) -> int:
        return len(self._queue)

    async def run(self, visit: Visit) -> AsyncGenerator[list[RequestOutput], None]:
        """The call's outputs as Backend.generate gives them, when it is its turn.

        Raises RefusedError before the first of them, and whatever Backend.generate raises.
        """
        try:
            await self._enter(visit)
            visit.sent_s = self.clock()
            async with aclosing(self._backend.generate(visit.call)) as steps:
                async for outputs in steps:
                    self._observe(visit, outputs)
                    yield outputs
        except RefusedError as error:
            self._refused[error.code] += 1
            raise
        finally:
            self._leave(visit)

    def snapshot(self, model_name: str) -> Snapshot:
        return (
            Point(GATEWAY_WAITING.name, (model_name,), float(len(self._queue))),
            Point(GATEWAY_TOKENS.name, (model_name, "prompt"), float(self._num_prompt_tokens)),
            Point(GATEWAY_TOKENS.name, (model_name, "generated"), float(self._num_generated)),
            Point(GATEWAY_QUEUE_SECONDS.name, (model_name,), self._queue_seconds.distribution()),
            *(Point(REQUESTS_REFUSED.name, (model_name, reason), float(n)) for reason, n in self._refused.items()),
        )

    # -- the way in --------------------------------------------------------------------------------------------

    async def _enter(self, visit: Visit) -> None:
        prediction = await self._predict(visit)
        if prediction is not None:
            self._check_objectives(visit, prediction)
        if self._queue or self._is_saturated(prediction):
            await self._wait(visit)
        else:
            self._queue.pass_by(visit.tenant)
            self._let_in(visit)
        self._queue_seconds.add(visit.queue_s)

    async def _predict(self, visit: Visit) -> Prediction | None:
        """None where nothing is known, or nobody asks: without an objective, when nothing else waits for a token."""
        if not (visit.objectives.has_any or self._starting or self._queue):
            return None
        prediction = await self._backend.predict(visit.call)
        if prediction is None:
            return None
        visit.work_s = max(0.0, prediction.ttft_s - prediction.wait_s)
        ahead_s = self._unplaced_s() + self._queue.work_ahead_s(visit.tenant, visit.call.priority, visit.work_s)
        visit.predicted_ttft_s = prediction.ttft_s + ahead_s / self._drain.rate(prediction.num_replicas)
        visit.predicted_tpot_s = prediction.tpot_s
        return prediction

    def _check_objectives(self, visit: Visit, prediction: Prediction) -> None:
        now, asked = self.clock(), visit.objectives
        if asked.ttft_s is not None and visit.predicted_ttft_s is not None:
            # With nobody on the way in, what was learned is put to the test, else a bad time would refuse all for long.
            expected_s = self._ttft.correct(visit.predicted_ttft_s, now) if self._starting else visit.predicted_ttft_s
            if expected_s > asked.ttft_s:
                alone_s = self._ttft.correct(visit.work_s, now)
                raise _too_late(expected_s, asked.ttft_s, alone_s)
        if asked.tpot_s is not None:
            expected_s = self._tpot.correct(prediction.tpot_s, now)
            if expected_s > asked.tpot_s:
                raise RefusedError(
                    f"a token would come about every {expected_s * 1000:.0f} ms, and the objective is "
                    f"{asked.tpot_s * 1000:g} ms: try again later, or raise {TPOT_HEADER}",
                    code="objective_unreachable",
                    retry_after_s=prediction.retry_after_s,
                )

    def _is_saturated(self, prediction: Prediction | None) -> bool:
        if prediction is None:
            return False
        return prediction.wait_s + self._unplaced_s() / self._drain.rate(prediction.num_replicas) > self._window_s

    def _unplaced_s(self) -> float:
        """Seconds of computing on the way to replicas that no prediction counts yet."""
        self._unplaced = {visit for visit in self._unplaced if self._backend.placement(visit.call) is None}
        return sum(visit.work_s for visit in self._unplaced)

    def _let_in(self, visit: Visit) -> None:
        self._starting.add(visit)
        self._unplaced.add(visit)
        self._let_in_s = self.clock()
        self._queue.charge(visit.tenant, len(visit.call.prompt_ids))  # what is cached of it is given back

    # -- waiting -----------------------------------------------------------------------------------------------

    async def _wait(self, visit: Visit) -> None:
        if self._max_waiting is not None and len(self._queue) >= self._max_waiting:
            ahead_s = self._queue.work_ahead_s(visit.tenant, visit.call.priority, visit.work_s)
            raise RefusedError(
                f"{len(self._queue)} calls wait already, the most that this server holds: try again later",
                code="queue_full",
                retry_after_s=ahead_s / self._drain.rate(1),
            )
        visit.held_since_s = start = self.clock()
        visit.num_ahead, visit.num_tenants_ahead = len(self._queue), self._queue.num_tenants
        visit.turn = asyncio.get_running_loop().create_future()
        self._queue.add(visit, visit.tenant, visit.call.priority, visit.work_s, start)
        self._changed.set()
        if self._releasing is None or self._releasing.done():
            self._releasing = asyncio.create_task(self._release())
        try:
            await visit.turn
        finally:
            visit.queue_s = self.clock() - start

    async def _release(self) -> None:
        """Let calls in until none is held. A call whose prediction fails gets the error; the others go on."""
        since_s = self.clock()
        while (visit := self._queue.first()) is not None:
            self._changed.clear()
            try:
                prediction = await self._backend.predict(visit.call)
            except Exception as error:
                self._answer(visit, error)
                continue
            if visit not in self._queue:
                continue
            now = self.clock()
            if self._is_saturated(prediction) and now - max(since_s, self._let_in_s) < _MAX_STILL_S:
                with suppress(TimeoutError):
                    async with asyncio.timeout(_LOOK_S):
                        await self._changed.wait()
                continue
            if prediction is not None:
                self._drain.add(visit.work_s, now - max(since_s, self._let_in_s))
            self._answer(visit, self._hopeless(visit, prediction, now))

    def _hopeless(self, visit: Visit, prediction: Prediction | None, now: float) -> RefusedError | None:
        """The refusal of a call that has waited so long that it would miss its objective even at an idle replica."""
        objective_s = visit.objectives.ttft_s
        if objective_s is None or prediction is None:
            return None
        expected_s = now - visit.arrived_s + min(visit.work_s, self._ttft.correct(visit.work_s, now))
        return _too_late(expected_s, objective_s, visit.work_s) if expected_s > objective_s else None

    def _answer(self, visit: Visit, error: Exception | None) -> None:
        """End the waiting of a call that is held: it is let in, or gets the error."""
        if visit not in self._queue:
            return
        assert visit.turn is not None
        if visit.turn.done():  # its client has gone, and it is about to leave
            self._queue.drop(visit)
        elif error is not None:
            self._queue.drop(visit)
            visit.turn.set_exception(error)
        else:
            self._queue.take(visit, self.clock())
            self._let_in(visit)
            visit.turn.set_result(None)

    # -- what became of it -------------------------------------------------------------------------------------

    def _observe(self, visit: Visit, outputs: Sequence[RequestOutput]) -> None:
        now = self.clock()
        if visit.first_s is None:
            self._start(visit, outputs, now)
        visit.last_s = now
        num_tokens = 0
        for output in outputs:
            num_tokens += len(output.token_ids)
            if output.times is not None:
                visit.times.append(output.times)
        visit.num_tokens += num_tokens
        self._num_generated += num_tokens
        self._queue.charge(visit.tenant, OUTPUT_WEIGHT * num_tokens)

    def _start(self, visit: Visit, outputs: Sequence[RequestOutput], now: float) -> None:
        """The first token is there."""
        visit.first_s = now
        self._num_prompt_tokens += len(visit.call.prompt_ids)
        visit.placement = self._backend.placement(visit.call)
        first_sample = visit.call.sample_ids[0]  # the others share its blocks, and compute no prompt
        cached = (one.num_cached_tokens for one in outputs if one.request_id == first_sample)
        visit.num_cached_tokens = next(cached, 0)
        self._queue.charge(visit.tenant, -visit.num_cached_tokens)
        if visit.predicted_ttft_s is not None:
            self._ttft.learn(visit.predicted_ttft_s, now - visit.arrived_s, now)
        self._settle(visit)

    def _leave(self, visit: Visit) -> None:
        visit.ended_s = self.clock()
        if visit in self._queue:
            self._queue.drop(visit)
        num_steps = visit.num_tokens / visit.call.params.num_samples - 1
        if visit.first_s is not None and visit.predicted_tpot_s is not None and num_steps >= 1:
            measured_s = (visit.last_s - visit.first_s) / num_steps
            self._tpot.learn(visit.predicted_tpot_s, measured_s, self.clock())
        self._settle(visit)

    def _settle(self, visit: Visit) -> None:
        self._starting.discard(visit)
        self._unplaced.discard(visit)
        self._changed.set()
