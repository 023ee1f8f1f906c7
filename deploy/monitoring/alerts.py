"""What somebody is told or woken for. deploy/prometheus/RUNBOOK.md says what to do then."""

from __future__ import annotations

from collections.abc import Mapping

from monitoring.objectives import Objectives
from monitoring.query import (
    CLUSTER,
    Expr,
    Recording,
    above,
    below,
    both,
    equal,
    increase,
    largest,
    mean_before,
    quantile,
    rate,
    ratio,
    recorded,
    share_within,
    slope,
    total,
    value,
    vanished,
)
from monitoring.rules import Alert
from shoal.cluster import metrics
from shoal.cluster.metrics import Metric

MODEL = (*CLUSTER, "model_name")
ENGINE = (*MODEL, "engine")
DAY_BEFORE = {"over": "1d", "offset": "1h"}

FIRST_TOKEN = tuple(
    Recording(f"shoal:ttft_seconds:p{q * 100:g}_5m", quantile(q, metrics.TTFT, MODEL, over="5m"))
    for q in (0.5, 0.95, 0.99)
)
NEXT_TOKEN = tuple(
    Recording(f"shoal:itl_seconds:p{q * 100:g}_5m", quantile(q, metrics.ITL, MODEL, over="5m"))
    for q in (0.5, 0.95, 0.99)
)
WAITING = Recording(
    "shoal:requests_waiting:sum",
    total(value(metrics.WAITING), MODEL) + total(value(metrics.GATEWAY_WAITING), MODEL),
)
HITS = Recording(
    "shoal:prefix_cache_hits:ratio_30m",
    ratio(rate(metrics.PREFIX_HITS, MODEL, over="30m"), rate(metrics.PREFIX_QUERIES, MODEL, over="30m")),
)
ACCEPTED = Recording(
    "shoal:drafts_accepted:ratio_30m",
    ratio(rate(metrics.SPEC_ACCEPTED, MODEL, over="30m"), rate(metrics.SPEC_DRAFT_TOKENS, MODEL, over="30m")),
)
REFUSED = Recording(
    "shoal:calls_refused:ratio_5m",
    ratio(
        rate(metrics.REQUESTS_REFUSED, MODEL, over="5m"),
        rate(metrics.REQUESTS_REFUSED, MODEL, over="5m") + rate(metrics.ROUTING_DECISIONS, MODEL, over="5m"),
    ),
)
FAILED = Recording(
    "shoal:http_failed:ratio_5m",
    ratio(
        rate(metrics.HTTP_REQUESTS, CLUSTER, over="5m", where={"status": "5.."}),
        rate(metrics.HTTP_REQUESTS, CLUSTER, over="5m"),
    ),
)
COST = Recording("shoal:cost_usd:per_hour_1h", rate(metrics.COST, MODEL, over="1h") * 3600)
MILLION_TOKENS = Recording(
    "shoal:cost_usd:per_million_tokens_1h",
    ratio(rate(metrics.COST, MODEL, over="1h"), rate(metrics.GENERATION_TOKENS, MODEL, over="1h")) * 1e6,
)


class BurnRate:
    """An objective that a share of observations may miss, and how fast that allowance is used up.

    At rate 1 it lasts for as long as it was meant. The fast rule sees 2 % of a month's allowance go within an hour, the
    slow one 5 % within six. Each also looks at a short window, so that an alert ends soon after its cause
    (The Site Reliability Workbook, chapter 5).
    """

    FAST = ("5m", "1h", 14.4)
    SLOW = ("30m", "6h", 6.0)

    def __init__(self, name: str, metric: Metric, bound_s: float, share: float) -> None:
        self._allowed = 1 - share
        self._late = {
            window: Recording(
                f"shoal:{name}_late:ratio_{window}", 1 - share_within(metric, bound_s, MODEL, over=window)
            )
            for window in (*self.FAST[:2], *self.SLOW[:2])
        }

    @property
    def recordings(self) -> tuple[Recording, ...]:
        return tuple(self._late.values())

    def faster_than(self, short: str, long: str, times: float) -> Expr:
        bound = times * self._allowed
        return both(above(recorded(self._late[short]), bound), above(recorded(self._late[long]), bound))


