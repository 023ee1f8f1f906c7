"""What the plots say between two measurements, from real snapshots: rates that are right and never negative."""

from __future__ import annotations

import itertools
from bisect import bisect_left
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from shoal.cluster.admin.cluster import Measured
from shoal.cluster.admin.history import QUANTILES, History, HistoryPoint, between, quantile
from shoal.cluster.metrics import GATEWAY_WAITING, HttpMetrics, Point, ReplicaMetrics
from shoal.engine.request import DraftCounts, EngineStats


def snapshot(**stats: Any) -> tuple[Point, ...]:
    return ReplicaMetrics().snapshot(EngineStats(**stats))


def measured(seconds: float, replicas: dict[str, Any], gateways: dict[str, Any] | None = None) -> Measured:
    return Measured(seconds, {"m": replicas}, gateways or {})


def test_rates_are_what_counters_grew_by_in_a_second() -> None:
    before = {label: snapshot(generation_tokens_total=100, prompt_tokens_total=50) for label in "01"}
    after = {label: snapshot(generation_tokens_total=160, prompt_tokens_total=70) for label in "01"}
    point = between(measured(10.0, before), measured(12.0, after))
    assert (point.all.output_tokens_per_s, point.all.prompt_tokens_per_s) == (60.0, 20.0)
    assert point.models["m"] == point.all
    assert point.seconds == 12.0


def test_a_replaced_replica_counts_from_zero() -> None:
    """Its label is that of the one before it, and its counters are not."""
    before = {"0": snapshot(generation_tokens_total=1000, prompt_tokens_total=10)}
    after = {"0": snapshot(generation_tokens_total=30, prompt_tokens_total=20)}
    point = between(measured(10.0, before), measured(12.0, after))
    assert (point.all.output_tokens_per_s, point.all.prompt_tokens_per_s) == (15.0, 10.0)


def test_a_replica_that_was_silent_makes_no_spike() -> None:
    before = {"0": snapshot(generation_tokens_total=5)}
    after = {"0": snapshot(generation_tokens_total=7), "1": snapshot(generation_tokens_total=10**6, num_running=3)}
    point = between(measured(0.0, before), measured(1.0, after))
    assert point.all.output_tokens_per_s == 2.0
    assert point.all.running == 3


def test_one_that_is_gone_takes_nothing_along() -> None:
    before = {"0": snapshot(generation_tokens_total=5), "1": snapshot(generation_tokens_total=10**6)}
    point = between(measured(0.0, before), measured(1.0, {"0": snapshot(generation_tokens_total=7)}))
    assert point.all.output_tokens_per_s == 2.0
    assert set(point.kv_usage) == {"m/0"}


def test_shares_are_of_the_period_and_unknown_where_nothing_happened() -> None:
    def at(cached: int, prompt: int, accepted: int, drafted: int) -> dict[str, Any]:
        drafts = DraftCounts(1, drafted, (accepted,))
        return {"0": snapshot(cached_tokens_total=cached, prompt_tokens_total=prompt, drafts=drafts)}

    before = measured(0.0, at(90, 100, 9, 10))
    point = between(before, measured(2.0, at(90 + 25, 100 + 100, 9 + 2, 10 + 8)))
    assert (point.all.hit_rate, point.all.acceptance_rate) == (0.25, 0.25)
    still = between(before, measured(2.0, at(90, 100, 9, 10)))
    assert (still.all.hit_rate, still.all.acceptance_rate, still.all.ttft_s) == (None, None, None)


def test_answers_are_counted_by_status_over_all_gateways_and_not_those_of_probes() -> None:
    gateways = {label: HttpMetrics() for label in "01"}
    before = measured(0.0, {}, {label: http.snapshot() for label, http in gateways.items()})
    for http in gateways.values():
        http.observe(handler="/v1/completions", method="POST", status=200, seconds=0.1)
        http.observe(handler="/health", method="GET", status=200, seconds=0.1)
    gateways["1"].observe(handler="/v1/completions", method="POST", status=429, seconds=0.1)
    after = measured(2.0, {}, {label: http.snapshot() for label, http in gateways.items()})
    assert between(before, after).requests_per_s == {"200": 1.0, "429": 0.5}


def test_calls_that_gateways_hold_are_those_of_all_of_them() -> None:
    gateways = {label: (Point(GATEWAY_WAITING.name, ("m",), 2.0),) for label in "01"}
    point = between(measured(0.0, {"0": snapshot()}), measured(1.0, {"0": snapshot(num_waiting=5)}, gateways))
    assert (point.all.held, point.models["m"].held, point.all.waiting) == (4.0, 4.0, 5)


def test_percentiles_are_those_of_the_period(admin: Any) -> None:
    replica = admin.cluster.replicas["smollm2"]["0"]
    for _ in range(1000):
        replica.answer(1, ttft_s=30.0)
    before = admin.cluster.pass_time()
    for _ in range(100):
        replica.answer(2, ttft_s=0.15)
    point = between(before, admin.cluster.pass_time())
    assert point.all.ttft_s is not None
    assert len(point.all.ttft_s) == len(QUANTILES)
    assert all(0.1 <= value <= 0.25 for value in point.all.ttft_s)


BOUNDS = (0.1, 0.5, 1.0, 5.0)


@given(st.lists(st.floats(0, 20), min_size=1), st.floats(0.01, 1))
def test_a_quantile_is_in_the_bucket_of_its_value(values: list[float], share: float) -> None:
    counts = [0] * (len(BOUNDS) + 1)
    for value in values:
        counts[bisect_left(BOUNDS, value)] += 1
    found = quantile(BOUNDS, counts, share)
    assert found is not None
    ranked = sorted(values)
    true = ranked[min(len(ranked) - 1, max(0, -int(-share * len(ranked) // 1) - 1))]
    bucket = bisect_left(BOUNDS, true)
    lower = BOUNDS[bucket - 1] if bucket else 0.0
    upper = BOUNDS[bucket] if bucket < len(BOUNDS) else BOUNDS[-1]
    assert lower - 1e-9 <= found <= upper + 1e-9


@given(st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 10**6)), min_size=2, max_size=8))
def test_no_rate_is_negative_whatever_counters_do(counts: list[tuple[int, int]]) -> None:
    states = [
        measured(float(second), {"0": snapshot(generation_tokens_total=output, prompt_tokens_total=prompt)})
        for second, (output, prompt) in enumerate(counts)
    ]
    for before, after in itertools.pairwise(states):
        figures = between(before, after).all
        assert figures.output_tokens_per_s >= 0
        assert figures.prompt_tokens_per_s >= 0


def test_half_an_hour_is_kept_and_told_from_where_the_reader_is() -> None:
    history = History(cluster=None, period_s=2.0)  # type: ignore[arg-type]
    for period in range(1000):
        history.add(measured(2.0 * period, {}))
    points = history.since(0.0)
    assert len(points) == 900
    assert points[-1].seconds == 2.0 * 999
    later: list[HistoryPoint] = history.since(points[-3].seconds)
    assert later == points[-2:]
    assert history.since(points[-1].seconds) == []
