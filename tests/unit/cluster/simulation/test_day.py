from __future__ import annotations

import heapq
import random
from collections import defaultdict
from itertools import pairwise

import pytest

from shoal.cluster.simulation.day import (
    DayCurve,
    Lengths,
    Schedule,
    arrivals,
    day_trace,
    oracle_schedule,
    random_bursts,
)

HOUR_S = 3600.0


def test_noon_is_ten_times_as_busy_as_the_night() -> None:
    curve = DayCurve(0.2, 10.0)
    hours = [0] * 24
    for at_s in arrivals(curve, random.Random(4)):
        hours[int(at_s / HOUR_S)] += 1
    assert sum(hours) == pytest.approx(86_400 * 0.2 * 5.5, rel=0.02)
    night, noon = hours[0] + hours[23], hours[11] + hours[12]
    assert 8 < noon / night < 11
    assert curve(12 * HOUR_S) == pytest.approx(10 * curve(0.0)) == pytest.approx(curve.highest)


def test_bursts_are_sharp_and_end() -> None:
    bursts = random_bursts(4, seconds=300.0, factor=2.0, seed=3)
    assert len(bursts) == 4
    calm, curve = DayCurve(1.0, 10.0), DayCurve(1.0, 10.0, bursts)
    for burst in bursts:
        assert curve(burst.begin_s + 60) == pytest.approx(2 * calm(burst.begin_s + 60))
        assert curve(burst.begin_s) == pytest.approx(calm(burst.begin_s))
        assert curve(burst.begin_s + 301) == pytest.approx(calm(burst.begin_s + 301))


def test_a_day_is_its_seed() -> None:
    curve = DayCurve(0.01, 10.0)
    assert day_trace(curve, seed=1) == day_trace(curve, seed=1)
    assert day_trace(curve, seed=1) != day_trace(curve, seed=2)


def test_lengths_have_a_heavy_tail_and_an_end() -> None:
    chance, lengths = random.Random(0), Lengths(1000.0, 1.0, 8000)
    drawn = sorted(lengths.draw(chance) for _ in range(4000))
    assert drawn[2000] == pytest.approx(1000, rel=0.1)
    assert drawn[-1] == 8000
    assert sum(drawn) / len(drawn) > 1.3 * drawn[2000]


def test_lengths_can_be_those_of_a_trace() -> None:
    curve = DayCurve(0.01, 10.0)
    first = day_trace(curve, seed=1)
    again = day_trace(curve, like=first, seed=2)
    known = {(one.num_prompt, one.num_output) for one in first.requests}
    assert {(one.num_prompt, one.num_output) for one in again.requests} <= known


def test_a_conversation_begins_with_what_was_said_and_keeps_the_days_load() -> None:
    curve = DayCurve(0.05, 10.0)
    trace = day_trace(curve, prompts=Lengths(200.0, 0.5, 16_384), turns=4.0, seed=2)
    assert len(trace.requests) == pytest.approx(86_400 * 0.05 * 5.5, rel=0.1)
    times = [one.arrival_s for one in trace.requests]
    assert times == sorted(times)
    conversations = defaultdict(list)
    for one in trace.requests:
        assert len(one.block_ids) == -(-one.num_prompt // trace.block_tokens)
        conversations[one.session].append(one)
    assert max(map(len, conversations.values())) > 4
    for turns in conversations.values():
        for before, after in pairwise(turns):
            full = before.num_prompt // trace.block_tokens
            assert after.num_prompt > before.num_prompt + before.num_output
            assert after.block_ids[:full] == before.block_ids[:full]
            assert after.block_ids[full] != before.block_ids[full:][:1]


def test_conversations_share_nothing_with_each_other() -> None:
    seen: dict[int, str] = {}
    for one in day_trace(DayCurve(0.01, 10.0), turns=3.0, seed=1).requests:
        for block in one.block_ids:
            assert seen.setdefault(block, one.session) == one.session


def test_the_oracle_takes_the_fewest_replicas_that_do() -> None:
    chance = random.Random(7)
    curve = DayCurve(0.05, 10.0, seconds=4 * HOUR_S)
    work = [(at_s, chance.expovariate(1 / 8.0)) for at_s in arrivals(curve, chance)]

    def share_kept(schedule: Schedule) -> float:
        return _share_within(work, schedule, objective_s=60.0)

    best = oracle_schedule(work, share_kept, steps=8)
    assert share_kept(best) >= 0.99
    assert share_kept(Schedule(best.interval_s, [max(1, n - 1) for n in best.replicas])) < 0.99
    assert sum(seconds for _, seconds in work) < best.replica_hours * HOUR_S
    assert best(0.0) == 1
    assert max(best.replicas) >= 4


def test_an_objective_out_of_reach_has_no_oracle() -> None:
    with pytest.raises(ValueError, match="99%"):
        oracle_schedule([(0.0, 5.0)], lambda _: 0.5)


def _share_within(work: list[tuple[float, float]], schedule: Schedule, *, objective_s: float) -> float:
    """One line, served by as many as the schedule says."""
    free = [0.0] * schedule(0.0)
    kept = 0
    for at_s, seconds in work:
        while len(free) < schedule(at_s):
            heapq.heappush(free, at_s)
        while len(free) > schedule(at_s):
            heapq.heappop(free)
        done_s = max(at_s, free[0]) + seconds
        heapq.heapreplace(free, done_s)
        kept += done_s - at_s <= objective_s
    return kept / len(work)
