"""What each replica's engine does: steps, memory, the phases of requests, drafts."""

from __future__ import annotations

from monitoring.grafana import Dashboard, Panel, Query, Row
from monitoring.overview import percentiles
from monitoring.query import Expr, mean, quantile, rate, ratio, total, value
from shoal.cluster import metrics
from shoal.cluster.metrics import Metric

ENGINE = ("model_name", "engine")
NAME = "{{model_name}} {{engine}}"
POSITION = ("position",)


def each(expr: Expr) -> tuple[Query, ...]:
    """One line per engine."""
    return (Query(expr, NAME),)


def phase(title: str, metric: Metric) -> Panel:
    return Panel(title, "s", (Query(quantile(0.5, metric, ENGINE), f"p50 {NAME}"),
                              Query(quantile(0.99, metric, ENGINE), f"p99 {NAME}")), width=6)  # fmt: skip


STEPS = Row("Steps", (
    Panel("Steps", "suffix: /s", each(rate(metrics.STEPS, ENGINE))),
    Panel("Seconds per step", "s", each(ratio(rate(metrics.STEP_SECONDS, ENGINE), rate(metrics.STEPS, ENGINE)))),
    Panel("Time spent in steps", "percentunit", each(rate(metrics.STEP_SECONDS, ENGINE)),
          "1: the engine never waits for work.", maximum=1),
    Panel("Requests running", "short", each(value(metrics.RUNNING))),
    Panel("Requests waiting", "short", each(value(metrics.WAITING))),
    Panel("Waiting for", "short",
          (Query(total(value(metrics.WAITING_BY_REASON), (*ENGINE, "reason")), f"{{{{reason}}}} {NAME}"),),
          is_stacked=True),
    Panel("Time in which nobody was let in", "percentunit",
          (Query(rate(metrics.HELD_SECONDS, (*ENGINE, "reason")), f"{{{{reason}}}} {NAME}"),),
          "Requests waited meanwhile.", is_stacked=True),
    Panel("Batch size", "short", (
        Query(mean(metrics.STEP_OUTPUTS, ENGINE), f"mean {NAME}"),
        Query(quantile(0.95, metrics.STEP_OUTPUTS, ENGINE), f"p95 {NAME}"),
    )),
    Panel("Tokens in", "suffix: tok/s", each(rate(metrics.PROMPT_TOKENS, ENGINE))),
    Panel("Tokens out", "suffix: tok/s", each(rate(metrics.GENERATION_TOKENS, ENGINE))),
    Panel("Requests finished", "reqps", each(rate(metrics.REQUEST_SUCCESS, ENGINE))),
))  # fmt: skip

MEMORY = Row("KV memory", (
    Panel("KV blocks in use", "percentunit", each(value(metrics.KV_USAGE)), maximum=1,
          thresholds=((0.85, "orange"), (0.95, "red"))),
    Panel("Preemptions", "suffix: /s", each(rate(metrics.PREEMPTIONS, ENGINE))),
    Panel("Preemptions of a request", "short", each(mean(metrics.REQUEST_PREEMPTIONS, ENGINE)), "Mean."),
    Panel("Prefix cache hits", "percentunit",
          each(ratio(rate(metrics.PREFIX_HITS, ENGINE), rate(metrics.PREFIX_QUERIES, ENGINE))), maximum=1),
    Panel("KV pool", "short",
          (Query(value(metrics.CACHE_CONFIG), f"{NAME}: {{{{num_gpu_blocks}}}} blocks of {{{{block_size}}}} tokens"),),
          kind="stat", width=16),
))  # fmt: skip

PHASES = Row("Phases of a request", (
    phase("Waiting", metrics.QUEUE_TIME),
    phase("Prompt", metrics.PREFILL_TIME),
    phase("Tokens", metrics.DECODE_TIME),
    phase("Prompt and tokens", metrics.INFERENCE_TIME),
    Panel("Time to first token", "s", each(quantile(0.99, metrics.TTFT, ENGINE)), "p99."),
    Panel("Time per token", "s", each(quantile(0.99, metrics.ITL, ENGINE)), "p99."),
    Panel("End to end", "s", each(quantile(0.99, metrics.E2E, ENGINE)), "p99."),
))  # fmt: skip

SIZES = Row("Sizes of requests", (
    Panel("Prompt", "suffix: tok", percentiles(metrics.REQUEST_PROMPT), width=6),
    Panel("Answer", "suffix: tok", percentiles(metrics.REQUEST_GENERATION), width=6),
    Panel("max_tokens asked for", "suffix: tok", percentiles(metrics.PARAMS_MAX_TOKENS), width=6),
    Panel("Samples asked for", "short", (Query(mean(metrics.PARAMS_N), "mean"),), width=6),
))  # fmt: skip

DRAFTS = Row("Drafts", (
    Panel("Accepted", "percentunit",
          each(ratio(rate(metrics.SPEC_ACCEPTED, ENGINE), rate(metrics.SPEC_DRAFT_TOKENS, ENGINE))), maximum=1),
    Panel("Accepted by position", "percentunit",
          (Query(ratio(rate(metrics.SPEC_ACCEPTED_AT, POSITION), rate(metrics.SPEC_DRAFTS)), "{{position}}"),),
          "Of steps with drafts, the share in which the one at this position was accepted; the first one is 0.",
          kind="bargauge", maximum=1),
    Panel("Drafted in a step", "suffix: tok",
          each(ratio(rate(metrics.SPEC_DRAFT_TOKENS, ENGINE), rate(metrics.SPEC_DRAFTS, ENGINE))), "Mean."),
))  # fmt: skip

REST = Row("Trouble and cost", (
    Panel("Step messages dropped", "suffix: /s", each(rate(metrics.MESSAGES_DROPPED, ENGINE)),
          "More than none: a gateway hangs, and its calls fail.", width=12),
    Panel("Cost of an hour", "currencyUSD", each(rate(metrics.COST, ENGINE) * 3600), width=12),
))  # fmt: skip

ENGINES = Dashboard(
    "shoal-engines", "Shoal / Engines", "What each replica's engine does.",
    (STEPS, MEMORY, PHASES, SIZES, DRAFTS, REST),
)  # fmt: skip
