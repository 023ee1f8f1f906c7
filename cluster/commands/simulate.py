"""`shoal simulate`: play a trace under several routing policies, without a device, and compare."""

from __future__ import annotations

import inspect
import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from shoal.cluster.autoscaling.latency import Goals
from shoal.cluster.autoscaling.scaler import LatencyScaler, OngoingRequestsScaler
from shoal.cluster.config import AutoscalingSettings
from shoal.cluster.routing.policies import POLICIES, Policy, make_policy
from shoal.cluster.simulation.peers import SIMULATED_POLICIES
from shoal.cluster.simulation.plots import PLOT_SUFFIXES, save_plots
from shoal.cluster.simulation.profile import load_profile
from shoal.cluster.simulation.report import Comparison, PolicyReport
from shoal.cluster.simulation.result import Objectives
from shoal.cluster.simulation.simulator import Autoscaler
from shoal.cluster.simulation.simulator import simulate as run
from shoal.cluster.simulation.trace import TraceFormat, load_trace
from shoal.engine.config import ConfigError

MAX_REPLICAS = 1000  # where none is named


@dataclass(frozen=True, slots=True)
class _Column:
    title: str
    cell: Callable[[PolicyReport], float | None]
    format: str
    is_more_better: bool = False


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else seconds * 1e3


_COLUMNS = (
    _Column("hit rate", lambda r: r.hit_rate, "{:.1%}", is_more_better=True),
    _Column("TTFT mean s", lambda r: r.ttft_mean_s, "{:.3f}"),
    _Column("p50", lambda r: r.ttft_p50_s, "{:.3f}"),
    _Column("p90", lambda r: r.ttft_p90_s, "{:.3f}"),
    _Column("p99", lambda r: r.ttft_p99_s, "{:.3f}"),
    _Column("per token p50 ms", lambda r: _ms(r.tpot_p50_s), "{:.2f}"),
    _Column("p99", lambda r: _ms(r.tpot_p99_s), "{:.2f}"),
    _Column("goodput /s", lambda r: r.goodput, "{:.3f}", is_more_better=True),
    _Column("of all", lambda r: r.goodput_share, "{:.1%}", is_more_better=True),
    _Column("rejected", lambda r: r.rejected, "{:,.0f}"),
    _Column("replica-h", lambda r: r.replica_hours, "{:.2f}"),
    _Column("USD/Mtok", lambda r: r.usd_per_million_tokens, "{:.3f}"),
)


def simulate(
    trace: str,
    *,
    num_replicas: int,
    hardware: str,
    policies: str | None = None,
    format: TraceFormat | None = None,
    speed: float = 1.0,
    objectives: Objectives,
    has_admission: bool = False,
    autoscaling: AutoscalingSettings | None = None,
    seed: int = 0,
    plot: str | None = None,
    is_json: bool = False,
) -> int:
    """Play the trace once under each policy and print what came of it. Raises ConfigError.

    has_admission: refuse at once what is predicted to miss the objective for the first token, as a gateway does.
    autoscaling: how the number of replicas follows the load, `num_replicas` at first; None: it stays.
    """
    if num_replicas < 1:
        raise ConfigError(f"there must be at least 1 replica, not {num_replicas}", field="replicas")
    if has_admission and objectives.ttft_s is None:
        raise ConfigError("--admission needs an objective: add --ttft-ms", field="objectives")
    if autoscaling is not None:
        _check_autoscaling(autoscaling, num_replicas, objectives)
    plot_path = None if plot is None else _plot_path(plot)
    profile = load_profile(hardware)
    made = {name: _make(name, seed) for name in _names(policies)}
    loaded = load_trace(trace, format, speed)
    if profile.block_tokens is not None:
        loaded = loaded.in_blocks_of(profile.block_tokens)
    results = {}
    for name, policy in made.items():
        results[name] = run(
            loaded,
            profile,
            policy,
            num_replicas,
            objectives=objectives,
            has_admission=has_admission,
            autoscaler=None if autoscaling is None else _scaler(autoscaling, objectives),
            on_progress=_progress_of(name),
        )
        _finish_progress(name, results[name].wall_s)
    comparison = Comparison(loaded, num_replicas, profile, objectives, results)
    if is_json:
        print(json.dumps(comparison.as_json(), indent=2))
    else:
        print("\n".join(lines(comparison)))
    if plot_path is not None:
        save_plots(comparison, plot_path)
    return 0


