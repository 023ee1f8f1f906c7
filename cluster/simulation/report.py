"""What a simulation comes to: the figures that policies are compared by."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from shoal.cluster.simulation.profile import HardwareProfile
from shoal.cluster.simulation.reference import pooled_hit_rate
from shoal.cluster.simulation.result import Objectives, SimulationResult
from shoal.cluster.simulation.trace import Trace


@dataclass(frozen=True, slots=True)
class PolicyReport:
    """Times are of requests that were served; None where there is nothing to tell.

    hit_rate: of their prompt tokens, the share that was not computed.
    goodput: requests per second that were served within the objectives; goodput_share: of all requests.
    usd_per_million_tokens: generated ones.
    speedup: simulated seconds per second that it took.
    """

    hit_rate: float | None
    ttft_mean_s: float | None
    ttft_p50_s: float | None
    ttft_p90_s: float | None
    ttft_p99_s: float | None
    tpot_p50_s: float | None
    tpot_p99_s: float | None
    goodput: float
    goodput_share: float
    rejected: int
    replica_hours: float
    usd_per_million_tokens: float | None
    wall_s: float
    speedup: float | None


@dataclass(frozen=True, slots=True)
class Comparison:
    """One trace under several policies, on the same hardware."""

    trace: Trace
    num_replicas: int
    profile: HardwareProfile
    objectives: Objectives
    results: dict[str, SimulationResult]

    @property
    def reports(self) -> dict[str, PolicyReport]:
        return {name: make_report(result, self.objectives, self.profile) for name, result in self.results.items()}

    @property
    def pooled_hit_rate(self) -> float:
        """Of one cache with the memory of all replicas."""
        return pooled_hit_rate(self.trace, self.num_replicas * self.profile.kv_tokens)

    @property
    def unbounded_hit_rate(self) -> float:
        return pooled_hit_rate(self.trace)

    def as_json(self) -> dict[str, Any]:
        return {
            "trace": {
                "name": self.trace.name,
                "num_requests": len(self.trace.requests),
                "num_prompt_tokens": self.trace.num_prompt_tokens,
                "span_s": self.trace.requests[-1].arrival_s,
            },
            "replicas": self.num_replicas,
            "hardware": self.profile.name,
            "objective": asdict(self.objectives),
            "reference": {
                "pooled_hit_rate": self.pooled_hit_rate,
                "unbounded_hit_rate": self.unbounded_hit_rate,
            },
            "policies": {name: asdict(report) for name, report in self.reports.items()},
        }


def make_report(result: SimulationResult, objectives: Objectives, profile: HardwareProfile) -> PolicyReport:
    served = [request for request in result.requests if not request.is_rejected]
    num_good = sum(objectives.are_met_by(request) for request in served)
    ttfts = sorted(request.ttft_s for request in served)
    tpots = sorted(tpot for request in served if (tpot := request.tpot_s) is not None)
    num_prompt = sum(request.num_prompt for request in served)
    num_output = sum(request.num_output for request in served)
    replica_hours = sum(replica.seconds for replica in result.replicas) / 3600
    has_price = profile.usd_per_hour is not None and num_output > 0
    return PolicyReport(
        hit_rate=sum(request.num_cached for request in served) / num_prompt if num_prompt else None,
        ttft_mean_s=math.fsum(ttfts) / len(ttfts) if ttfts else None,
        ttft_p50_s=quantile(ttfts, 0.5),
        ttft_p90_s=quantile(ttfts, 0.9),
        ttft_p99_s=quantile(ttfts, 0.99),
        tpot_p50_s=quantile(tpots, 0.5),
        tpot_p99_s=quantile(tpots, 0.99),
        goodput=num_good / result.span_s if result.span_s > 0 else 0.0,
        goodput_share=num_good / len(result.requests) if result.requests else 0.0,
        rejected=len(result.requests) - len(served),
        replica_hours=replica_hours,
        usd_per_million_tokens=replica_hours * (profile.usd_per_hour or 0.0) / num_output * 1e6 if has_price else None,
        wall_s=result.wall_s,
        speedup=result.span_s / result.wall_s if result.wall_s > 0 else None,
    )


def quantile(ordered: Sequence[float], share: float) -> float | None:
    """Of sorted values, the one that `share` of them do not exceed, between neighbours by interpolation."""
    if not ordered:
        return None
    place = share * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)
