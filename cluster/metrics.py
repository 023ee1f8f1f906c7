"""Every Prometheus name in one list, and how the values get from the replicas into one exposition.

Names are vLLM's where the meaning is the same, so that its dashboards work; ours begin with `shoal:`.
Replicas and gateways measure (`ReplicaMetrics`, `HttpMetrics`, ...); the admin port collects their snapshots and
renders them together (`render`).
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric as Family

from shoal.engine.request import EngineStats, FinishReason, Request, RequestId, RequestOutput, RequestTimes

_SECONDS = (0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0)
_TOKEN_SECONDS = (0.002, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 10.0)
_REQUEST_SECONDS = (0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 60.0, 120.0, 240.0, 480.0)
_TOKENS = tuple(float(scale * 10**power) for power in range(6) for scale in (1, 2, 5))
_PREEMPTIONS = (0.0, 1.0, 2.0, 5.0, 10.0, 20.0)
_SAMPLES = (1.0, 2.0, 5.0, 10.0, 20.0, 64.0)


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric: its name (a counter's without `_total`), kind, own labels and bucket bounds."""

    name: str
    kind: Literal["gauge", "counter", "histogram"]
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()


# Labels of every metric of a replica and of a gateway, before its own; those of the cluster have their own only.
REPLICA_LABELS = ("model_name", "engine")
GATEWAY_LABELS = ("gateway",)

# Of each replica.
RUNNING = Metric("vllm:num_requests_running", "gauge", "Requests that hold KV blocks.")
WAITING = Metric("vllm:num_requests_waiting", "gauge", "Requests waiting to be admitted.")
KV_USAGE = Metric("vllm:kv_cache_usage_perc", "gauge", "Share of KV blocks held by running requests, 0 to 1.")
CACHE_CONFIG = Metric("vllm:cache_config_info", "gauge", "Size of the KV pool.", ("block_size", "num_gpu_blocks"))
PREFIX_QUERIES = Metric("vllm:prefix_cache_queries", "counter", "Prompt tokens looked up in the prefix cache.")
PREFIX_HITS = Metric("vllm:prefix_cache_hits", "counter", "Prompt tokens found in the prefix cache.")
PREEMPTIONS = Metric("vllm:num_preemptions", "counter", "Times a running request lost its KV blocks.")
PROMPT_TOKENS = Metric("vllm:prompt_tokens", "counter", "Prompt tokens taken in.")
GENERATION_TOKENS = Metric("vllm:generation_tokens", "counter", "Tokens generated.")
REQUEST_SUCCESS = Metric("vllm:request_success", "counter", "Requests finished.", ("finished_reason",))
TTFT = Metric("vllm:time_to_first_token_seconds", "histogram", "From arrival to first token.", buckets=_SECONDS)
ITL = Metric("vllm:inter_token_latency_seconds", "histogram", "From step to step.", buckets=_TOKEN_SECONDS)
E2E = Metric("vllm:e2e_request_latency_seconds", "histogram", "From arrival to last token.", buckets=_REQUEST_SECONDS)
QUEUE_TIME = Metric(
    "vllm:request_queue_time_seconds", "histogram", "From arrival to admission.", buckets=_REQUEST_SECONDS
)
PREFILL_TIME = Metric(
    "vllm:request_prefill_time_seconds",
    "histogram",
    "From admission to first token.",
    buckets=_REQUEST_SECONDS,
)
DECODE_TIME = Metric(
    "vllm:request_decode_time_seconds", "histogram", "From first to last token.", buckets=_REQUEST_SECONDS
)
INFERENCE_TIME = Metric(
    "vllm:request_inference_time_seconds",
    "histogram",
    "From admission to last token.",
    buckets=_REQUEST_SECONDS,
)
REQUEST_PROMPT = Metric("vllm:request_prompt_tokens", "histogram", "Prompt tokens of a request.", buckets=_TOKENS)
REQUEST_GENERATION = Metric(
    "vllm:request_generation_tokens", "histogram", "Tokens generated for a request.", buckets=_TOKENS
)
SPEC_DRAFTS = Metric("vllm:spec_decode_num_drafts", "counter", "Steps in which a request had drafts.")
SPEC_DRAFT_TOKENS = Metric("vllm:spec_decode_num_draft_tokens", "counter", "Drafts, in tokens.")
SPEC_ACCEPTED = Metric("vllm:spec_decode_num_accepted_tokens", "counter", "Drafts that were accepted, in tokens.")
SPEC_ACCEPTED_AT = Metric(
    "vllm:spec_decode_num_accepted_tokens_per_pos", "counter", "Drafts that were accepted, the first ones at 0.",
    ("position",),
)  # fmt: skip
REQUEST_PREEMPTIONS = Metric(
    "vllm:request_num_preemptions", "histogram", "Times a request lost its KV blocks.", buckets=_PREEMPTIONS
)
WAITING_BY_REASON = Metric(
    "vllm:num_requests_waiting_by_reason", "gauge",
    "Requests waiting to be admitted: for capacity, or deferred until another sample has computed their prompt.",
    ("reason",),
)  # fmt: skip
HELD_SECONDS = Metric(
    "shoal:admission_held_seconds", "counter",
    "Seconds in which requests waited and none was admitted, by what the first in turn lacked: KV blocks, slots among "
    "those that run, tokens of a step, or the end of its own last step.",
    ("reason",),
)  # fmt: skip
COST = Metric("shoal:cost_usd", "counter", "Price of a replica by its usd_per_hour, from its start on.")
PARAMS_N = Metric("vllm:request_params_n", "histogram", "Samples asked for by a call.", buckets=_SAMPLES)
PARAMS_MAX_TOKENS = Metric("vllm:request_params_max_tokens", "histogram", "max_tokens of a request.", buckets=_TOKENS)
STEPS = Metric("shoal:steps", "counter", "Engine steps.")
STEP_SECONDS = Metric("shoal:step_seconds", "counter", "Seconds spent in engine steps.")
STEP_OUTPUTS = Metric(
    "shoal:step_outputs",
    "histogram",
    "Requests that got tokens in one step, per gateway.",
    buckets=_TOKENS[:12],
)
MESSAGES_DROPPED = Metric(
    "shoal:token_messages_dropped", "counter", "Step messages dropped because a gateway stopped reading."
)

