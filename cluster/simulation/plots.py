"""Pictures of a comparison, in one file: waiting times, hit rates, balance, and replicas or goodput."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Final

from shoal.cluster.routing.policies import DEFAULT_POLICY
from shoal.cluster.simulation.report import Comparison, quantile
from shoal.cluster.simulation.result import Objectives, ReplicaTime, SimulationResult
from shoal.engine.config import ConfigError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PLOT_SUFFIXES: Final = (".svg", ".png")
NUM_BINS: Final = 60  # of time
# Okabe and Ito's colours, which colour-blind people tell apart, without the yellow that white swallows.
_COLOURS: Final = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
_DASHES: Final = ("-", "--", ":")
_Style = Mapping[str, tuple[str, str]]  # policy -> colour and dashes


def save_plots(comparison: Comparison, path: Path) -> None:
    """Write the picture. Raises ConfigError if the file cannot be written."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    style = dict(zip(comparison.results, cycle((c, d) for d in _DASHES for c in _COLOURS), strict=False))
    with rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "svg.hashsalt": "shoal"}):
        figure = Figure(figsize=(11, 8), layout="constrained", facecolor="white")
        FigureCanvasAgg(figure)
        figure.suptitle(f"{comparison.trace.name} on {comparison.num_replicas} replicas of {comparison.profile.name}")
        axes = [figure.add_subplot(2, 2, place) for place in (1, 2, 3, 4)]
        _plot_ttft(axes[0], comparison, style)
        _plot_hit_rates(axes[1], comparison, style)
        _plot_balance(axes[2], comparison, style)
        if any(len(replica_counts(result)) > 2 for result in comparison.results.values()):
            _plot_replicas(axes[3], comparison, style)
        elif comparison.objectives == Objectives():
            _plot_means(axes[3], comparison, style)
        else:
            _plot_goodput(axes[3], comparison, style)
        handles, names = axes[0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside lower center", ncols=6, frameon=False)
        try:
            figure.savefig(path, dpi=150)
        except OSError as error:
            raise ConfigError(f"cannot write {path}: {error}", field="plot") from None


def _plot_ttft(axes: Axes, comparison: Comparison, style: _Style) -> None:
    for name, result in comparison.results.items():
        ttfts = sorted(request.ttft_s for request in result.requests if not request.is_rejected)
        colour, dashes = style[name]
        shares = [(rank + 1) / len(result.requests) for rank in range(len(ttfts))]
        width = 2.5 if name == DEFAULT_POLICY else 1.2
        axes.step(
            ttfts, shares, where="post", color=colour, linestyle=dashes, linewidth=width, zorder=width, label=name
        )
    if comparison.objectives.ttft_s is not None:
        axes.axvline(comparison.objectives.ttft_s, color="grey", linewidth=1)
    axes.set(xscale="log", xlabel="time to first token, s", ylabel="share of all requests", ylim=(0, 1))
    axes.grid(alpha=0.3)


def _plot_hit_rates(axes: Axes, comparison: Comparison, style: _Style) -> None:
    rates = {name: 100 * (report.hit_rate or 0.0) for name, report in comparison.reports.items()}
    _bars(axes, rates, style)
    axes.axvline(100 * comparison.pooled_hit_rate, color="grey", linewidth=1, linestyle="--")
    axes.set(xlabel="prompt tokens found in the cache, % (dashed: one shared cache)")


def _plot_balance(axes: Axes, comparison: Comparison, style: _Style) -> None:
    for place, (name, result) in enumerate(comparison.results.items()):
        shares = sorted(busiest_shares(result))
        low, middle, high = (quantile(shares, share) or 1.0 for share in (0.1, 0.5, 0.9))
        axes.plot([low, high], [place, place], color=style[name][0], linewidth=3, solid_capstyle="butt", alpha=0.5)
        axes.plot([middle], [place], "o", color=style[name][0])
    axes.set_yticks(range(len(comparison.results)), list(comparison.results))
    axes.invert_yaxis()
    axes.set(xlabel="new work of the busiest replica / mean, by stretches of time: median, 10 to 90 %", xlim=(1, None))
    axes.grid(alpha=0.3, axis="x")


def _plot_replicas(axes: Axes, comparison: Comparison, style: _Style) -> None:
    for name, result in comparison.results.items():
        times, counts = zip(*replica_counts(result), strict=True)
        colour, dashes = style[name]
        axes.step([time / 60 for time in times], counts, where="post", color=colour, linestyle=dashes)
    axes.set(xlabel="minutes", ylabel="replicas", ylim=(0, None))
    axes.grid(alpha=0.3)


def _plot_goodput(axes: Axes, comparison: Comparison, style: _Style) -> None:
    _bars(axes, {name: 100 * report.goodput_share for name, report in comparison.reports.items()}, style)
    axes.set(xlabel="requests served within the objectives, % of all", xlim=(0, 100))


def _plot_means(axes: Axes, comparison: Comparison, style: _Style) -> None:
    _bars(axes, {name: report.ttft_mean_s or 0.0 for name, report in comparison.reports.items()}, style, "%.3g")
    axes.set(xlabel="time to first token, mean, s")


def _bars(axes: Axes, values: Mapping[str, float], style: _Style, label: str = "%.1f") -> None:
    names = list(values)
    bars = axes.barh(names, [values[name] for name in names], color=[style[name][0] for name in names])
    axes.bar_label(bars, fmt=label, padding=3)
    axes.invert_yaxis()


def busiest_shares(result: SimulationResult) -> list[float]:
    """The prompt tokens that the busiest replica was given to compute, over the mean of the replicas that were there:
    for each of NUM_BINS stretches of time in which there was anything to compute.
    """
    width = result.span_s / NUM_BINS or 1.0
    work = [[0] * len(result.replicas) for _ in range(NUM_BINS)]
    for request in result.requests:
        if request.replica is not None:
            place = min(NUM_BINS - 1, int(request.arrival_s / width))
            work[place][request.replica] += request.num_prompt - request.num_cached
    shares = []
    for place, loads in enumerate(work):
        begin, end = place * width, (place + 1) * width
        there = [load for load, replica in zip(loads, result.replicas, strict=True) if _is_there(replica, begin, end)]
        if any(there):
            shares.append(max(there) * len(there) / sum(there))
    return shares


def _is_there(replica: ReplicaTime, begin_s: float, end_s: float) -> bool:
    return replica.started_s < end_s and (replica.stopped_s is None or replica.stopped_s > begin_s)


def replica_counts(result: SimulationResult) -> list[tuple[float, int]]:
    """How many replicas there were (those that start included) from each of these times on, the last one the end."""
    starts = [(replica.started_s, 1) for replica in result.replicas]
    stops = [(replica.stopped_s, -1) for replica in result.replicas if replica.stopped_s is not None]
    counts = {0.0: 0}
    num_replicas = 0
    for time_s, change in sorted([*starts, *stops]):
        if time_s < result.span_s:
            num_replicas += change
            counts[time_s] = num_replicas
    return [*counts.items(), (result.span_s, num_replicas)]
