"""The answer to "why was my request slow": one Timeline for each HTTP request, from its first byte to its last.

Both halves are joined here. The gateway's moments are of its own time.monotonic(), the replica's of that of another
host, which may have begun at any time. A replica gets a call after the gateway has sent it, and gives the first and the
last token before the gateway has them. That bounds the difference of the clocks from both sides; taken is the least
upper bound, for tokens come back within a millisecond and a call may take several to get there. How far apart the
bounds are is told with each call (`clock_error_s`).
"""

from __future__ import annotations

import time
from bisect import insort
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal

from shoal.cluster.gateway.admission import Visit
from shoal.cluster.gateway.trace_context import TraceContext
from shoal.engine.spans import Span

MAX_RECENT: Final = 1000
MAX_SLOWEST: Final = 100
SLOW_MEMORY_S: Final = 3600.0

Outcome = Literal["finished", "client_gone", "refused", "failed"]
_CLIENT_GONE: Final = 499


@dataclass(frozen=True, slots=True)
class TimelineSpan:
    """Seconds since the request came, and what else is to be said of that time. Spans lie within the one above."""

    name: str
    start_s: float
    end_s: float
    attributes: Mapping[str, Any] = field(default_factory=dict)
    spans: tuple[TimelineSpan, ...] = ()

    @property
    def seconds(self) -> float:
        return self.end_s - self.start_s


@dataclass(frozen=True, slots=True)
class Timeline:
    """What became of one HTTP request. Plain data all through, and nothing of its text.

    spans: auth (before it was taken up), read (its body), tokenize, a "call" for each prompt, and answer (after the
    last token). In a call: held (in the gateway), route (the decision), send, and what the replica did with the sample
    that ended last: queue, prefill for each chunk, decode, preempted, recompute; in these "rank pp0/tp0" for each rank
    that told what it did.
    """

    request_id: str
    answer_id: str
    trace_id: str
    path: str
    model: str
    tenant: str
    is_stream: bool
    status: int
    outcome: Outcome
    started_unix_s: float
    seconds: float
    ttft_s: float | None
    num_prompt_tokens: int
    num_cached_tokens: int
    num_output_tokens: int
    num_preemptions: int
    spans: tuple[TimelineSpan, ...]


@dataclass(slots=True)
class Recording:
    """A timeline in the making, of a request that is being answered. Moments are time.monotonic(), None until then."""

    request_id: str
    path: str
    arrived_s: float
    arrived_unix_s: float
    trace: TraceContext | None = None
    taken_up_s: float | None = None
    read_s: float | None = None
    tokenized_s: float | None = None
    answer_id: str = ""
    model: str = ""
    tenant: str = ""
    is_stream: bool = False
    visits: Sequence[Visit] = ()
    has_failed: bool = False  # after the answer began

    def finish(self, status: int, now: float, *, is_cut_off: bool = False) -> Timeline:
        """`status` is of the answer. `is_cut_off`: its end never left."""
        visits = self.visits
        times = [one for visit in visits for one in visit.times]
        first_s = min((visit.first_s for visit in visits if visit.first_s is not None), default=None)
        return Timeline(
            request_id=self.request_id,
            answer_id=self.answer_id,
            trace_id=self.trace.trace_id if self.trace is not None else "",
            path=self.path,
            model=self.model,
            tenant=self.tenant,
            is_stream=self.is_stream,
            status=status,
            outcome=_outcome(status, has_failed=self.has_failed, is_cut_off=is_cut_off),
            started_unix_s=self.arrived_unix_s,
            seconds=now - self.arrived_s,
            ttft_s=first_s - self.arrived_s if first_s is not None else None,
            num_prompt_tokens=sum([visit.num_prompt_tokens for visit in visits]),
            num_cached_tokens=sum([visit.num_cached_tokens for visit in visits]),
            num_output_tokens=sum([visit.num_tokens for visit in visits]),
            num_preemptions=sum([one.num_preemptions for one in times]),
            spans=tuple(self._spans(now)),
        )

    def _spans(self, now: float) -> Iterator[TimelineSpan]:
        zero = at = self.arrived_s
        for name, moment in (("auth", self.taken_up_s), ("read", self.read_s), ("tokenize", self.tokenized_s)):
            if moment is not None:
                yield TimelineSpan(name, at - zero, moment - zero)
                at = moment
        for visit in self.visits:
            yield _call_span(visit, zero, at, now)
        last_s = max((visit.last_s for visit in self.visits if visit.first_s is not None), default=None)
        if last_s is not None:
            yield TimelineSpan("answer", last_s - zero, now - zero)