def objectives(*, ttft_ms: float | None, tpot_ms: float | None) -> Objectives:
    """What the options ask for. Raises ConfigError for times that nothing can keep."""
    for option, value in {"--ttft-ms": ttft_ms, "--tpot-ms": tpot_ms}.items():
        if value is not None and not value > 0:
            raise ConfigError(f"{option} must be more than 0 milliseconds, not {value:g}", field="objectives")
    return Objectives(*(None if value is None else value / 1e3 for value in (ttft_ms, tpot_ms)))


def autoscaling(
    *, policy: str | None, min_replicas: int | None, max_replicas: int | None
) -> AutoscalingSettings | None:
    """What the options ask for; None without a policy. Raises ConfigError for numbers that cannot be."""
    if policy is None:
        for option, value in {"--min-replicas": min_replicas, "--max-replicas": max_replicas}.items():
            if value is not None:
                raise ConfigError(
                    f"{option} needs a policy that stays within it: add --autoscaling", field="autoscaling"
                )
        return None
    low, high = 1 if min_replicas is None else min_replicas, MAX_REPLICAS if max_replicas is None else max_replicas
    if low < 0:
        raise ConfigError(f"--min-replicas must be 0 or more, not {low}", field="autoscaling")
    if high < max(1, low):
        raise ConfigError(f"--max-replicas must be at least {max(1, low)}, not {high}", field="autoscaling")
    return AutoscalingSettings.model_validate({"policy": policy, "min_replicas": low, "max_replicas": high})


def _check_autoscaling(settings: AutoscalingSettings, num_replicas: int, objectives: Objectives) -> None:
    if settings.policy == "latency" and objectives.ttft_s is None:
        raise ConfigError("--autoscaling latency needs an objective: add --ttft-ms", field="objectives")
    if not settings.min_replicas <= num_replicas <= settings.max_replicas:
        raise ConfigError(
            f"{num_replicas} replicas to begin with are not between --min-replicas {settings.min_replicas} "
            f"and --max-replicas {settings.max_replicas}: change one of them",
            field="replicas",
        )


def _scaler(settings: AutoscalingSettings, objectives: Objectives) -> Autoscaler:
    """One that has seen nothing yet."""
    low, high, idle_s = settings.min_replicas, settings.max_replicas, settings.idle_timeout
    if settings.policy == "ongoing_requests":
        return OngoingRequestsScaler(low, high, target=settings.target_ongoing_requests, idle_timeout_s=idle_s)
    assert objectives.ttft_s is not None
    return LatencyScaler(Goals(low, high, objectives.ttft_s, settings.target_kv_usage, idle_s))


def _plot_path(plot: str) -> Path:
    path = Path(plot).expanduser()
    if path.suffix not in PLOT_SUFFIXES:
        raise ConfigError(f"cannot plot to {plot}: use a file name that ends in {' or '.join(PLOT_SUFFIXES)}",
                          field="plot")  # fmt: skip
    if not path.resolve().parent.is_dir():
        raise ConfigError(f"cannot plot to {plot}: there is no folder {path.resolve().parent}", field="plot")
    return path


def _names(policies: str | None) -> list[str]:
    if policies is None:
        return list(POLICIES)
    if policies == "all":
        return list(SIMULATED_POLICIES)
    names = [name for part in policies.split(",") if (name := part.strip())]
    if not names:
        raise ConfigError(f"no policy is named: use some of {', '.join(SIMULATED_POLICIES)}, or all", field="policy")
    return list(dict.fromkeys(names))


