"""What the status page plots: rates and percentiles between successive measurements, for the last half hour."""

from __future__ import annotations

import asyncio
import logging
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, TypeAlias

from shoal.cluster.admin.cluster import Cluster, Measured
from shoal.cluster.metrics import (
    GATEWAY_WAITING,
    GENERATION_TOKENS,
    HTTP_REQUESTS,
    ITL,
    KV_USAGE,
    METRICS,
    PREEMPTIONS,
    PREFIX_HITS,
    PREFIX_QUERIES,
    PROMPT_TOKENS,
    RUNNING,
    SPEC_ACCEPTED,
    SPEC_DRAFT_TOKENS,
    TTFT,
    WAITING,
    Distribution,
    Metric,
    Snapshot,
)

log = logging.getLogger(__name__)

PERIOD_S: Final = 2.0
KEPT_S: Final = 1800.0
QUANTILES: Final = (0.5, 0.95, 0.99)

_Key: TypeAlias = tuple[str, tuple[str, ...]]  # of a metric's value: its name and labels


@dataclass(frozen=True, slots=True)
class Figures:
    """Of one model's replicas, or of all, over one period. None: nothing happened that could be measured.

    Percentiles are those of QUANTILES, in seconds; rates per second.
    """

    output_tokens_per_s: float = 0.0
    prompt_tokens_per_s: float = 0.0
    preemptions_per_s: float = 0.0
    running: float = 0.0
    waiting: float = 0.0  # in replicas
    held: float = 0.0  # in gateways, until it is their turn
    ttft_s: tuple[float, ...] | None = None
    token_s: tuple[float, ...] | None = None  # from one token to the next
    hit_rate: float | None = None  # of the prefix cache, in prompt tokens
    acceptance_rate: float | None = None  # of drafts


@dataclass(frozen=True, slots=True)
class HistoryPoint:
    """One period, which ended at `seconds`, Unix time.

    kv_usage: share of each replica's KV blocks, by "model/label". requests_per_s: answers to POSTs, by HTTP status.
    """

    seconds: float
    all: Figures
    models: Mapping[str, Figures] = field(default_factory=dict)
    kv_usage: Mapping[str, float] = field(default_factory=dict)
    requests_per_s: Mapping[str, float] = field(default_factory=dict)


class History:
    """The last KEPT_S of a cluster, in memory."""

    def __init__(self, cluster: Cluster, *, period_s: float = PERIOD_S) -> None:
        self._cluster = cluster
        self._period_s = period_s
        self._points: deque[HistoryPoint] = deque(maxlen=round(KEPT_S / period_s))
        self._last: Measured | None = None

    async def run(self) -> None:
        """Measure for as long as this task lives. What goes wrong is logged, and the next period tries again."""
        while True:
            try:
                self.add(await self._cluster.measure())
            except Exception:
                log.exception("the cluster could not be measured")
            await asyncio.sleep(self._period_s)

    def add(self, measured: Measured) -> None:
        """The next measurement."""
        last, self._last = self._last, measured
        if last is not None and measured.seconds > last.seconds:
            self._points.append(between(last, measured))

    def since(self, seconds: float) -> list[HistoryPoint]:
        """Periods that ended later than that, oldest first."""
        return [point for point in self._points if point.seconds > seconds]


def between(before: Measured, after: Measured) -> HistoryPoint:
    """What happened from one measurement to the next.

    A replica that is new in `after` counts from the next period on, and one whose counters have gone back, which is a
    new one under an old label, counts from zero: no rate is ever negative, and none holds what came before.
    """
    seconds = after.seconds - before.seconds
    assert seconds > 0, (before.seconds, after.seconds)
    grown = {
        model: [_Grown(before.replicas.get(model, {}).get(label), snapshot) for label, snapshot in of_model.items()]
        for model, of_model in after.replicas.items()
    }
    held: defaultdict[str, float] = defaultdict(float)
    answers: defaultdict[str, float] = defaultdict(float)
    for label, snapshot in after.gateways.items():
        gateway = _Grown(before.gateways.get(label), snapshot)
        for (model,), value in gateway.values(GATEWAY_WAITING):
            held[model] += value
        for (_, method, status), count in gateway.increases(HTTP_REQUESTS):
            if method == "POST":
                answers[status] += count
    everything = [replica for of_model in grown.values() for replica in of_model]
    return HistoryPoint(
        seconds=after.seconds,
        all=_figures(everything, seconds, sum(held.values())),
        models={model: _figures(of_model, seconds, held[model]) for model, of_model in grown.items()},
        kv_usage={
            f"{model}/{label}": round(_Grown(None, snapshot).value(KV_USAGE), 4)
            for model, of_model in after.replicas.items()
            for label, snapshot in of_model.items()
        },
        requests_per_s={status: _rounded(count / seconds) for status, count in answers.items() if count},
    )


