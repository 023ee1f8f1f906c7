"""A picture of what bench/peers.py measured: engines above, servers below."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

OURS, OTHERS = "#0072B2", "#BBBBBB"


def save_plot(offline: Mapping[str, Any], http: Mapping[str, Any], path: Path) -> None:
    """Of engines only those in 16 bits."""
    engines = [name for name, facts in offline["contestants"].items() if facts["precision"] == "16 bits"]
    with rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "svg.hashsalt": "shoal"}):
        figure = Figure(figsize=(12, 4.5), layout="constrained", facecolor="white")
        FigureCanvasAgg(figure)
        above, below = figure.subplots(2, 4)
        for axes, count in zip(above, (1, 8, 32), strict=False):
            title = "1 request, tokens/s" if count == 1 else f"{count} requests, tokens/s"
            _bars(axes, title, {name: offline[f"requests_{count}"]["tokens_per_s"][name] for name in engines})
        prefill = offline["prefill"]["tokens_per_s"]
        _bars(above[3], f"prefill of {offline['num_prefill']:,}, tokens/s", {name: prefill[name] for name in engines})
        for axes, count in zip(below, (1, 8, 32), strict=False):
            title = "HTTP, 1 client, tokens/s" if count == 1 else f"HTTP, {count} clients, tokens/s"
            _bars(axes, title, http[f"clients_{count}"]["tokens_per_s"])
        _bars(
            below[3],
            "resident memory when ready, GiB",
            {name: b / 2**30 for name, b in http["memory_bytes"].items()},
            "%.1f",
        )
        for axes in (*above[1:], *below[1:]):
            axes.set_yticklabels([])
        figure.savefig(path)


def _bars(axes: Axes, title: str, values: Mapping[str, float], label: str = "%.0f") -> None:
    colours = [OURS if name.startswith("shoal") else OTHERS for name in values]
    bars = axes.barh(list(values), list(values.values()), color=colours)
    axes.bar_label(bars, fmt=label, padding=3)
    axes.invert_yaxis()
    axes.set_title(title, fontsize=9, loc="left")
    axes.set(xlim=(0, 1.2 * max(values.values())), xticks=[])
