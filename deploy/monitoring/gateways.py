"""HTTP, admission and routing: what happens to a call before a replica has it."""

from __future__ import annotations

from monitoring.grafana import Dashboard, Panel, Query, Row
from monitoring.overview import MODEL, failed_share, percentiles
from monitoring.query import largest, quantile, rate, ratio, total, value
from shoal.cluster import metrics

GATEWAY = ("gateway",)
HANDLER = ("handler", "method")
ENGINE = ("model_name", "engine")

HTTP = Row("HTTP", (
    Panel("Answers by handler", "reqps", (Query(rate(metrics.HTTP_REQUESTS, HANDLER), "{{method}} {{handler}}"),),
          is_stacked=True),
    Panel("Answers by status", "reqps", (Query(rate(metrics.HTTP_REQUESTS, ("status",)), "{{status}}"),),
          is_stacked=True),
    Panel("Failed", "percentunit", (Query(failed_share(HANDLER), "{{method}} {{handler}}"),),
          "Share of answers with a status of 500 or more.", thresholds=((0.02, "red"),)),
    Panel("Duration, p95", "s", (Query(quantile(0.95, metrics.HTTP_SECONDS, HANDLER), "{{method}} {{handler}}"),),
          "A stream lasts until its last token."),
    Panel("Answers by gateway", "reqps", (Query(rate(metrics.HTTP_REQUESTS, GATEWAY), "{{gateway}}"),)),
    Panel("Requests open", "short", (Query(total(value(metrics.HTTP_OPEN), GATEWAY), "{{gateway}}"),),
          is_stacked=True),
    Panel("Tokens", "suffix: tok/s",
          (Query(rate(metrics.GATEWAY_TOKENS, ("model_name", "kind")), "{{kind}}, {{model_name}}"),)),
    Panel("Gateways", "short", (
        Query(largest(value(metrics.GATEWAYS)), "reporting"),
        Query(largest(value(metrics.GATEWAYS_SILENT)), "silent"),
    )),
    Panel("Timelines for the trace collector", "suffix: /s", (Query(rate(metrics.TRACES, ("result",)), "{{result}}"),)),
))  # fmt: skip

TENANTS = Row("Tenants, where there are keys", (
    Panel("Requests let in", "reqps", (Query(rate(metrics.TENANT_REQUESTS, ("tenant",)), "{{tenant}}"),),
          is_stacked=True),
    Panel("Tokens by tenant", "suffix: tok/s",
          (Query(rate(metrics.TENANT_TOKENS, ("tenant", "kind")), "{{tenant}}, {{kind}}"),)),
    Panel("Refused for their key or its limits", "reqps",
          (Query(rate(metrics.AUTH_REFUSALS, ("reason",)), "{{reason}}"),), is_stacked=True),
    Panel("Keys in use", "short", (Query(largest(value(metrics.AUTH_KEYS), GATEWAY), "{{gateway}}"),), width=12),
    Panel("Keys file broken", "short", (Query(largest(value(metrics.AUTH_RELOAD_FAILED), GATEWAY), "{{gateway}}"),),
          "1: the file was changed and cannot be used; the keys before it hold.", width=12, maximum=1,
          thresholds=((1, "red"),)),
))  # fmt: skip

ADMISSION = Row("Admission", (
    Panel("Calls held", "short", (Query(value(metrics.GATEWAY_WAITING), "{{model_name}}, {{gateway}}"),)),
    Panel("Time held", "s", percentiles(metrics.GATEWAY_QUEUE_SECONDS)),
    Panel("Calls refused", "reqps",
          (Query(rate(metrics.REQUESTS_REFUSED, ("model_name", "reason")), "{{reason}}, {{model_name}}"),),
          "Rather no answer at once than a late one: more replicas, or a slower objective.", is_stacked=True),
))  # fmt: skip

ROUTING = Row("Routing", (
    Panel("Decisions", "reqps", (Query(rate(metrics.ROUTING_DECISIONS, ("reason",)), "{{reason}}"),),
          "`cached`: to the replica with the longest cached prefix; `elsewhere`: another one had a shorter queue; "
          "`new`: nobody had any of it.", is_stacked=True),
    Panel("Prompt tokens sent to where they are cached", "percentunit",
          (Query(ratio(rate(metrics.ROUTING_MATCHED_TOKENS, MODEL), rate(metrics.ROUTING_PROMPT_TOKENS, MODEL)),
                 "{{model_name}}"),), maximum=1),
    Panel("Time of a decision", "s",
          (Query(ratio(rate(metrics.ROUTING_SECONDS, MODEL), rate(metrics.ROUTING_DECISIONS, MODEL)),
                 "{{model_name}}"),), "Mean."),
    Panel("Prompt tokens routed", "suffix: tok/s",
          (Query(rate(metrics.ROUTING_PROMPT_TOKENS, MODEL), "{{model_name}}"),)),
    Panel("Blocks in the index", "short",
          (Query(largest(value(metrics.INDEX_BLOCKS), ENGINE), "{{model_name}} {{engine}}"),)),
    Panel("Age of the index", "s",
          (Query(largest(value(metrics.INDEX_STALENESS), ENGINE), "{{model_name}} {{engine}}"),),
          "Of the gateway that knows least.", thresholds=((60, "red"),)),
))  # fmt: skip

GATEWAYS = Dashboard(
    "shoal-gateways", "Shoal / Gateways and routing", "What happens to a call before a replica has it.",
    (HTTP, TENANTS, ADMISSION, ROUTING),
)  # fmt: skip