@dataclass(frozen=True, slots=True)
class Ended:
    """A recording whose request is over. Its timeline is put together when somebody asks: few of them are ever read."""

    recording: Recording
    status: int
    ended_s: float
    is_cut_off: bool = False

    def __post_init__(self) -> None:
        for visit in self.recording.visits:
            visit.forget_prompt()

    @property
    def seconds(self) -> float:
        return self.ended_s - self.recording.arrived_s

    def timeline(self) -> Timeline:
        return self.recording.finish(self.status, self.ended_s, is_cut_off=self.is_cut_off)


def outcome_of(ended: Ended) -> Outcome:
    return _outcome(ended.status, has_failed=ended.recording.has_failed, is_cut_off=ended.is_cut_off)


def _outcome(status: int, *, has_failed: bool, is_cut_off: bool) -> Outcome:
    if has_failed:
        return "failed"
    if is_cut_off or status == _CLIENT_GONE:
        return "client_gone"
    if status >= 500:
        return "failed"
    return "refused" if status >= 400 else "finished"


def _call_span(visit: Visit, zero: float, start: float, now: float) -> TimelineSpan:
    end = visit.ended_s if visit.ended_s is not None else now
    placement, last = visit.placement, max(visit.times, key=lambda one: one.finished_s, default=None)
    about: dict[str, Any] = {"num_prompt_tokens": visit.num_prompt_tokens, "num_output_tokens": visit.num_tokens}
    if visit.call.params.num_samples > 1:
        about["num_samples"] = visit.call.params.num_samples
    parts: list[TimelineSpan] = []
    if visit.queue_s > 0.0:
        held_s = visit.held_since_s if visit.held_since_s is not None else start
        parts.append(
            TimelineSpan(
                "held",
                held_s - zero,
                held_s + visit.queue_s - zero,
                {"num_ahead": visit.num_ahead, "num_tenants_ahead": visit.num_tenants_ahead},
            )
        )
    if placement is not None:
        about |= {"replica": placement.replica}
    sent_s = visit.sent_s
    if sent_s is not None and placement is not None and placement.decided_s is not None:
        routed_s = max(placement.decided_s, sent_s)
        matched: dict[str, Any] = {
            "num_matched_tokens": placement.num_matched_tokens,
            "predicted_ttft_s": placement.predicted_ttft_s,
            "candidates": [dict(one) for one in placement.candidates],
        }
        parts.append(TimelineSpan("route", sent_s - zero, routed_s - zero, matched))
        sent_s = routed_s
    if sent_s is not None and last is not None:
        shift, error_s = clock_shift(visit)
        about["clock_error_s"] = error_s
        arrived_s = min(max(last.arrival_s + shift, sent_s), end)
        parts.append(TimelineSpan("send", sent_s - zero, arrived_s - zero))
        parts += [_engine_span(span, shift - zero, arrived_s - zero, end - zero) for span in last.spans]
    return TimelineSpan("call", start - zero, end - zero, about, tuple(parts))


def clock_shift(visit: Visit) -> tuple[float, float]:
    """What to add to a replica's seconds to get this gateway's, and how far the bounds of it are apart."""
    assert visit.sent_s is not None
    assert visit.times
    lower = max([visit.sent_s - one.arrival_s for one in visit.times])
    upper = min([visit.last_s - one.finished_s for one in visit.times])
    first = min((one.first_token_s for one in visit.times if one.first_token_s is not None), default=None)
    if visit.first_s is not None and first is not None:
        upper = min(upper, visit.first_s - first)
    return upper, max(upper - lower, 0.0)


