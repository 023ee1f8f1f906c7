"""The first dashboard to look at: do users get answers, how fast, and at what cost."""

from __future__ import annotations

from monitoring.grafana import ITL_OBJECTIVE, TTFT_OBJECTIVE, Dashboard, Panel, Query, Row
from monitoring.query import By, Expr, increase, largest, quantile, rate, ratio, share_within, total, value
from shoal.cluster import metrics
from shoal.cluster.metrics import Metric

MODEL = ("model_name",)
FAILED = {"status": "5.."}
PERCENTILES = (0.5, 0.95, 0.99)


def percentiles(metric: Metric, by: By = (), percents: tuple[float, ...] = PERCENTILES) -> tuple[Query, ...]:
    names = " ".join(f"{{{{{label}}}}}" for label in by)
    return tuple(Query(quantile(q, metric, by), f"p{q * 100:g} {names}".rstrip()) for q in percents)


def failed_share(by: By = ()) -> Expr:
    """Of HTTP answers. None where nothing failed yet, as there is no series of a status before its first answer."""
    return ratio(rate(metrics.HTTP_REQUESTS, by, where=FAILED), rate(metrics.HTTP_REQUESTS, by))


def hourly_cost(by: By = ()) -> Expr:
    return rate(metrics.COST, by) * 3600


def cost_of_million(metric: Metric, by: By = ()) -> Expr:
    return ratio(rate(metrics.COST, by), rate(metric, by)) * 1e6


REPLICAS = largest(value(metrics.REPLICAS), MODEL)
RESTARTS = largest(increase(metrics.GROUP_RESTARTS, ("model_name", "gateway"), over="1h"), MODEL)
HIT_RATE = ratio(rate(metrics.PREFIX_HITS, MODEL), rate(metrics.PREFIX_QUERIES, MODEL))
ACCEPTANCE = ratio(rate(metrics.SPEC_ACCEPTED, MODEL), rate(metrics.SPEC_DRAFT_TOKENS, MODEL))

NOW = Row("Now", (
    Panel("Replicas", "short", (Query(REPLICAS, "{{model_name}}"),), "Red: nobody answers for this model.",
          kind="stat", width=3, height=4, base="red", thresholds=((1, "green"),)),
    Panel("HTTP requests", "reqps", (Query(rate(metrics.HTTP_REQUESTS)),), kind="stat", width=3, height=4),
    Panel("Tokens out", "suffix: tok/s", (Query(rate(metrics.GENERATION_TOKENS)),), kind="stat", width=3, height=4),
    Panel("First token in time", "percentunit", (Query(share_within(metrics.TTFT, TTFT_OBJECTIVE)),),
          "Goodput: share of requests within the objective chosen above.",
          kind="stat", width=3, height=4, base="red", thresholds=((0.95, "orange"), (0.99, "green"))),
    Panel("First token, p99", "s", (Query(quantile(0.99, metrics.TTFT)),), kind="stat", width=3, height=4),
    Panel("Failed", "percentunit", (Query(failed_share()),), "Share of answers with a status of 500 or more.",
          kind="stat", width=3, height=4, without="0 %", thresholds=((0.001, "orange"), (0.02, "red"))),
    Panel("Cost of an hour", "currencyUSD", (Query(hourly_cost()),), "Of models that have usd_per_hour.",
          kind="stat", width=3, height=4),
    Panel("Cost of a million tokens out", "currencyUSD", (Query(cost_of_million(metrics.GENERATION_TOKENS)),),
          kind="stat", width=3, height=4),
))  # fmt: skip

TRAFFIC = Row("Traffic", (
    Panel("HTTP answers by status", "reqps", (Query(rate(metrics.HTTP_REQUESTS, ("status",)), "{{status}}"),),
          is_stacked=True),
    Panel("Requests finished", "reqps",
          (Query(rate(metrics.REQUEST_SUCCESS, ("finished_reason",)), "{{finished_reason}}"),),
          "`abort`: the client left; `error`: the replica failed.", is_stacked=True),
    Panel("Within the objectives", "percentunit", (
        Query(share_within(metrics.TTFT, TTFT_OBJECTIVE, MODEL), "first token, {{model_name}}"),
        Query(share_within(metrics.ITL, ITL_OBJECTIVE, MODEL), "next token, {{model_name}}"),
    ), "Goodput: share of requests whose first token, and of tokens that, came within the objective chosen above.",
        maximum=1),
    Panel("Tokens", "suffix: tok/s", (
        Query(rate(metrics.PROMPT_TOKENS, MODEL), "in, {{model_name}}"),
        Query(rate(metrics.GENERATION_TOKENS, MODEL), "out, {{model_name}}"),
    )),
    Panel("Replicas reporting", "short", (Query(REPLICAS, "{{model_name}}"),)),
    Panel("Group restarts", "short", (Query(RESTARTS, "{{model_name}}"),),
          "Within an hour. A group starts anew when a rank of it died or hung; its running requests fail.",
          thresholds=((3, "red"),)),
))  # fmt: skip

LATENCY = Row("Latency", (
    Panel("Time to first token", "s", percentiles(metrics.TTFT)),
    Panel("Time per token", "s", percentiles(metrics.ITL), "A step may bring a request several tokens."),
    Panel("End to end", "s", percentiles(metrics.E2E)),
))  # fmt: skip

LOAD = Row("Load", (
    Panel("Requests running and waiting", "short", (
        Query(total(value(metrics.RUNNING), MODEL), "running, {{model_name}}"),
        Query(total(value(metrics.WAITING), MODEL), "waiting at replicas, {{model_name}}"),
        Query(total(value(metrics.GATEWAY_WAITING), MODEL), "held in gateways, {{model_name}}"),
    )),
    Panel("KV blocks in use", "percentunit", (
        Query(largest(value(metrics.KV_USAGE), MODEL), "fullest replica, {{model_name}}"),
    ), "Near 1, running requests lose their blocks and compute them again.", maximum=1,
        thresholds=((0.85, "orange"), (0.95, "red"))),
    Panel("Preemptions", "suffix: /s", (Query(rate(metrics.PREEMPTIONS, MODEL), "{{model_name}}"),)),
    Panel("Prefix cache hits", "percentunit", (Query(HIT_RATE, "{{model_name}}"),),
          "Share of prompt tokens that did not have to be computed.", maximum=1),
    Panel("Drafts accepted", "percentunit", (Query(ACCEPTANCE, "{{model_name}}"),),
          "Share of drafted tokens that the model confirmed. Low: speculation costs more than it brings.", maximum=1),
))  # fmt: skip

COST = Row("Cost", (
    Panel("Cost of an hour", "currencyUSD", (Query(hourly_cost(MODEL), "{{model_name}}"),), is_stacked=True, width=12),
    Panel("Cost of a million tokens", "currencyUSD", (
        Query(cost_of_million(metrics.GENERATION_TOKENS, MODEL), "out, {{model_name}}"),
        Query(cost_of_million(metrics.PROMPT_TOKENS, MODEL), "in, {{model_name}}"),
    ), "All cost over the tokens of one kind.", width=12),
))  # fmt: skip

OVERVIEW = Dashboard(
    "shoal-overview", "Shoal / Overview", "Do users get answers, how fast, and at what cost.",
    (NOW, TRAFFIC, LATENCY, LOAD, COST),
)  # fmt: skip