def recordings(objectives: Objectives) -> Mapping[str, tuple[Recording, ...]]:
    """By group."""
    return {
        "shoal.latency": (*FIRST_TOKEN, *NEXT_TOKEN),
        "shoal.objectives": (*_first(objectives).recordings, *_next(objectives).recordings),
        "shoal.load": (WAITING, HITS, ACCEPTED, REFUSED, FAILED),
        "shoal.cost": (COST, MILLION_TOKENS),
    }


def alerts(objectives: Objectives) -> Mapping[str, tuple[Alert, ...]]:
    """By group."""
    return {
        "shoal.alerts.availability": AVAILABILITY,
        "shoal.alerts.latency": _latency(objectives),
        "shoal.alerts.capacity": CAPACITY,
        "shoal.alerts.efficiency": EFFICIENCY,
    }


def _first(objectives: Objectives) -> BurnRate:
    return BurnRate("ttft", metrics.TTFT, objectives.ttft_s, objectives.share)


def _next(objectives: Objectives) -> BurnRate:
    return BurnRate("itl", metrics.ITL, objectives.itl_s, objectives.share)


def _restarts(over: str) -> Expr:
    """Every gateway counts the same ones."""
    return largest(increase(metrics.GROUP_RESTARTS, (*MODEL, "gateway"), over=over), MODEL)


AVAILABILITY = (
    Alert(
        "ShoalNotScraped", vanished(metrics.HTTP_OPEN, CLUSTER, within="1h"), "3m", "critical",
        "Nothing is heard of Shoal",
        "No gateway of {{ $labels.job }} has been seen for 3 minutes, and one was within the last hour. "
        "After that hour this alert ends by itself.",
    ),
    Alert(
        "ShoalNoReplicaAnswers", equal(largest(value(metrics.REPLICAS), MODEL), 0), "2m", "critical",
        "No replica of {{ $labels.model_name }} answers",
        "For 2 minutes no replica of {{ $labels.model_name }} has answered for its metrics: calls wait or fail.",
    ),
    Alert(
        "ShoalGatewaySilent", above(largest(value(metrics.GATEWAYS_SILENT), CLUSTER), 0), "5m", "warning",
        "{{ $value }} gateways of {{ $labels.job }} do not answer for their metrics",
        "What is shown of {{ $labels.job }} lacks these gateways, and their users may get no answers.",
    ),
    Alert(
        "ShoalKeysFileBroken", above(largest(value(metrics.AUTH_RELOAD_FAILED), (*CLUSTER, "gateway")), 0),
        "2m", "warning",
        "Gateway {{ $labels.gateway }} cannot use the keys file",
        "The keys of the last file that was right hold: what was added since is refused, what was revoked is let in.",
    ),
    Alert(
        "ShoalRequestsFail", above(recorded(FAILED), 0.02), "5m", "critical",
        "{{ $value | humanizePercentage }} of HTTP requests fail",
        "{{ $value | humanizePercentage }} of answers of {{ $labels.job }} had a status of 500 or more.",
    ),
    Alert(
        "ShoalGroupRestarted", above(_restarts("15m"), 0),
        "0m", "warning",
        "A group of {{ $labels.model_name }} has restarted",
        "A rank of a replica of {{ $labels.model_name }} died or hung during the last 15 minutes; the requests that "
        "its group was running failed.",
    ),
    Alert(
        "ShoalGroupsKeepRestarting", above(_restarts("1h"), 2.5),
        "0m", "critical",
        "Groups of {{ $labels.model_name }} keep restarting",
        "{{ $value | printf \"%.0f\" }} restarts of groups of {{ $labels.model_name }} within an hour.",
    ),
)  # fmt: skip

