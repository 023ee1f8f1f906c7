"""Seconds on the device, and what the device can do at best."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

REPEATS = 5


@dataclass(frozen=True, slots=True)
class Limits:
    """What was measured of the device, the best of some trials."""

    bytes_per_s: float
    bfloat16_flops: float

    def seconds(self, num_bytes: float, flops: float = 0.0) -> float:
        """The least time for so much memory traffic beside so many operations."""
        return max(num_bytes / self.bytes_per_s, flops / self.bfloat16_flops)


def device_seconds(run: Callable[[int], object], calls: int = 8) -> float:
    """Median time of `run(i)`, i counting from 0 to `calls`. On a GPU the calls are one graph: no launch is in it."""
    if not torch.cuda.is_available():
        start = time.perf_counter()
        run(0)
        return time.perf_counter() - start
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        run(0)  # kernels are compiled
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for index in range(calls):
            run(index)
    graph.replay()
    times = []
    for _ in range(REPEATS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(float(begin.elapsed_time(end)) * 1e-3 / calls)
    return statistics.median(times)


def measure_limits(device: torch.device, *, num_bytes: int, size: int) -> Limits:
    """num_bytes: memory that is read, or copied half to half; size: of square matrices."""
    source, target = torch.ones(2, num_bytes // 8, device=device)  # float32
    read = source.nbytes / device_seconds(lambda _: source.sum(), calls=4)
    copied = 2 * source.nbytes / device_seconds(lambda _: target.copy_(source), calls=4)
    a, b = (torch.randn(size, size, device=device).bfloat16() for _ in range(2))  # [size, size]
    flops = 2 * size**3 / device_seconds(lambda _: a @ b, calls=4)
    return Limits(max(read, copied), flops)


def idle_share(run: Callable[[], object]) -> float | None:
    """Share of the time in which the device had nothing to do for more than 5 µs; None where it cannot be traced.

    Shorter gaps are those between kernels of one graph.
    """
    if not torch.cuda.is_available():
        return None
    from torch.autograd import DeviceType  # type: ignore[attr-defined]
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        run()
        torch.cuda.synchronize()
    spans: list[tuple[float, float]] = sorted(
        (event.time_range.start, event.time_range.end)  # µs
        for event in trace.events() or ()
        if event.device_type == DeviceType.CUDA
    )
    if not spans:
        return None
    idle, busy_until = 0.0, spans[0][1]
    for start, end in spans:
        if start - busy_until > 5.0:
            idle += start - busy_until
        busy_until = max(busy_until, end)
    return idle / (busy_until - spans[0][0])


def largest_difference(a: Tensor, b: Tensor) -> float:
    """|a - b| as a share of 1 + |b|."""
    return float(((a.float() - b.float()).abs() / (1 + b.float().abs())).max())
