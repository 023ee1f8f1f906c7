"""The machine that a benchmark ran on: what it is, how fast it can be at best, and where results are kept."""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib.metadata
import json
import os
import platform
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "transformers", "ray", "shoal")
THREAD_VARIABLES = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
TICKS = os.sysconf("SC_CLK_TCK")  # a second
TRIALS = 12  # the best one counts: a limit is what the machine can do when nobody disturbs it


@dataclass(frozen=True, slots=True)
class Workload:
    """What is run. Prompts are random token ids, new ones in every repeat, so that no cache knows them."""

    num_prompt: int = 128
    num_new: int = 64
    request_counts: tuple[int, ...] = (1, 8, 32)
    num_prefill: int = 1024
    repeats: int = 5

    def prompts(self, count: int, length: int, seed: int) -> list[list[int]]:
        numbers = random.Random(f"{count} {length} {seed}")
        return [[numbers.randrange(100, 48_000) for _ in range(length)] for _ in range(count)]


QUICK = Workload(num_prompt=16, num_new=4, request_counts=(1, 4), num_prefill=64, repeats=1)


def options(description: str | None) -> argparse.Namespace:
    """Command line of every benchmark: `workload`, `threads` and `results`."""
    return parse(parser(description))


def parser(description: str | None) -> argparse.ArgumentParser:
    """For a benchmark that adds arguments of its own; `parse` takes it then."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--quick", action="store_true", help="a tiny run that only shows that the script works")
    made.add_argument("--repeats", type=int, help=f"runs to take medians of (default: {Workload().repeats})")
    made.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: %(default)s")
    made.add_argument("--results", type=Path, default=RESULTS, help="folder for the result (default: %(default)s)")
    return made


def parse(made: argparse.ArgumentParser) -> argparse.Namespace:
    given = made.parse_args()
    chosen = QUICK if given.quick else Workload()
    given.workload = Workload(
        chosen.num_prompt, chosen.num_new, chosen.request_counts, chosen.num_prefill, given.repeats or chosen.repeats
    )
    return given


def facts(threads: int) -> dict[str, Any]:
    """The machine and the software, for reading a result later."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "cpu": _line_of("/proc/cpuinfo", "model name") or platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "load_average": os.getloadavg()[0],
        "threads": threads,
        "environment": {name: os.environ.get(name) for name in THREAD_VARIABLES},
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in PACKAGES},
    }


def write_result(folder: Path, name: str, result: Mapping[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text(json.dumps(result, indent=2) + "\n")
    return path


def read_bytes_per_s() -> float:
    """Memory bandwidth, reading: all threads sum up 512 MiB, which no cache holds."""
    data = torch.ones(2**27)  # [numbers] float32
    return data.numel() * data.element_size() / _best_seconds(lambda: data.sum())


def bfloat16_flops() -> float:
    """Floating-point operations per second in a large bfloat16 matrix product, all threads."""
    size = 2048
    a, b = torch.randn(2, size, size).bfloat16()  # [size, size] each
    return 2 * size**3 / _best_seconds(lambda: a @ b)


def processor_seconds(title: str) -> float:
    """User and system time so far of all processes that are called this, or have it in their command."""
    seconds = processor_seconds_of({title: title})[title]
    assert seconds is not None, f"no process is called {title}"
    return seconds


def processor_seconds_of(titles: Mapping[str, str]) -> dict[str, float | None]:
    """The same for each of several, by name. A process belongs to the first title that fits; None where none does."""
    ticks: dict[str, list[int]] = {name: [] for name in titles}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # gone meanwhile
            called, _, rest = (folder / "stat").read_text().partition("(")[2].rpartition(")")
            command = (folder / "cmdline").read_bytes().decode(errors="replace")
            name = next((name for name, title in titles.items() if title == called or title in command), None)
            if name is not None:
                ticks[name] += map(int, rest.split()[11:13])
    return {name: sum(found) / TICKS if found else None for name, found in ticks.items()}


def _best_seconds(run: Callable[[], object]) -> float:
    run()
    times = []
    for _ in range(TRIALS):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


def _line_of(path: str, key: str) -> str | None:
    try:
        lines = Path(path).read_text().splitlines()
    except OSError:
        return None
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(key)), None)
