"""Figures of a comparison, from results made by hand."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from statistics import quantiles

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.cluster.simulation.plots import busiest_shares, replica_counts, save_plots
from shoal.cluster.simulation.profile import HardwareProfile, parse_profile
from shoal.cluster.simulation.reference import pooled_hit_rate
from shoal.cluster.simulation.report import Comparison, PolicyReport, make_report, quantile
from shoal.cluster.simulation.result import Objectives, ReplicaTime, Served, SimulationResult
from shoal.cluster.simulation.trace import Trace, TracedRequest
from shoal.engine.config import ConfigError

RATES = {"base": 0.01, "per_prefill_token": 1e-4, "per_decode_token": 0, "per_context_token": 0}
PROFILE = parse_profile({"kv_tokens": 100, "step_s": RATES, "usd_per_hour": 36.0})
REFUSED = Served.refused(TracedRequest(7.0, 1000, 10, ()))


def served(ttft_s: float, *, arrival_s: float = 0.0, tpot_s: float = 0.1, num_output: int = 11, cached: int = 25,
           replica: int = 0) -> Served:  # fmt: skip
    finished_s = arrival_s + ttft_s + tpot_s * (num_output - 1)
    return Served(arrival_s, 100, num_output, ttft_s, finished_s, cached, replica)


def result(*requests: Served, span_s: float = 100.0, replicas: list[ReplicaTime] | None = None) -> SimulationResult:
    return SimulationResult(requests, replicas or [ReplicaTime(0.0, span_s)], 2.0, span_s)


def report(*requests: Served, objectives: Objectives | None = None, profile: HardwareProfile = PROFILE) -> PolicyReport:
    return make_report(result(*requests), objectives or Objectives(), profile)


def test_times_are_those_of_what_was_served() -> None:
    made = report(*(served(ttft) for ttft in (4.0, 1.0, 2.0, 3.0)), REFUSED)
    assert (made.ttft_mean_s, made.ttft_p50_s, made.rejected) == (2.5, 2.5, 1)
    assert made.ttft_p99_s == pytest.approx(3.97)
    assert made.tpot_p99_s == pytest.approx(0.1)
    assert made.hit_rate == 0.25
    assert made.speedup == 50.0


def test_hits_count_by_tokens() -> None:
    assert report(served(1.0, cached=100), served(1.0, cached=0), served(1.0, cached=50)).hit_rate == 0.5


@pytest.mark.parametrize(
    ("objectives", "num_good"),
    [
        (Objectives(), 4),
        (Objectives(ttft_s=1.0), 3),
        (Objectives(tpot_s=0.1001), 3),
        (Objectives(ttft_s=1.0, tpot_s=0.1001), 2),
    ],
)
def test_goodput_is_what_met_every_objective_by_time_and_by_all(objectives: Objectives, num_good: int) -> None:
    made = report(
        served(0.5),
        served(1.0, num_output=1),  # has no time per token to miss
        served(1.1),
        served(0.9, tpot_s=0.2),
        REFUSED,
        objectives=objectives,
    )
    assert made.goodput == num_good / 100
    assert made.goodput_share == num_good / 5


def test_cost_is_of_all_replicas_by_generated_tokens() -> None:
    replicas = [ReplicaTime(0.0, 100.0), ReplicaTime(50.0, 100.0)]
    made = make_report(result(served(1.0), served(1.0), replicas=replicas), Objectives(), PROFILE)
    assert made.replica_hours == pytest.approx(150 / 3600)
    assert made.usd_per_million_tokens == pytest.approx(1.5 / 22 * 1e6)
    assert report(served(1.0), profile=replace(PROFILE, usd_per_hour=None)).usd_per_million_tokens is None


def test_where_nothing_was_served_there_is_nothing_to_tell() -> None:
    made = report(REFUSED)
    assert (made.hit_rate, made.ttft_mean_s, made.ttft_p99_s, made.tpot_p99_s) == (None, None, None, None)
    assert (made.goodput, made.rejected, made.usd_per_million_tokens) == (0.0, 1, None)


@given(st.lists(st.floats(0, 1e3), min_size=2, max_size=50))
def test_quantiles_are_those_of_the_standard_library(values: list[float]) -> None:
    values.sort()
    for share, expected in enumerate(quantiles(values, n=100, method="inclusive"), 1):
        assert quantile(values, share / 100) == pytest.approx(expected)


def test_json_has_what_programs_ask_for() -> None:
    trace = Trace("t", [TracedRequest(0.0, 20, 1, (0, 1)), TracedRequest(3.0, 21, 1, (0, 1, 2))], 10)
    comparison = Comparison(trace, 2, PROFILE, Objectives(ttft_s=1.0), {"round_robin": result(served(1.0))})
    data = json.loads(json.dumps(comparison.as_json(), allow_nan=False))
    assert (data["replicas"], data["hardware"], data["objective"]["ttft_s"]) == (2, "profile", 1.0)
    assert data["trace"] == {"name": "t", "num_requests": 2, "num_prompt_tokens": 41, "span_s": 3.0}
    assert data["reference"]["pooled_hit_rate"] == pytest.approx(20 / 41)
    assert {
        "hit_rate", "ttft_mean_s", "ttft_p50_s", "ttft_p99_s", "tpot_p99_s", "goodput", "rejected", "replica_hours",
        "usd_per_million_tokens",
    } <= data["policies"]["round_robin"].keys()  # fmt: skip


@st.composite
def traces(draw: st.DrawFn) -> Trace:
    """Prompts over two symbols a block, so that many begin alike; a block's id is its place in the tree."""
    prompts = draw(st.lists(st.tuples(st.text("ab", max_size=6), st.integers(1, 10)), min_size=1, max_size=25))
    ids: dict[str, int] = {}
    requests = []
    for number, (blocks, rest) in enumerate(prompts):
        whole = tuple(ids.setdefault(blocks[: end + 1], len(ids)) for end in range(len(blocks)))
        last = (1000 + number,) if rest < 10 else (ids.setdefault(blocks + "c", len(ids)),)
        requests.append(TracedRequest(float(number), 10 * len(blocks) + rest, 1, (*whole, *last)))
    return Trace("drawn", requests, 10)