def _make(name: str, seed: int) -> Policy:
    """The policy of that name, a peer's too, its chance made repeatable. Raises ConfigError."""
    maker = SIMULATED_POLICIES.get(name)
    if maker is not None:
        return maker(seed=seed) if "seed" in inspect.signature(maker).parameters else maker()
    if ":" not in name:
        raise ConfigError(
            f"there is no policy {name!r}: use some of {', '.join(SIMULATED_POLICIES)}, "
            f"or a class of your own as package.module:Class",
            field="policy",
        )
    return make_policy(name)


def _progress_of(name: str) -> Callable[[int, int], None]:
    def show(num_done: int, num_requests: int) -> None:
        if sys.stderr.isatty():
            print(f"\r{name}: {num_done:,} of {num_requests:,} requests", end="", file=sys.stderr, flush=True)

    return show


def _finish_progress(name: str, wall_s: float) -> None:
    start = "\r\x1b[K" if sys.stderr.isatty() else ""
    print(f"{start}{name}: {wall_s:.1f} s", file=sys.stderr, flush=True)


def lines(comparison: Comparison) -> Iterator[str]:
    """The comparison as people read it."""
    trace, profile, reports = comparison.trace, comparison.profile, comparison.reports
    minutes = trace.requests[-1].arrival_s / 60
    yield (
        f"{trace.name}: {len(trace.requests):,} requests in {minutes:,.1f} minutes, "
        f"{trace.num_prompt_tokens / len(trace.requests):,.0f} prompt tokens each"
    )
    yield f"{comparison.num_replicas} replicas of {profile.name}: {profile.kv_tokens:,} KV tokens each"
    yield f"goodput: {_objective(comparison.objectives)}"
    yield ""
    yield from _table(comparison, reports)
    yield ""
    yield "* best of its column. Reference: one LRU cache that all replicas share, of their memory and of any size."
    speedups = [report.speedup for report in reports.values() if report.speedup is not None]
    if speedups:
        yield f"Simulated {min(speedups):,.0f} to {max(speedups):,.0f} times faster than real time."


def _objective(objectives: Objectives) -> str:
    parts = []
    if objectives.ttft_s is not None:
        parts.append(f"first token within {objectives.ttft_s * 1e3:g} ms")
    if objectives.tpot_s is not None:
        parts.append(f"{objectives.tpot_s * 1e3:g} ms a token after it")
    return ", ".join(parts) or "requests that were served, as no objective is given (--ttft-ms, --tpot-ms)"


def _table(comparison: Comparison, reports: dict[str, PolicyReport]) -> Iterator[str]:
    columns = [column for column in _COLUMNS if any(column.cell(report) is not None for report in reports.values())]
    cells = [_cells(column, list(reports.values())) for column in columns]
    blank = [""] * (len(columns) - 1)
    rows = [
        ["policy", *(f"{column.title} " for column in columns)],
        *([name, *row] for name, *row in zip(reports, *cells, strict=True)),
        ["(pooled cache)", f"{comparison.pooled_hit_rate:.1%} ", *blank],
        ["(endless cache)", f"{comparison.unbounded_hit_rate:.1%} ", *blank],
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for name, *row in rows:
        yield "  ".join([name.ljust(widths[0]), *(c.rjust(w) for c, w in zip(row, widths[1:], strict=True))]).rstrip()


def _cells(column: _Column, reports: Sequence[PolicyReport]) -> list[str]:
    """A column with a star at the best value, unless all are alike."""
    values = [column.cell(report) for report in reports]
    texts = ["-" if value is None else column.format.format(value) for value in values]
    order = -1.0 if column.is_more_better else 1.0
    best = min(range(len(values)), key=lambda i: math.inf if (value := values[i]) is None else order * value)
    is_told = len(set(texts)) > 1
    return [text + ("*" if is_told and text == texts[best] else " ") for text in texts]