# Of a gateway. The label gateway comes first.
GATEWAY_TOKENS = Metric(
    "shoal:gateway_tokens", "counter", "Tokens of calls of this gateway, a prompt's from its first token on.",
    ("model_name", "kind"),
)  # fmt: skip
GROUP_RESTARTS = Metric(
    "shoal:group_restarts", "counter",
    "Replica groups that were lost, and not taken down in order, as this gateway saw it: of several gateways take the "
    "largest.",
    ("model_name",),
)  # fmt: skip
TRACES = Metric("shoal:traces", "counter", "Timelines for the trace collector.", ("result",))
HTTP_REQUESTS = Metric("shoal:http_requests", "counter", "HTTP answers sent.", ("handler", "method", "status"))
HTTP_OPEN = Metric("shoal:http_requests_open", "gauge", "HTTP requests being answered.")
HTTP_SECONDS = Metric(
    "shoal:http_request_duration_seconds", "histogram", "From request to the end of its answer.",
    ("handler", "method"), _REQUEST_SECONDS,
)  # fmt: skip
GATEWAY_WAITING = Metric(
    "shoal:gateway_waiting", "gauge", "Calls held in this gateway until it is their turn.", ("model_name",)
)
GATEWAY_QUEUE_SECONDS = Metric(
    "shoal:gateway_queue_seconds", "histogram", "How long calls were held in a gateway.", ("model_name",), _SECONDS
)
REQUESTS_REFUSED = Metric(
    "shoal:requests_refused", "counter", "Calls refused because there was too much to do.", ("model_name", "reason")
)

# Of a gateway's API keys. Tenants are those of the keys file.
AUTH_REFUSALS = Metric(
    "shoal:auth_refusals", "counter", "Requests refused for their API key or its limits.", ("reason",)
)
AUTH_KEYS = Metric("shoal:auth_keys", "gauge", "API keys in use, of the last keys file that was right.")
AUTH_RELOAD_FAILED = Metric("shoal:auth_keys_file_broken", "gauge", "1 while the keys file cannot be used as it is.")
TENANT_REQUESTS = Metric("shoal:tenant_requests", "counter", "Requests let in for a tenant.", ("tenant",))
TENANT_TOKENS = Metric(
    "shoal:tenant_tokens", "counter",
    "Tokens of a tenant: prompt, cached (of the prompt, not computed again) and generated.",
    ("tenant", "model_name", "kind"),
)  # fmt: skip

