"""A query of what there is not fails when it is written, not on a dashboard that stays empty."""

from __future__ import annotations

import pytest
from monitoring import query
from monitoring.query import QueryError, Scope

from shoal.cluster import metrics
from shoal.cluster.metrics import Metric

NOWHERE = Scope({}, "5m")


def test_a_rate_is_of_the_counters_name_in_a_scrape() -> None:
    expr = query.rate(metrics.HTTP_REQUESTS, ("status",), where={"status": "5.."})
    assert expr.write(NOWHERE) == 'sum by (status) (rate(shoal:http_requests_total{status=~"5.."}[5m]))'
    assert expr.labels == {"status"}
    assert expr.metrics == {"shoal:http_requests"}


def test_variables_choose_only_where_the_metric_has_the_label() -> None:
    scope = Scope({"engine": "$engine", "gateway": "$gateway"}, "$__rate_interval")
    assert query.value(metrics.RUNNING).write(scope) == 'vllm:num_requests_running{engine=~"$engine"}'
    assert query.value(metrics.HTTP_OPEN).write(scope) == 'shoal:http_requests_open{gateway=~"$gateway"}'
    assert query.rate(metrics.STEPS).write(scope) == 'sum(rate(shoal:steps_total{engine=~"$engine"}[$__rate_interval]))'


def test_a_share_is_of_one_bucket() -> None:
    text = query.share_within(metrics.TTFT, 2.5).write(NOWHERE)
    of = "vllm:time_to_first_token_seconds"
    assert text == f'(sum(rate({of}_bucket{{le="2.5"}}[5m])) / (sum(rate({of}_count[5m])) > 0))'
    with pytest.raises(QueryError, match=r"no bucket up to 2\.6"):
        query.share_within(metrics.TTFT, 2.6)


def test_a_share_of_a_whole_without_some_labels_is_of_all_of_them() -> None:
    parts = query.rate(metrics.SPEC_ACCEPTED_AT, ("engine", "position"))
    text = query.ratio(parts, query.rate(metrics.SPEC_DRAFTS, ("engine",))).write(NOWHERE)
    assert " / ignoring (position) group_left () (" in text
    with pytest.raises(QueryError, match="nothing to divide by"):
        query.ratio(query.rate(metrics.SPEC_DRAFTS), parts)


def test_a_label_that_the_metric_lacks_is_refused() -> None:
    with pytest.raises(QueryError, match=r"no label \['gateway'\]"):
        query.rate(metrics.STEPS, ("gateway",))
    with pytest.raises(QueryError, match=r"no label \['colour'\]"):
        query.value(metrics.RUNNING, {"colour": "red"})
    with pytest.raises(QueryError, match="differ in labels"):
        query.total(query.value(metrics.RUNNING), ("engine",)) + query.total(query.value(metrics.WAITING))


def test_a_metric_of_another_kind_is_refused() -> None:
    with pytest.raises(QueryError, match="is a gauge, not a counter"):
        query.rate(metrics.RUNNING)
    with pytest.raises(QueryError, match="is a counter, not a gauge"):
        query.value(metrics.STEPS)
    with pytest.raises(QueryError, match="is a counter, not a histogram"):
        query.quantile(0.5, metrics.STEPS)


def test_a_metric_that_is_in_no_list_is_refused() -> None:
    with pytest.raises(QueryError, match="in none of the lists"):
        query.value(Metric("shoal:forgotten", "gauge", "Nobody renders it."))
