"""The simulator serves every request once, takes the time that its model says, and does what single steps would."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from shoal.cluster.autoscaling.latency import ClusterSignals
from shoal.cluster.routing.policies import make_policy
from shoal.cluster.simulation.profile import HardwareProfile, parse_profile
from shoal.cluster.simulation.reference import pooled_hit_rate
from shoal.cluster.simulation.report import make_report
from shoal.cluster.simulation.result import Objectives, Served, SimulationResult
from shoal.cluster.simulation.simulator import simulate
from shoal.cluster.simulation.trace import Trace, TracedRequest, load_trace, shared_prefix_trace
from shoal.engine.scheduling.scheduler import Scheduler

DATA = Path(os.environ.get("SHOAL_DATA", Path(__file__).parents[5] / "shared" / "data"))
MOONCAKE = DATA / "traces" / "mooncake_conversation.jsonl"


def profile(kv_tokens: int = 100_000, **others: float) -> HardwareProfile:
    step = {"base": 0.01, "per_prefill_token": 1e-3, "per_decode_token": 1e-3, "per_context_token": 1e-6}
    return parse_profile({"kv_tokens": kv_tokens, "step_s": step, "max_step_tokens": 256, **others})


def trace(*requests: TracedRequest) -> Trace:
    return Trace("test", requests, 16)


def busy_trace(seed: int = 1, num_requests: int = 150) -> Trace:
    return shared_prefix_trace(
        num_requests=num_requests,
        requests_per_s=4.0,
        num_prefixes=6,
        prefix_tokens=400,
        question_tokens=40,
        output_tokens=30,
        seed=seed,
    )


def run(played: Trace, num_replicas: int = 2, policy: str = "prefix_aware", **options: object) -> SimulationResult:
    hardware = options.pop("hardware", profile())
    assert isinstance(hardware, HardwareProfile)
    return simulate(played, hardware, make_policy(policy), num_replicas, **options)  # type: ignore[arg-type]


def test_a_lone_request_takes_the_time_of_its_steps() -> None:
    (served,) = run(trace(TracedRequest(5.0, 300, 3, tuple(range(19)))), 1).requests
    # 256 prompt tokens, then 44 that read the first ones; then two more tokens, which read all that is computed.
    first, second = 0.01 + 0.256, 0.01 + 0.044 + 256e-6
    assert served.ttft_s == pytest.approx(first + second)
    assert served.finished_s == pytest.approx(5.0 + first + second + 2 * 0.011 + 300e-6 + 301e-6)
    assert served.tpot_s == pytest.approx(0.011 + 300.5e-6)


def test_every_request_ends_once_and_a_prefix_is_computed_once_where_it_is_kept() -> None:
    played = busy_trace()
    result = run(played)
    assert sorted(served.arrival_s for served in result.requests) == [r.arrival_s for r in played.requests]
    assert all(served.num_cached in (0, 400) for served in result.requests)
    report = make_report(result, Objectives(), profile())
    assert report.hit_rate is not None
    assert report.hit_rate > 0.8
    assert report.hit_rate <= pooled_hit_rate(played, float("inf"))


@pytest.mark.parametrize("kv_tokens", [100_000, 2_000])
def test_many_steps_at_once_come_to_the_same_as_one_by_one(monkeypatch: pytest.MonkeyPatch, kv_tokens: int) -> None:
    def play() -> list[Served]:
        return sorted(run(busy_trace(num_requests=60), hardware=profile(kv_tokens)).requests, key=lambda s: s.arrival_s)

    leaping = play()
    monkeypatch.setattr(Scheduler, "most_alike_steps", lambda self: 0)
    for one, other in zip(leaping, play(), strict=True):
        assert one.num_cached == other.num_cached
        assert one.ttft_s == pytest.approx(other.ttft_s, abs=1e-6)
        assert one.finished_s == pytest.approx(other.finished_s, abs=1e-6)


def test_what_no_replica_can_hold_is_refused_and_the_rest_served() -> None:
    large = TracedRequest(0.0, 5000, 10, tuple(range(313)))
    small = TracedRequest(0.1, 50, 10, (900, 901, 902, 903))
    result = run(trace(large, small), 1, hardware=profile(kv_tokens=2000))
    assert [(served.num_prompt, served.is_rejected) for served in result.requests] == [(5000, True), (50, False)]


def test_admission_refuses_what_would_be_late_and_the_others_are_hardly_later_than_foreseen() -> None:
    played = shared_prefix_trace(
        num_requests=200, requests_per_s=20.0, num_prefixes=200, prefix_tokens=400, question_tokens=40,
        output_tokens=4, seed=3,
    )  # fmt: skip
    result = run(played, objectives=Objectives(ttft_s=2.0), has_admission=True)
    refused = [served for served in result.requests if served.is_rejected]
    assert 50 < len(refused) < 190
    assert max(served.ttft_s for served in result.requests) < 2.7
    assert max(served.ttft_s for served in run(played).requests) > 20.0


def test_a_client_that_waits_for_its_answer_asks_again() -> None:
    asked = []

    def next_request(served: Served) -> TracedRequest | None:
        asked.append(served.finished_s)
        return TracedRequest(served.finished_s + 1.0, 100, 2, tuple(range(7))) if len(asked) < 5 else None

    result = run(trace(TracedRequest(0.0, 100, 2, tuple(range(7)))), 1, next_request=next_request)
    assert len(result.requests) == 5
    assert [s.arrival_s for s in result.requests[1:]] == pytest.approx([at + 1.0 for at in asked[:4]])


def test_replicas_that_share_a_machine_slow_each_other_down() -> None:
    played = trace(*(TracedRequest(0.0, 256, 2, tuple(range(100 * n, 100 * n + 16))) for n in range(2)))
    alone = run(played, 2).requests
    shared = run(played, 2, hardware=profile(concurrent_replicas=1.0)).requests
    assert max(s.ttft_s for s in shared) == pytest.approx(2 * max(s.ttft_s for s in alone), rel=0.05)


def test_requests_wait_for_the_first_replica_and_none_is_lost_when_replicas_go() -> None:
    def autoscaler(signals: ClusterSignals) -> int:
        return 3 if signals.now_s < 20 else 1

    played = busy_trace()
    result = run(played, 0, autoscaler=autoscaler, hardware=profile(start_s=5.0))
    assert len(result.requests) == len(played.requests)
    assert not any(served.is_rejected for served in result.requests)
    assert min(served.arrival_s + served.ttft_s for served in result.requests) > 5.0
    stopped = sorted(replica.stopped_s for replica in result.replicas if replica.stopped_s is not None)
    assert len(result.replicas) == 3
    assert 20.0 <= stopped[0] <= stopped[1] < stopped[2]
    last = {n: max(s.finished_s for s in result.requests if s.replica == n) for n in range(3)}
    assert all(result.replicas[n].stopped_s >= end - 1e-9 for n, end in last.items())  # type: ignore[operator]


@pytest.mark.slow
@pytest.mark.skipif(not MOONCAKE.exists(), reason=f"needs {MOONCAKE.name}: SHOAL_DATA names the folder above traces/")
def test_mooncake_conversations_hit_as_often_as_in_one_cache_of_all_memory() -> None:
    hardware = parse_profile(
        {
            "kv_tokens": 762_880,
            "step_s": {"base": 0, "per_prefill_token": 1 / 8000, "per_decode_token": 0, "per_context_token": 0},
        }
    )
    played = load_trace(MOONCAKE, speed=2.0)
    aware = make_report(run(played, 16, hardware=hardware), Objectives(), hardware)
    assert aware.hit_rate is not None
    assert aware.ttft_mean_s is not None
    assert aware.hit_rate >= 0.95 * pooled_hit_rate(played, 16 * hardware.kv_tokens)
    assert aware.ttft_mean_s <= 1.08