# Of a gateway's routing. A decision is for the replica with the longest cached prefix, for another one though some had
# a longer, or new where nobody had any.
ROUTING_DECISIONS = Metric("shoal:routing_decisions", "counter", "Calls routed.", ("model_name", "reason"))
ROUTING_SECONDS = Metric("shoal:routing_decision_seconds", "counter", "Time spent deciding.", ("model_name",))
ROUTING_PROMPT_TOKENS = Metric("shoal:routing_prompt_tokens", "counter", "Prompt tokens routed.", ("model_name",))
ROUTING_MATCHED_TOKENS = Metric(
    "shoal:routing_matched_tokens", "counter", "Prompt tokens known to be cached where they were sent.", ("model_name",)
)
INDEX_BLOCKS = Metric(
    "shoal:prefix_index_blocks", "gauge", "Blocks known to be cached by a replica.", ("model_name", "engine")
)
INDEX_STALENESS = Metric(
    "shoal:prefix_index_staleness_seconds", "gauge", "Since all that a replica had cached was known.",
    ("model_name", "engine"),
)  # fmt: skip

# Of the cluster as a whole.
REPLICAS = Metric("shoal:replicas_reporting", "gauge", "Replicas that answered this scrape.", ("model_name",))
GATEWAYS = Metric("shoal:gateways_reporting", "gauge", "Gateways that answered this scrape.")
GATEWAYS_SILENT = Metric("shoal:gateways_silent", "gauge", "Gateways that were asked and did not answer this scrape.")

REPLICA_METRICS = (
    RUNNING, WAITING, KV_USAGE, CACHE_CONFIG, PREFIX_QUERIES, PREFIX_HITS, PREEMPTIONS, PROMPT_TOKENS,
    GENERATION_TOKENS, REQUEST_SUCCESS, TTFT, ITL, E2E, QUEUE_TIME, PREFILL_TIME, DECODE_TIME, INFERENCE_TIME,
    REQUEST_PROMPT, REQUEST_GENERATION, SPEC_DRAFTS, SPEC_DRAFT_TOKENS, SPEC_ACCEPTED, SPEC_ACCEPTED_AT, PARAMS_N,
    PARAMS_MAX_TOKENS, STEPS, STEP_SECONDS, STEP_OUTPUTS, MESSAGES_DROPPED, REQUEST_PREEMPTIONS, WAITING_BY_REASON,
    HELD_SECONDS, COST,
)  # fmt: skip
AUTH_METRICS = (AUTH_REFUSALS, AUTH_KEYS, AUTH_RELOAD_FAILED, TENANT_REQUESTS, TENANT_TOKENS)  # where there are keys
GATEWAY_METRICS = (
    HTTP_REQUESTS, HTTP_OPEN, HTTP_SECONDS, GATEWAY_WAITING, GATEWAY_QUEUE_SECONDS, REQUESTS_REFUSED,
    ROUTING_DECISIONS, ROUTING_SECONDS, ROUTING_PROMPT_TOKENS, ROUTING_MATCHED_TOKENS, INDEX_BLOCKS, INDEX_STALENESS,
    GATEWAY_TOKENS, GROUP_RESTARTS, TRACES,
)  # fmt: skip
CLUSTER_METRICS = (REPLICAS, GATEWAYS, GATEWAYS_SILENT)
METRICS = {metric.name: metric for metric in REPLICA_METRICS + GATEWAY_METRICS + AUTH_METRICS + CLUSTER_METRICS}


@dataclass(frozen=True, slots=True)
class Distribution:
    """A histogram's state: how many values fell in each bucket (the last one is open), and their sum."""

    counts: tuple[int, ...]
    sum: float


@dataclass(frozen=True, slots=True)
class Point:
    """A metric's value under one set of label values. Plain data: it crosses process borders."""

    metric: str
    labels: tuple[str, ...]
    value: float | Distribution


Snapshot: TypeAlias = tuple[Point, ...]


class Histogram:
    """Counts values by bucket: 0.3 us a value. One thread adds, any thread may read."""

    def __init__(self, metric: Metric) -> None:
        self._bounds = metric.buckets
        self._counts = [0] * (len(metric.buckets) + 1)
        self._sum = 0.0

    def add(self, value: float) -> None:
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def distribution(self) -> Distribution:
        return Distribution(tuple(self._counts), self._sum)


