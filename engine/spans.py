"""What became of a request, as spans of time. Standard library only, plain data: it crosses process borders.

A request's spans follow each other: queue, prefill (one for each chunk), decode; after a preemption preempted,
recompute and decode again. Between two chunks there may be a gap, of steps whose tokens others had; with pipeline
stages, chunks that follow each other through the stages overlap. Seconds are time.monotonic() of the replica.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, NamedTuple, TypeAlias

SpanKind: TypeAlias = Literal["queue", "prefill", "decode", "preempted", "recompute"]
# What kept the first in turn from being admitted: no KV blocks, no place among those that run, no tokens left in a
# step, its own last step before a preemption, or (of a further sample) the prompt that the first sample computes.
Obstacle: TypeAlias = Literal["blocks", "slots", "tokens", "step", "prompt"]

MAX_SPANS = 64  # of a request; later ones of a kind become one


class RankWork(NamedTuple):
    """What a rank has done: in all since it began, or during a span as far as it has told by then.

    compute_s counts waiting for other tensor ranks, wait_s is waiting for hidden states and tokens of other stages.
    """

    rank: str  # "pp0/tp1": stage and tensor rank
    num_steps: int
    compute_s: float
    wait_s: float


class Span(NamedTuple):
    """A stretch of a request's life.

    seconds: its length, or of several that became one the sum. num_tokens: computed in a chunk, or generated.
    num_steps: in which it had a part. num_accepted: drafts, of num_tokens. mean_batch: requests in a step of the
    replica meanwhile, this one too. waits: while it was not admitted, seconds by what held up the first in turn.
    num_ahead, num_running: requests that waited and ran when it began to wait. ranks: of groups whose ranks tell.
    """

    kind: SpanKind
    start_s: float
    end_s: float
    seconds: float
    num_tokens: int = 0
    num_cached: int = 0  # leading tokens found in the prefix cache, of the first chunk
    num_steps: int = 0
    num_accepted: int = 0
    mean_batch: float = 0.0
    waits: tuple[tuple[Obstacle, float], ...] = ()
    num_ahead: int = 0
    num_running: int = 0
    ranks: tuple[RankWork, ...] = ()


def work_between(before: tuple[RankWork, ...], after: tuple[RankWork, ...]) -> tuple[RankWork, ...]:
    """What ranks did from one state of their counts to a later one; without those that told nothing meanwhile."""
    if after is before:
        return ()
    known = {work.rank: work for work in before}
    found = []
    for work in after:
        start = known.get(work.rank, RankWork(work.rank, 0, 0.0, 0.0))
        if work.num_steps > start.num_steps:
            found.append(
                RankWork(
                    work.rank,
                    work.num_steps - start.num_steps,
                    work.compute_s - start.compute_s,
                    work.wait_s - start.wait_s,
                )
            )
    return tuple(found)


def append_span(spans: list[Span], span: Span) -> None:
    """Add a span; where there are MAX_SPANS already, to the last one of its kind."""
    if len(spans) >= MAX_SPANS:
        for index in range(len(spans) - 1, -1, -1):
            if spans[index].kind == span.kind:
                spans[index] = _together(spans[index], span)
                return
    spans.append(span)


def _together(first: Span, second: Span) -> Span:
    num_steps = first.num_steps + second.num_steps
    batches = first.mean_batch * first.num_steps + second.mean_batch * second.num_steps
    waits: dict[Obstacle, float] = dict(first.waits)
    for obstacle, seconds in second.waits:
        waits[obstacle] = waits.get(obstacle, 0.0) + seconds
    ranks = {work.rank: work for work in first.ranks}
    for work in second.ranks:
        before = ranks.get(work.rank, RankWork(work.rank, 0, 0.0, 0.0))
        ranks[work.rank] = RankWork(
            work.rank,
            before.num_steps + work.num_steps,
            before.compute_s + work.compute_s,
            before.wait_s + work.wait_s,
        )
    return Span(
        first.kind,
        first.start_s,
        second.end_s,
        first.seconds + second.seconds,
        first.num_tokens + second.num_tokens,
        first.num_cached,
        num_steps,
        first.num_accepted + second.num_accepted,
        batches / num_steps if num_steps else 0.0,
        tuple(waits.items()),
        max(first.num_ahead, second.num_ahead),
        max(first.num_running, second.num_running),
        tuple(ranks.values()),
    )


class Tally(NamedTuple):
    """What a replica had done by a moment. A span is the difference of two."""

    at_s: float = 0.0
    num_steps: int = 0
    num_entries: int = 0  # requests in those steps, together
    ranks: tuple[RankWork, ...] = ()


@dataclass(slots=True)
class Trace:
    """What is written down of a request while it is here."""

    spans: list[Span] = field(default_factory=list)
    is_waiting: bool = False
    is_preempted: bool = False  # once, at least
    since_s: float = 0.0  # waiting since
    held_s: tuple[float, ...] = ()  # by obstacle, as counted when it began to wait
    waits: tuple[tuple[Obstacle, float], ...] = ()  # before that
    num_ahead: int = 0
    num_running: int = 0
    num_told: int = 0  # output tokens that a span has counted
    num_accepted: int = 0  # drafts, since the last span