def _engine_span(span: Span, shift: float, least_s: float, most_s: float) -> TimelineSpan:
    start = min(max(span.start_s + shift, least_s), most_s)
    end = min(max(span.end_s + shift, start), most_s)
    about: dict[str, Any]
    match span.kind:
        case "queue" | "preempted":
            about = {"waits_s": dict(span.waits), "num_ahead": span.num_ahead, "num_running": span.num_running}
        case "prefill" | "recompute":
            about = {"num_tokens": span.num_tokens, "num_cached_tokens": span.num_cached, "num_steps": span.num_steps}
        case "decode":
            about = {
                "num_tokens": span.num_tokens,
                "num_steps": span.num_steps,
                "num_accepted_drafts": span.num_accepted,
            }
    if span.mean_batch:
        about["mean_batch"] = round(span.mean_batch, 2)
    about["seconds"] = span.seconds
    ranks = tuple(
        TimelineSpan(
            f"rank {work.rank}",
            start,
            end,
            {"num_steps": work.num_steps, "compute_s": work.compute_s, "wait_s": work.wait_s},
        )
        for work in span.ranks
    )
    return TimelineSpan(span.kind, start, end, about, ranks)


class TimelineStore:
    """The last timelines, and for a while the slowest ones."""

    def __init__(
        self,
        *,
        max_recent: int = MAX_RECENT,
        max_slowest: int = MAX_SLOWEST,
        memory_s: float = SLOW_MEMORY_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._max_recent = max_recent
        self._max_slowest = max_slowest
        self._memory_s = memory_s
        self._clock = clock
        self._recent: OrderedDict[str, Ended] = OrderedDict()
        self._slowest: list[Ended] = []  # the slowest last

    def add(self, ended: Ended) -> None:
        request_id = ended.recording.request_id
        self._recent.pop(request_id, None)
        self._recent[request_id] = ended
        if len(self._recent) > self._max_recent:
            self._recent.popitem(last=False)
        if len(self._slowest) >= self._max_slowest:
            least = self._slowest[0]
            if ended.seconds <= least.seconds and not self._is_old(least):
                return
            self._forget_old()
        insort(self._slowest, ended, key=lambda one: one.seconds)
        del self._slowest[: -self._max_slowest]

    def find(self, request_id: str) -> Timeline | None:
        """By the id of the request or of its answer; the newest one of that id."""
        if (known := self._recent.get(request_id)) is not None:
            return known.timeline()
        for ended in (*reversed(self._recent.values()), *reversed(self._slowest)):
            if request_id in (ended.recording.request_id, ended.recording.answer_id):
                return ended.timeline()
        return None

    def recent(self, limit: int) -> list[Timeline]:
        """Newest first."""
        return [ended.timeline() for _, ended in zip(range(limit), reversed(self._recent.values()), strict=False)]

    def slowest(self, limit: int) -> list[Timeline]:
        """Slowest first, of those that ended within `memory_s`."""
        self._forget_old()
        return [ended.timeline() for ended in reversed(self._slowest[-limit:])] if limit > 0 else []

    def _forget_old(self) -> None:
        self._slowest = [ended for ended in self._slowest if not self._is_old(ended)]

    def _is_old(self, ended: Ended) -> bool:
        return ended.ended_s < self._clock() - self._memory_s


def timing_of(visits: Sequence[Visit]) -> dict[str, float]:
    """Milliseconds of the call that took longest: held or waiting, on its way, its prompt, its tokens.

    Where replicas tell nothing, until its first token all counts as prefill.
    """
    visit = max(visits, key=lambda one: one.last_s)
    last = max(visit.times, key=lambda one: one.finished_s, default=None)
    queue_s, prefill_s, decode_s, route_s = visit.queue_s, 0.0, 0.0, 0.0
    if visit.first_s is not None:
        decode_s = visit.last_s - visit.first_s
        since_s = visit.sent_s if visit.sent_s is not None else visit.arrived_s
        prefill_s = visit.first_s - since_s
        if last is not None and last.admitted_s is not None and last.first_token_s is not None:
            waited_s = last.admitted_s - last.arrival_s
            computed_s = last.first_token_s - last.admitted_s
            queue_s += waited_s
            route_s = max(prefill_s - waited_s - computed_s, 0.0)
            prefill_s = computed_s
    parts = {"queue": queue_s, "route": route_s, "prefill": prefill_s, "decode": decode_s}
    return {name: round(1000 * seconds, 1) for name, seconds in parts.items()}


def server_timing(visits: Sequence[Visit]) -> str:
    """The value of a W3C Server-Timing header."""
    return ", ".join(f"{name};dur={milliseconds:g}" for name, milliseconds in timing_of(visits).items())