class ReplicaMetrics:
    """What a replica measures of its requests. The engine thread observes, the event loop takes snapshots.

    usd_per_hour: what the replica costs, None if that is not known. started_s: time.monotonic() from when on it does.
    """

    def __init__(self, *, usd_per_hour: float | None = None, started_s: float | None = None) -> None:
        self._usd_per_hour = usd_per_hour
        self._started_s = started_s if started_s is not None else time.monotonic()
        self._arrivals: dict[RequestId, float] = {}  # until the first token
        self._last_tokens: dict[RequestId, float] = {}  # from the first token on
        self._finished: Counter[str] = Counter({reason.value: 0 for reason in FinishReason})
        self._num_aborted = 0  # apart from _finished, which the engine thread writes
        self._histograms = {metric.name: Histogram(metric) for metric in REPLICA_METRICS if metric.buckets}

    def start(self, requests: Sequence[Request]) -> None:
        """A call enters with these samples."""
        self._add(PARAMS_N, requests[0].params.n)
        for request in requests:
            self._arrivals |= dict.fromkeys(request.result_ids, request.arrival_s)
            if request.params.max_tokens is not None:
                self._add(PARAMS_MAX_TOKENS, request.params.max_tokens)

    def discard(self, request_ids: Iterable[RequestId]) -> None:
        """The engine refused these requests."""
        for request_id in request_ids:
            self._close(request_id)

    def abort(self, request_ids: Iterable[RequestId]) -> None:
        """The client of these requests went away; those that had finished before do not count."""
        self._num_aborted += sum(self._close(request_id) for request_id in request_ids)

    def observe_step(self, outputs: Sequence[RequestOutput]) -> None:
        """One step's outputs for one gateway. Costs about 1 us an output."""
        now = time.monotonic()
        last_tokens = self._last_tokens
        itl = self._histograms[ITL.name]
        self._add(STEP_OUTPUTS, len(outputs))
        for output in outputs:
            if output.token_ids:
                last = last_tokens.get(output.request_id)
                if last is not None:
                    itl.add(now - last)
                elif (arrival := self._arrivals.pop(output.request_id, None)) is not None:
                    self._add(TTFT, now - arrival)
                last_tokens[output.request_id] = now
            if output.finish_reason is not None:
                self._finish(output.request_id, output.finish_reason, output.times)

    def snapshot(self, stats: EngineStats, *, num_dropped: int = 0) -> Snapshot:
        """Everything of this replica, labelled within it only."""
        finished = dict(self._finished)
        finished[FinishReason.ABORT.value] += self._num_aborted
        waiting = {"capacity": stats.num_waiting - stats.num_deferred, "deferred": stats.num_deferred}
        values = {
            RUNNING: stats.num_running,
            WAITING: stats.num_waiting,
            KV_USAGE: stats.kv_usage,
            PREFIX_QUERIES: stats.prompt_tokens_total,
            PREFIX_HITS: stats.cached_tokens_total,
            PREEMPTIONS: stats.preemptions_total,
            PROMPT_TOKENS: stats.prompt_tokens_total,
            GENERATION_TOKENS: stats.generation_tokens_total,
            SPEC_DRAFTS: stats.drafts.num_steps,
            SPEC_DRAFT_TOKENS: stats.drafts.num_drafted,
            SPEC_ACCEPTED: stats.drafts.num_accepted,
            STEPS: stats.steps_total,
            STEP_SECONDS: stats.step_seconds_total,
            MESSAGES_DROPPED: num_dropped,
        }
        return (
            *(Point(metric.name, (), float(value)) for metric, value in values.items()),
            Point(CACHE_CONFIG.name, (str(stats.block_size), str(stats.num_blocks)), 1.0),
            *(
                Point(SPEC_ACCEPTED_AT.name, (str(i),), float(n))
                for i, n in enumerate(stats.drafts.accepted_at or (0,))
            ),
            *(Point(WAITING_BY_REASON.name, (reason,), float(n)) for reason, n in waiting.items()),
            *(Point(HELD_SECONDS.name, (reason,), seconds) for reason, seconds in stats.held_seconds_total.items()),
            *self._cost(),
            *(Point(REQUEST_SUCCESS.name, (reason,), float(n)) for reason, n in finished.items()),
            *(Point(name, (), h.distribution()) for name, h in self._histograms.items()),
        )

    def _cost(self) -> Snapshot:
        if self._usd_per_hour is None:
            return ()
        hours = (time.monotonic() - self._started_s) / 3600
        return (Point(COST.name, (), hours * self._usd_per_hour),)

    def _add(self, metric: Metric, value: float) -> None:
        self._histograms[metric.name].add(value)

    def _close(self, request_id: RequestId) -> bool:
        """Forget a request's marks; whether there were any. Safe in both threads: one of them gets it."""
        had_no_token = self._arrivals.pop(request_id, None) is not None
        had_tokens = self._last_tokens.pop(request_id, None) is not None
        return had_no_token or had_tokens

    def _finish(self, request_id: RequestId, reason: FinishReason, times: RequestTimes | None) -> None:
        if not self._close(request_id):
            return  # aborted already
        self._finished[reason.value] += 1
        if times is None or reason in (FinishReason.ABORT, FinishReason.ERROR):
            return
        self._add(E2E, times.finished_s - times.arrival_s)
        self._add(REQUEST_PROMPT, times.num_prompt_tokens)
        self._add(REQUEST_GENERATION, times.num_output_tokens)
        self._add(REQUEST_PREEMPTIONS, times.num_preemptions)
        if times.admitted_s is not None:
            self._add(QUEUE_TIME, times.admitted_s - times.arrival_s)
            self._add(INFERENCE_TIME, times.finished_s - times.admitted_s)
            if times.first_token_s is not None:
                self._add(PREFILL_TIME, times.first_token_s - times.admitted_s)
        if times.first_token_s is not None:
            self._add(DECODE_TIME, times.finished_s - times.first_token_s)


