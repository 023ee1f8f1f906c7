"""Writes down what becomes of each request, at the few moments when that changes.

Between those moments nothing is done for a request: a replica counts its steps once for all, and a span that ends takes
the difference to where it began. A step costs about 4 us more, however many requests it has.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from shoal.engine.plan import StepPlan, StepResult
from shoal.engine.request import Request
from shoal.engine.spans import Obstacle, Span, Tally, append_span, work_between

OBSTACLES: tuple[Obstacle, ...] = ("blocks", "slots", "tokens", "step")


class SpanRecorder:
    """Of one scheduler, whose calls come in the order of its plans and commits."""

    def __init__(self, clock: Callable[[], float], spacing: int) -> None:
        self._clock = clock
        self._held = dict.fromkeys(OBSTACLES, 0.0)  # seconds in which nobody was admitted
        self._obstacle: Obstacle | None = None  # in the last plan
        self._planned_s = 0.0
        self._planned: deque[tuple[int, float]] = deque()  # steps in flight, and when they were planned
        self._ends: deque[float] = deque(maxlen=spacing)  # of the last steps
        self._began_s = 0.0  # of the step that was committed last
        self._before = Tally()
        self._now = Tally()  # at its end

    @property
    def held_s(self) -> dict[Obstacle, float]:
        """Seconds in all in which requests waited and none could be admitted, by what the first in turn lacked."""
        return dict(self._held)

    # -- steps -------------------------------------------------------------------------------------------------

    def begin_plan(self) -> None:
        now = self._clock()
        if self._obstacle is not None:
            self._held[self._obstacle] += now - self._planned_s
        self._planned_s = now

    def end_plan(self, step: int, obstacle: Obstacle | None) -> None:
        """`obstacle`: why the first in turn still waits, if anybody does. `step` is 0 for a plan that is empty."""
        self._obstacle = obstacle
        if step:
            self._planned.append((step, self._planned_s))

    def end_step(self, plan: StepPlan, result: StepResult) -> None:
        """Before anything of the step is written down."""
        end, planned_s = self._clock(), 0.0
        while self._planned and self._planned[0][0] <= plan.step:
            planned_s = self._planned.popleft()[1]
        # With steps in flight, one begins when there is room for it.
        is_full = len(self._ends) == self._ends.maxlen
        self._began_s = max(planned_s, self._ends[0]) if is_full else planned_s
        self._ends.append(end)
        before = self._before = self._now
        num_entries = len(plan.new) + len(plan.continued)
        self._now = Tally(end, before.num_steps + 1, before.num_entries + num_entries, result.ranks)

    def leap(self, num_steps: int, num_entries: int) -> None:
        """So many steps at once, of so many requests each."""
        now = self._before = self._now
        self._began_s = now.at_s
        self._now = now._replace(
            at_s=self._clock(),
            num_steps=now.num_steps + num_steps,
            num_entries=now.num_entries + num_steps * num_entries,
        )

    # -- requests ----------------------------------------------------------------------------------------------

    def wait(self, request: Request, num_ahead: int, num_running: int, *, is_fork: bool = False) -> None:
        """It begins to wait for its admission. `is_fork`: until now it waited for the prompt of another sample."""
        trace, now = request.trace, self._clock()
        trace.is_waiting = True
        trace.since_s, trace.num_ahead, trace.num_running = request.arrival_s, num_ahead, num_running
        trace.held_s = self._held_by(now)
        trace.waits = (("prompt", now - request.arrival_s),) if is_fork else ()

    def admit(self, request: Request) -> None:
        """It gets its place in the plan that is being made."""
        trace, now = request.trace, self._planned_s
        trace.is_waiting = False
        waits = tuple(
            (obstacle, seconds - before)
            for obstacle, before, seconds in zip(OBSTACLES, trace.held_s, self._held.values(), strict=True)
            if seconds > before
        )
        append_span(
            trace.spans,
            Span(
                "preempted" if trace.is_preempted else "queue",
                trace.since_s,
                max(now, trace.since_s),
                max(now - trace.since_s, 0.0),
                waits=trace.waits + waits,
                num_ahead=trace.num_ahead,
                num_running=trace.num_running,
            ),
        )
        request.mark = None

    def computed(self, request: Request, start: int, num_tokens: int, *, has_token: bool) -> None:
        """A chunk, from position `start`, of what comes before its next token; with `has_token` it was the last."""
        trace, before, now = request.trace, self._before, self._now
        is_first = not trace.spans or trace.spans[-1].kind in ("queue", "preempted")
        append_span(
            trace.spans,
            Span(
                "recompute" if trace.is_preempted else "prefill",
                self._began_s,
                now.at_s,
                now.at_s - self._began_s,
                num_tokens=num_tokens,
                num_cached=start if is_first else 0,
                num_steps=now.num_steps - before.num_steps,
                mean_batch=(now.num_entries - before.num_entries) / (now.num_steps - before.num_steps),
                ranks=work_between(before.ranks, now.ranks),
            ),
        )
        if has_token:
            request.mark = now
            trace.num_told += 1

    def preempt(self, request: Request, num_ahead: int, num_running: int) -> None:
        """It loses its place. A token may be on its way still: the first one ends a chunk, others do not."""
        now = self._planned_s
        self._end_decode(request, now)
        if request.first_token_s is not None:
            request.mark = self._now
        trace = request.trace
        trace.is_waiting = trace.is_preempted = True
        trace.since_s, trace.num_ahead, trace.num_running = now, num_ahead, num_running
        trace.held_s, trace.waits = self._held_by(now), ()

    def finish(self, request: Request, now: float) -> tuple[Span, ...]:
        """Its spans, of which the last one ends now."""
        trace = request.trace
        if trace.is_waiting:
            append_span(trace.spans, Span("preempted", trace.since_s, now, now - trace.since_s))
        else:
            self._end_decode(request, now)
        return tuple(trace.spans)

    def _end_decode(self, request: Request, now: float) -> None:
        mark, trace = request.mark, request.trace
        num_tokens = len(request.output_ids) - trace.num_told
        if mark is None or num_tokens <= 0:
            return
        num_steps = self._now.num_steps - mark.num_steps
        append_span(
            trace.spans,
            Span(
                "decode",
                mark.at_s,
                now,
                now - mark.at_s,
                num_tokens=num_tokens,
                num_steps=num_tokens - trace.num_accepted,
                num_accepted=trace.num_accepted,
                mean_batch=(self._now.num_entries - mark.num_entries) / num_steps if num_steps else 0.0,
                ranks=work_between(mark.ranks, self._now.ranks),
            ),
        )
        trace.num_told += num_tokens
        trace.num_accepted = 0

    def _held_by(self, now: float) -> tuple[float, ...]:
        """Counted up to now, in the middle of an obstacle too."""
        return tuple(
            seconds + (now - self._planned_s if obstacle == self._obstacle else 0.0)
            for obstacle, seconds in self._held.items()
        )