@given(trace=traces(), capacity=st.integers(0, 12) | st.just(math.inf))
def test_the_pooled_cache_is_an_lru_list(trace: Trace, capacity: float) -> None:
    """Against a plain list, the latest first."""
    cached: list[int] = []
    num_hit = 0
    for request in trace.requests:
        whole = list(request.block_ids[: request.num_prompt // 10])
        hits = 0
        while hits < len(whole) and whole[hits] in cached and (hits + 1) * 10 < request.num_prompt:
            hits += 1
        num_hit += hits
        cached = whole + [block for block in cached if block not in whole]
        cached = cached[: len(cached) if capacity == math.inf else int(capacity)]
    total = sum(request.num_prompt for request in trace.requests)
    assert pooled_hit_rate(trace, capacity * 10 + 9) == num_hit * 10 / total


@given(trace=traces(), capacity=st.integers(0, 100))
def test_no_pool_hits_more_than_one_without_bounds(trace: Trace, capacity: int) -> None:
    assert pooled_hit_rate(trace, capacity) <= pooled_hit_rate(trace) < 1


def test_balance_compares_the_busiest_with_the_mean_of_those_there() -> None:
    played = result(
        served(1.0, arrival_s=1.0, cached=0, replica=0),
        served(1.0, arrival_s=2.0, cached=0, replica=0),
        served(1.0, arrival_s=2.0, cached=50, replica=1),
        served(1.0, arrival_s=59.5, cached=0, replica=1),
        served(1.0, arrival_s=59.5, cached=100, replica=0),
        REFUSED,
        span_s=60.0,
        replicas=[ReplicaTime(0.0, 60.0), ReplicaTime(2.0, 60.0), ReplicaTime(59.0, 60.0)],
    )
    assert busiest_shares(played) == pytest.approx([1.0, 4 / 3, 3.0])


def test_replicas_are_counted_from_start_to_stop() -> None:
    times = [ReplicaTime(0.0, 60.0), ReplicaTime(0.0, 40.0), ReplicaTime(20.0, 60.0), ReplicaTime(40.0, 60.0)]
    assert replica_counts(result(span_s=60.0, replicas=times)) == [(0.0, 2), (20.0, 3), (40.0, 3), (60.0, 3)]
    assert replica_counts(result(span_s=60.0)) == [(0.0, 1), (60.0, 1)]


def test_a_picture_of_replicas_that_come_and_go_is_drawn(tmp_path: Path) -> None:
    scaled = result(served(1.0), REFUSED, replicas=[ReplicaTime(0.0, 100.0), ReplicaTime(50.0, 70.0)])
    trace = Trace("t", [TracedRequest(0.0, 100, 11, (0,))], 100)
    save_plots(Comparison(trace, 1, PROFILE, Objectives(ttft_s=1.0), {"prefix_aware": scaled}), tmp_path / "plot.svg")
    assert (tmp_path / "plot.svg").stat().st_size > 1000


def test_where_a_picture_cannot_be_written_is_said(tmp_path: Path) -> None:
    trace = Trace("t", [TracedRequest(0.0, 100, 11, (0,))], 100)
    comparison = Comparison(trace, 1, PROFILE, Objectives(), {"prefix_aware": result(served(1.0))})
    with pytest.raises(ConfigError, match="cannot write"):
        save_plots(comparison, tmp_path / "absent" / "plot.svg")