class HttpMetrics:
    """What a gateway counts of its HTTP traffic. One event loop writes and reads."""

    def __init__(self) -> None:
        self._answers: Counter[tuple[str, str, str]] = Counter()
        self._seconds: dict[tuple[str, str], Histogram] = {}
        self.num_open = 0

    def observe(self, *, handler: str, method: str, status: int, seconds: float) -> None:
        """One answer has ended. `handler` is the route's path template, never the path as sent."""
        self._answers[handler, method, str(status)] += 1
        if (handler, method) not in self._seconds:
            self._seconds[handler, method] = Histogram(HTTP_SECONDS)
        self._seconds[handler, method].add(seconds)

    def snapshot(self) -> Snapshot:
        return (
            Point(HTTP_OPEN.name, (), float(self.num_open)),
            *(Point(HTTP_REQUESTS.name, labels, float(n)) for labels, n in self._answers.items()),
            *(Point(HTTP_SECONDS.name, labels, h.distribution()) for labels, h in self._seconds.items()),
        )


def render(
    replicas: Mapping[tuple[str, str], Snapshot],
    gateways: Mapping[str, Snapshot] | None = None,
    cluster: Snapshot = (),
) -> str:
    """The exposition (Prometheus text format 0.0.4) of replicas by (model_name, engine), of gateways by label, and of
    the cluster as a whole.

    One family per name, whatever the number of replicas and gateways.
    """
    families: dict[str, Family] = {}
    for owner, snapshot in replicas.items():
        for point in snapshot:
            _add_point(families, point, REPLICA_LABELS, owner)
    for label, snapshot in (gateways or {}).items():
        for point in snapshot:
            _add_point(families, point, GATEWAY_LABELS, (label,))
    for point in cluster:
        _add_point(families, point, (), ())
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Collected(families))
    return generate_latest(registry).decode()


class _Collected:
    def __init__(self, families: Mapping[str, Family]) -> None:
        self._families = families

    def collect(self) -> Iterator[Family]:
        return iter(self._families.values())


def _add_point(
    families: dict[str, Family], point: Point, owner_labels: tuple[str, ...], owner: tuple[str, ...]
) -> None:
    metric = METRICS[point.metric]
    family = families.get(metric.name)
    if family is None:
        family = families[metric.name] = _FAMILIES[metric.kind](
            metric.name, metric.help, labels=owner_labels + metric.labels
        )
    labels = list(owner + point.labels)
    if isinstance(family, HistogramMetricFamily):
        assert isinstance(point.value, Distribution), point
        family.add_metric(labels, list(_cumulative(metric.buckets, point.value.counts)), point.value.sum)
    else:
        assert isinstance(family, GaugeMetricFamily | CounterMetricFamily), family
        assert isinstance(point.value, float), point
        family.add_metric(labels, point.value)


_FAMILIES = {"gauge": GaugeMetricFamily, "counter": CounterMetricFamily, "histogram": HistogramMetricFamily}


def _cumulative(bounds: Sequence[float], counts: Sequence[int]) -> Iterator[tuple[str, float]]:
    total = 0
    for bound, count in zip((*bounds, None), counts, strict=True):
        total += count
        yield ("+Inf" if bound is None else str(bound)), float(total)
