"""PromQL out of metrics, not of names: asking for a metric or a label that is not there fails when it is written.

An `Expr` knows the labels that its result has and the metrics that it reads. It becomes text in a `Scope`, so that one
expression serves dashboards, where variables choose what is seen, and rules, where nothing does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

from shoal.cluster.metrics import (
    AUTH_METRICS,
    CLUSTER_METRICS,
    GATEWAY_LABELS,
    GATEWAY_METRICS,
    REPLICA_LABELS,
    REPLICA_METRICS,
    Metric,
)

Where: TypeAlias = Mapping[str, str]  # label -> regular expression of its whole value
By: TypeAlias = tuple[str, ...]

SCRAPE_LABELS = ("namespace", "job", "instance")  # given by whoever scrapes; the first one on Kubernetes only
CLUSTER = ("namespace", "job")  # tell one Shoal from another
_OWNER_LABELS: Mapping[Metric, tuple[str, ...]] = {
    **dict.fromkeys(REPLICA_METRICS, REPLICA_LABELS),
    **dict.fromkeys(GATEWAY_METRICS + AUTH_METRICS, GATEWAY_LABELS),
    **dict.fromkeys(CLUSTER_METRICS, ()),
}


class QueryError(ValueError):
    """A query asks for what its metric does not have."""


@dataclass(frozen=True, slots=True)
class Scope:
    """Where a query is asked.

    matchers: by label, for every metric that has it. window: of rates that name none.
    """

    matchers: Where
    window: str


@dataclass(frozen=True, slots=True)
class Expr:
    """A query. labels: of its result. metrics: names of those it reads."""

    write: Callable[[Scope], str]
    labels: frozenset[str]
    metrics: frozenset[str]

    def __add__(self, other: Expr) -> Expr:
        return _binary(self, "+", other)

    def __mul__(self, factor: float) -> Expr:
        return Expr(lambda scope: f"{self.write(scope)} * {factor:.15g}", self.labels, self.metrics)

    def __rsub__(self, number: float) -> Expr:
        return Expr(lambda scope: f"({number:g} - {self.write(scope)})", self.labels, self.metrics)


@dataclass(frozen=True, slots=True)
class Recording:
    """A recording rule: `expr` evaluated all the time under a name of its own, `level:metric:operation`."""

    name: str
    expr: Expr


def labels_of(metric: Metric) -> frozenset[str]:
    """Every label that a scrape of the metric has, but a histogram's `le`. Raises QueryError for one not listed."""
    if metric not in _OWNER_LABELS:
        raise QueryError(f"{metric.name} is in none of the lists of cluster/metrics.py")
    return frozenset((*SCRAPE_LABELS, *_OWNER_LABELS[metric], *metric.labels))


def value(metric: Metric, where: Where | None = None) -> Expr:
    """A gauge as it is."""
    return _select(metric, "", _suffix(metric, "gauge"), where)


def rate(metric: Metric, by: By = (), *, over: str | None = None, where: Where | None = None) -> Expr:
    """A counter's increase per second, summed; a histogram's observations per second."""
    suffix = "_count" if metric.buckets else _suffix(metric, "counter")
    return total(_ranged("rate", metric, suffix, over, where), by)


def increase(metric: Metric, by: By = (), *, over: str, where: Where | None = None) -> Expr:
    """By how much a counter grew, summed."""
    return total(_ranged("increase", metric, _suffix(metric, "counter"), over, where), by)


def quantile(q: float, metric: Metric, by: By = (), *, over: str | None = None) -> Expr:
    """Below this value are `q` of a histogram's observations."""
    buckets = _buckets(metric, over, None)
    grouped = _aggregate("sum", buckets, (*by, "le"))
    return Expr(lambda scope: f"histogram_quantile({q:g}, {grouped.write(scope)})", frozenset(by), buckets.metrics)


def mean(metric: Metric, by: By = (), *, over: str | None = None) -> Expr:
    """Of a histogram's observations."""
    sums = total(_ranged("rate", metric, "_sum", over, None), by)
    return ratio(sums, rate(metric, by, over=over))


def share_within(metric: Metric, bound: float | str, by: By = (), *, over: str | None = None) -> Expr:
    """Share of a histogram's observations up to `bound`: one of its buckets, or a dashboard's variable of them."""
    if isinstance(bound, float) and bound not in metric.buckets:
        raise QueryError(f"{metric.name} has no bucket up to {bound:g}; it has {metric.buckets}")
    return ratio(total(_buckets(metric, over, str(bound)), by), rate(metric, by, over=over))


def total(expr: Expr, by: By = ()) -> Expr:
    return _aggregate("sum", expr, by)


def largest(expr: Expr, by: By = ()) -> Expr:
    return _aggregate("max", expr, by)


