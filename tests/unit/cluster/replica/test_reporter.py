"""What a replica tells routers: every event, and its load when it matters and not more often."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from shoal.cluster.channel import LoadReport, decode_load
from shoal.cluster.replica import reporter as reporter_module
from shoal.cluster.replica.reporter import MAX_REPORT_PERIOD_S, MIN_REPORT_PERIOD_S, Reporter
from shoal.engine.load import EngineLoad
from shoal.engine.memory.kv_events import CacheCleared, KVEvent
from shoal.engine.request import RequestId
from shoal.engine.step_time import StepTime

LOAD = EngineLoad(
    prefills=((RequestId("c-0"), 12),), more_prefill_tokens=3, num_running=1, max_running_requests=8, num_waiting=2,
    num_waiting_tokens=5,
    num_decoding=1, num_context_tokens=40, num_free_blocks=7, num_empty_blocks=5, num_blocks=10, block_size=16,
    max_step_tokens=512, step_time=StepTime(0.1, 0.2, 0.3, 0.4), finished_per_s=1.5,
)  # fmt: skip


class Core:
    """The engine's side of an observer."""

    def __init__(self) -> None:
        self.has_work = False
        self.events: list[KVEvent] = []

    def take_kv_events(self) -> list[KVEvent]:
        taken, self.events = self.events, []
        return taken

    def load(self) -> EngineLoad:
        return LOAD


class Publisher:
    def __init__(self) -> None:
        self.events: list[KVEvent] = []
        self.loads: list[LoadReport] = []

    def publish(self, events: Sequence[KVEvent]) -> None:
        self.events += events

    def publish_load(self, load: bytes) -> None:
        self.loads.append(decode_load(load))


class Rig:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(reporter_module.time, "monotonic", lambda: self.now)
        self.core: Any = Core()
        self.publisher: Any = Publisher()
        self.reporter = Reporter(lambda: ("tcp://10.0.0.1:5",))
        self.reporter.start(self.publisher)

    def num_loads_after(self, seconds: float = 0.0) -> int:
        self.now += seconds
        self.reporter.observe(self.core)
        return len(self.publisher.loads)


@pytest.fixture
def rig(monkeypatch: pytest.MonkeyPatch) -> Rig:
    return Rig(monkeypatch)


def test_a_report_says_everything_and_who_calls(rig: Rig) -> None:
    rig.num_loads_after()
    assert rig.publisher.loads == [LoadReport(LOAD, ("tcp://10.0.0.1:5",))]
    assert rig.reporter.load == LOAD


def test_events_are_published_after_every_step_and_none_before_there_is_a_publisher(rig: Rig) -> None:
    late: Any = Core()
    late.events.append(CacheCleared())
    Reporter(tuple).observe(late)
    assert late.events == [CacheCleared()]
    for _ in range(3):
        rig.core.events.append(CacheCleared())
        rig.num_loads_after()
    assert rig.publisher.events == [CacheCleared()] * 3


def test_the_first_and_the_last_work_are_reported_at_once_and_what_is_between_only_so_often(rig: Rig) -> None:
    assert rig.num_loads_after() == 1
    rig.core.has_work = True
    assert rig.num_loads_after() == 2
    assert rig.num_loads_after(MIN_REPORT_PERIOD_S * 0.9) == 2
    assert rig.num_loads_after(MIN_REPORT_PERIOD_S * 0.2) == 3
    rig.core.has_work = False
    assert rig.num_loads_after() == 4
    assert rig.num_loads_after(MIN_REPORT_PERIOD_S * 2) == 4
    assert rig.num_loads_after(MAX_REPORT_PERIOD_S) == 5