CAPACITY = (
    Alert(
        "ShoalQueueGrows", both(above(recorded(WAITING), 10), above(slope(WAITING, over="10m"), 0)), "10m", "warning",
        "{{ $value | printf \"%.0f\" }} requests wait for {{ $labels.model_name }}, and they become more",
        "The queue of {{ $labels.model_name }} has grown for 10 minutes: more work comes in than is done.",
    ),
    Alert(
        "ShoalKvFull",
        both(
            above(largest(value(metrics.KV_USAGE), ENGINE), 0.95),
            above(rate(metrics.PREEMPTIONS, ENGINE, over="10m"), 0),
        ),
        "10m", "warning",
        "KV memory of {{ $labels.model_name }} {{ $labels.engine }} is full",
        "{{ $value | humanizePercentage }} of KV blocks are in use, and running requests lose theirs: they are "
        "computed again and come late.",
    ),
    Alert(
        "ShoalCallsRefused", above(recorded(REFUSED), 0.05), "10m", "warning",
        "{{ $value | humanizePercentage }} of calls to {{ $labels.model_name }} are refused",
        "Gateways refuse {{ $value | humanizePercentage }} of calls: the objective cannot be met, or too many "
        "are held.",
    ),
    Alert(
        "ShoalIndexStale", above(largest(value(metrics.INDEX_STALENESS), ENGINE), 60), "5m", "warning",
        "A gateway does not know what {{ $labels.model_name }} {{ $labels.engine }} has cached",
        "Events of this replica's cache have been missing for {{ $value | humanizeDuration }}: calls are routed by "
        "guesses, and more prompts are computed anew.",
    ),
)  # fmt: skip

EFFICIENCY = (
    Alert(
        "ShoalHitRateCollapsed",
        below(recorded(HITS), above(mean_before(HITS, **DAY_BEFORE), 0.1) * 0.5), "30m", "warning",
        "Prefix cache hits of {{ $labels.model_name }} fell to {{ $value | humanizePercentage }}",
        "Less than half of the share of the day before: prompts that were cached are computed again.",
    ),
    Alert(
        "ShoalDraftsWasted", below(recorded(ACCEPTED), 0.2), "30m", "warning",
        "Only {{ $value | humanizePercentage }} of drafts for {{ $labels.model_name }} are accepted",
        "Speculation computes tokens that are thrown away.",
    ),
    Alert(
        "ShoalCostUnusual", above(recorded(COST), mean_before(COST, **DAY_BEFORE) * 2), "30m", "warning",
        "{{ $labels.model_name }} costs {{ $value | printf \"%.2f\" }} dollars an hour",
        "More than twice of what it was on average during the day before.",
    ),
)  # fmt: skip


def _latency(objectives: Objectives) -> tuple[Alert, ...]:
    first, following = _first(objectives), _next(objectives)
    return (
        *_burning("ShoalFirstTokensLate", first, "First tokens of {{ $labels.model_name }} come late",
                  "{{ $value | humanizePercentage }} of requests waited longer than "
                  f"{objectives.ttft_s:g} s for their first token; {(1 - objectives.share) * 100:.3g} % may"),
        *_burning("ShoalTokensLate", following, "Tokens of {{ $labels.model_name }} come slowly",
                  "{{ $value | humanizePercentage }} of tokens came later than "
                  f"{objectives.itl_s * 1000:g} ms after the one before; {(1 - objectives.share) * 100:.3g} % may"),
    )  # fmt: skip


def _burning(name: str, burn: BurnRate, summary: str, description: str) -> tuple[Alert, Alert]:
    fast, slow = burn.faster_than(*burn.FAST), burn.faster_than(*burn.SLOW)
    return (
        Alert(
            name, fast, "2m", "critical", summary, f"{description}. A month's allowance lasts two days at this rate."
        ),
        Alert(
            name, slow, "15m", "warning", summary, f"{description}. A month's allowance lasts five days at this rate."
        ),
    )