def ratio(part: Expr, whole: Expr) -> Expr:
    """Where there is any of the whole: nothing came of nothing is no share at all, and must not be averaged.

    `whole` may lack labels of `part`.
    """
    if not whole.labels <= part.labels:
        raise QueryError(f"nothing to divide by for each {sorted(whole.labels - part.labels)}")
    extra = ", ".join(sorted(part.labels - whole.labels))
    matching = f" ignoring ({extra}) group_left ()" if extra else ""
    return Expr(
        lambda scope: f"({part.write(scope)} /{matching} ({whole.write(scope)} > 0))",
        part.labels,
        part.metrics | whole.metrics,
    )


def recorded(rule: Recording) -> Expr:
    """The rule's latest value."""
    return Expr(lambda scope: rule.name, rule.expr.labels, rule.expr.metrics)


def mean_before(rule: Recording, *, over: str, offset: str) -> Expr:
    """The mean of a rule's values over a time that ended `offset` ago."""
    return Expr(
        lambda scope: f"avg_over_time({rule.name}[{over}] offset {offset})", rule.expr.labels, rule.expr.metrics
    )


def slope(rule: Recording, *, over: str) -> Expr:
    """How fast a rule's value changes, per second, by regression."""
    return Expr(lambda scope: f"deriv({rule.name}[{over}])", rule.expr.labels, rule.expr.metrics)


def above(expr: Expr, bound: float | Expr) -> Expr:
    return _compare(expr, ">", bound)


def below(expr: Expr, bound: float | Expr) -> Expr:
    return _compare(expr, "<", bound)


def equal(expr: Expr, number: float) -> Expr:
    return _compare(expr, "==", number)


def both(first: Expr, second: Expr) -> Expr:
    """The first one's values where the second has any."""
    return _binary(first, "and", second)


def vanished(metric: Metric, by: By, *, within: str) -> Expr:
    """Where a gauge had values within that time and has none now."""
    now, before = value(metric), _ranged("last_over_time", metric, _suffix(metric, "gauge"), within, None)
    return _binary(largest(before, by), "unless", largest(now, by))


def _suffix(metric: Metric, kind: Literal["gauge", "counter"]) -> str:
    """Of the name in a scrape. Raises QueryError for a metric of another kind."""
    if metric.kind != kind:
        raise QueryError(f"{metric.name} is a {metric.kind}, not a {kind}")
    return {"gauge": "", "counter": "_total"}[kind]


def _select(metric: Metric, window: str, suffix: str, where: Where | None) -> Expr:
    if suffix in ("_bucket", "_sum", "_count") and not metric.buckets:
        raise QueryError(f"{metric.name} is a {metric.kind}, not a histogram")
    labels = labels_of(metric) | ({"le"} if suffix == "_bucket" else set())
    _check(metric.name, where or {}, labels)

    def write(scope: Scope) -> str:
        chosen = {name: text for name, text in scope.matchers.items() if name in labels} | dict(where or {})
        matchers = ", ".join(f'{name}{"=" if name == "le" else "=~"}"{text}"' for name, text in chosen.items())
        return f"{metric.name}{suffix}{f'{{{matchers}}}' if matchers else ''}{window and f'[{window}]'}"

    return Expr(write, labels, frozenset({metric.name}))


def _ranged(function: str, metric: Metric, suffix: str, over: str | None, where: Where | None) -> Expr:
    labels = _select(metric, "", suffix, where).labels
    return Expr(
        lambda scope: f"{function}({_select(metric, over or scope.window, suffix, where).write(scope)})",
        labels,
        frozenset({metric.name}),
    )


def _buckets(metric: Metric, over: str | None, bound: str | None) -> Expr:
    return _ranged("rate", metric, "_bucket", over, {"le": bound} if bound else None)


def _aggregate(operator: str, expr: Expr, by: By) -> Expr:
    _check(operator, by, expr.labels)
    grouping = f" by ({', '.join(by)}) " if by else ""
    return Expr(lambda scope: f"{operator}{grouping}({expr.write(scope)})", frozenset(by), expr.metrics)


def _binary(left: Expr, operator: str, right: Expr) -> Expr:
    if left.labels != right.labels:
        raise QueryError(f"sides of {operator!r} differ in labels: {sorted(left.labels ^ right.labels)}")
    return Expr(
        lambda scope: f"({left.write(scope)} {operator} {right.write(scope)})",
        left.labels,
        left.metrics | right.metrics,
    )


def _compare(expr: Expr, operator: str, bound: float | Expr) -> Expr:
    if isinstance(bound, Expr):
        return _binary(expr, operator, bound)
    return Expr(lambda scope: f"({expr.write(scope)} {operator} {bound:g})", expr.labels, expr.metrics)


def _check(name: str, asked: Iterable[str], labels: frozenset[str]) -> None:
    if missing := set(asked) - labels:
        raise QueryError(f"{name} has no label {sorted(missing)}; it has {sorted(labels)}")
