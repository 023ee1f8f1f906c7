"""Metrics: names that existing dashboards know, one valid exposition of many replicas, values that add up."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from shoal.cluster import metrics
from shoal.cluster.metrics import Distribution, Histogram, HttpMetrics, ReplicaMetrics, Snapshot, render
from shoal.engine.request import (
    DraftCounts,
    EngineStats,
    FinishReason,
    Request,
    RequestId,
    RequestOutput,
    RequestTimes,
    SamplingParams,
)

VLLM_NAMES = (
    "vllm:num_requests_running",
    "vllm:num_requests_waiting",
    "vllm:kv_cache_usage_perc",
    "vllm:prefix_cache_queries",
    "vllm:prefix_cache_hits",
    "vllm:num_preemptions",
    "vllm:prompt_tokens",
    "vllm:generation_tokens",
    "vllm:request_success",
    "vllm:time_to_first_token_seconds",
    "vllm:inter_token_latency_seconds",
    "vllm:e2e_request_latency_seconds",
    "vllm:request_queue_time_seconds",
    "vllm:request_prefill_time_seconds",
    "vllm:request_decode_time_seconds",
    "vllm:request_inference_time_seconds",
    "vllm:request_prompt_tokens",
    "vllm:request_generation_tokens",
    "vllm:request_params_n",
    "vllm:request_params_max_tokens",
    "vllm:spec_decode_num_drafts",
    "vllm:spec_decode_num_draft_tokens",
    "vllm:spec_decode_num_accepted_tokens",
    "vllm:cache_config_info",
)


def request(name: str, arrival_s: float = 0.0) -> Request:
    params = SamplingParams(max_tokens=8)
    return Request(RequestId(name), (1, 2, 3), params, seed=1, arrival_s=arrival_s)


def times(start: float) -> RequestTimes:
    return RequestTimes(
        arrival_s=start,
        admitted_s=start + 1,
        first_token_s=start + 3,
        finished_s=start + 7,
        num_prompt_tokens=3,
        num_output_tokens=2,
        num_cached_tokens=0,
        num_preemptions=0,
        max_tokens=8,
    )


def value(snapshot: Snapshot, metric: metrics.Metric, *labels: str) -> float | Distribution:
    return next(point.value for point in snapshot if (point.metric, point.labels) == (metric.name, labels))


def histogram(snapshot: Snapshot, metric: metrics.Metric) -> Distribution:
    found = value(snapshot, metric)
    assert isinstance(found, Distribution)
    return found


def test_vllm_dashboards_find_their_names() -> None:
    text = render({("m", "0"): ReplicaMetrics().snapshot(EngineStats())})
    families = {family.name for family in text_string_to_metric_families(text)}
    assert set(VLLM_NAMES) <= families


def test_labels_are_those_of_vllm() -> None:
    text = render({("m", "0"): ReplicaMetrics().snapshot(EngineStats(num_running=3, num_blocks=9, block_size=16))})
    assert 'vllm:num_requests_running{engine="0",model_name="m"} 3.0' in text
    assert 'vllm:cache_config_info{block_size="16",engine="0",model_name="m",num_gpu_blocks="9"} 1.0' in text
    assert 'vllm:request_success_total{engine="0",finished_reason="stop",model_name="m"} 0.0' in text


def test_drafts_are_counted_by_position() -> None:
    drafts = DraftCounts(1, 3, (1, 1, 0)) + DraftCounts(1, 2, (1, 0))
    text = render({("m", "0"): ReplicaMetrics().snapshot(EngineStats(drafts=drafts))})
    of = 'engine="0",model_name="m"'
    assert f"vllm:spec_decode_num_drafts_total{{{of}}} 2.0" in text
    assert f"vllm:spec_decode_num_draft_tokens_total{{{of}}} 5.0" in text
    assert f"vllm:spec_decode_num_accepted_tokens_total{{{of}}} 3.0" in text
    for position, count in enumerate((2.0, 1.0, 0.0)):
        of = f'engine="0",model_name="m",position="{position}"'
        assert f"vllm:spec_decode_num_accepted_tokens_per_pos_total{{{of}}} {count}" in text


def test_many_replicas_make_one_family_each() -> None:
    snapshot = ReplicaMetrics().snapshot(EngineStats())
    text = render({(model, str(i)): snapshot for model in "ab" for i in range(3)}, {"0": HttpMetrics().snapshot()})
    types = [line for line in text.splitlines() if line.startswith("# TYPE")]
    assert len(types) == len(set(types))
    running = [line for line in text.splitlines() if line.startswith("vllm:num_requests_running{")]
    assert len(running) == 6


def test_a_request_is_measured_from_arrival_to_end() -> None:
    replica = ReplicaMetrics()
    now = time.monotonic()
    replica.start([request("a", now - 2.0)])
    replica.observe_step([RequestOutput(RequestId("a"), (5,))])
    replica.observe_step([RequestOutput(RequestId("a"), (6,), finish_reason=FinishReason.STOP, times=times(now))])
    snapshot = replica.snapshot(EngineStats())
    assert histogram(snapshot, metrics.TTFT).sum == pytest.approx(2.0, abs=0.1)
    assert sum(histogram(snapshot, metrics.ITL).counts) == 1
    expected = {metrics.E2E: 7, metrics.QUEUE_TIME: 1, metrics.PREFILL_TIME: 2, metrics.DECODE_TIME: 4,
                metrics.INFERENCE_TIME: 6, metrics.REQUEST_PROMPT: 3, metrics.REQUEST_GENERATION: 2}  # fmt: skip
    for metric, total in expected.items():
        assert histogram(snapshot, metric).sum == pytest.approx(total), metric.name
    assert value(snapshot, metrics.REQUEST_SUCCESS, "stop") == 1.0


def test_an_aborted_request_is_counted_once_and_leaves_nothing() -> None:
    replica = ReplicaMetrics()
    replica.start([request("a"), request("b")])
    replica.observe_step([RequestOutput(RequestId("a"), (5,))])
    replica.abort([RequestId("a"), RequestId("b")])
    replica.abort([RequestId("a")])
    replica.observe_step([RequestOutput(RequestId("a"), (), finish_reason=FinishReason.ABORT, times=times(0.0))])
    snapshot = replica.snapshot(EngineStats())
    assert value(snapshot, metrics.REQUEST_SUCCESS, "abort") == 2.0
    assert sum(histogram(snapshot, metrics.E2E).counts) == 0
    assert not replica._arrivals
    assert not replica._last_tokens


def test_a_refused_request_is_no_finished_one() -> None:
    replica = ReplicaMetrics()
    replica.start([request("a")])
    replica.discard([RequestId("a")])
    snapshot = replica.snapshot(EngineStats())
    assert all(value(snapshot, metrics.REQUEST_SUCCESS, reason.value) == 0.0 for reason in FinishReason)


def test_http_answers_are_counted_by_route() -> None:
    http = HttpMetrics()
    for status in (200, 200, 404):
        http.observe(handler="/v1/models", method="GET", status=status, seconds=0.2)
    text = render({}, {"1": http.snapshot()})
    assert 'shoal:http_requests_total{gateway="1",handler="/v1/models",method="GET",status="200"} 2.0' in text
    assert 'shoal:http_request_duration_seconds_count{gateway="1",handler="/v1/models",method="GET"} 3.0' in text


def test_every_name_is_listed_once() -> None:
    listed = (*metrics.REPLICA_METRICS, *metrics.GATEWAY_METRICS, *metrics.CLUSTER_METRICS)
    names = [metric.name for metric in listed]
    assert len(names) == len(set(names))
    assert all(name.startswith(("vllm:", "shoal:")) for name in names)


@given(st.lists(st.floats(0, 1000)))
def test_a_histogram_is_cumulative_and_complete(values: list[float]) -> None:
    histogram = Histogram(metrics.TTFT)
    for entry in values:
        histogram.add(entry)
    text = render({("m", "0"): (metrics.Point(metrics.TTFT.name, (), histogram.distribution()),)})
    family = next(iter(text_string_to_metric_families(text)))
    for sample in family.samples:
        if "le" in sample.labels:
            assert sample.value == sum(entry <= float(sample.labels["le"]) for entry in values)
        elif sample.name.endswith("_count"):
            assert sample.value == len(values)
        else:
            assert sample.value == pytest.approx(sum(values))