def quantile(bounds: Sequence[float], counts: Sequence[float], share: float) -> float | None:
    """Of a histogram's counts by bucket, the last one open, evenly spread inside each bucket as Prometheus counts it.

    In the open bucket it is the last bound. None where there are no values.
    """
    total = sum(counts)
    if total <= 0:
        return None
    rank, below = share * total, 0.0
    lower = 0.0
    for bound, count in zip(bounds, counts, strict=False):
        if count and below + count >= rank:
            return lower + (bound - lower) * (rank - below) / count
        below += count
        lower = bound
    return lower


def _figures(replicas: Sequence[_Grown], seconds: float, held: float) -> Figures:
    def rate(metric: Metric) -> float:
        return _rounded(_total(replicas, metric) / seconds)

    return Figures(
        output_tokens_per_s=rate(GENERATION_TOKENS),
        prompt_tokens_per_s=rate(PROMPT_TOKENS),
        preemptions_per_s=rate(PREEMPTIONS),
        running=sum(replica.value(RUNNING) for replica in replicas),
        waiting=sum(replica.value(WAITING) for replica in replicas),
        held=held,
        ttft_s=_quantiles(replicas, TTFT),
        token_s=_quantiles(replicas, ITL),
        hit_rate=_share(_total(replicas, PREFIX_HITS), _total(replicas, PREFIX_QUERIES)),
        acceptance_rate=_share(_total(replicas, SPEC_ACCEPTED), _total(replicas, SPEC_DRAFT_TOKENS)),
    )


class _Grown:
    """A process's measurements, and how far its counters have come since `before`."""

    def __init__(self, before: Snapshot | None, after: Snapshot) -> None:
        self._after = _by_key(after)
        # A process that was not there before may be an old one that only did not answer.
        self._before = self._after if before is None else _by_key(before)
        if any(_is_less(value, self._before.get(key)) for key, value in _counters(self._after)):
            self._before = {}

    def values(self, metric: Metric) -> Iterator[tuple[tuple[str, ...], float]]:
        """By labels."""
        for (name, labels), value in self._after.items():
            if name == metric.name and isinstance(value, float):
                yield labels, value

    def value(self, metric: Metric) -> float:
        """Under all labels together."""
        return sum(value for _, value in self.values(metric))

    def increases(self, metric: Metric) -> Iterator[tuple[tuple[str, ...], float]]:
        """Of a counter, by labels."""
        for labels, value in self.values(metric):
            before = self._before.get((metric.name, labels), 0.0)
            assert isinstance(before, float), metric
            yield labels, value - before

    def counts(self, metric: Metric) -> list[int]:
        """New values of a histogram, by bucket."""
        new = [0] * (len(metric.buckets) + 1)
        for key, value in self._after.items():
            if key[0] == metric.name and isinstance(value, Distribution):
                before = self._before.get(key)
                old = before.counts if isinstance(before, Distribution) else (0,) * len(new)
                new = [count + now - then for count, now, then in zip(new, value.counts, old, strict=True)]
        return new


def _by_key(snapshot: Snapshot) -> dict[_Key, float | Distribution]:
    return {(point.metric, point.labels): point.value for point in snapshot}


def _counters(values: Mapping[_Key, float | Distribution]) -> Iterator[tuple[_Key, float | Distribution]]:
    return ((key, value) for key, value in values.items() if METRICS[key[0]].kind != "gauge")


def _is_less(value: float | Distribution, before: float | Distribution | None) -> bool:
    if before is None:
        return False
    if isinstance(value, Distribution):
        assert isinstance(before, Distribution)
        return any(now < then for now, then in zip(value.counts, before.counts, strict=True))
    assert isinstance(before, float)
    return value < before


def _total(replicas: Iterable[_Grown], metric: Metric) -> float:
    return sum(count for replica in replicas for _, count in replica.increases(metric))


def _quantiles(replicas: Sequence[_Grown], metric: Metric) -> tuple[float, ...] | None:
    counts = [sum(column) for column in zip(*(replica.counts(metric) for replica in replicas), strict=True)]
    found = [quantile(metric.buckets, counts, share) for share in QUANTILES]
    known = tuple(_rounded(value) for value in found if value is not None)
    return known or None


def _share(part: float, whole: float) -> float | None:
    return _rounded(min(1.0, part / whole)) if whole > 0 else None


def _rounded(value: float) -> float:
    """Four digits are more than a plot shows."""
    return float(f"{value:.4g}")
