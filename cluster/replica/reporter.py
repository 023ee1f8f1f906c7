"""What a replica tells routers of itself: the engine's observer, which hands events and loads to the publisher."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Final

from shoal.cluster.channel import LoadReport, encode_load
from shoal.cluster.replica.kv_publisher import KVPublisher
from shoal.engine.core import EngineCore
from shoal.engine.load import EngineLoad

MIN_REPORT_PERIOD_S: Final = 0.05
MAX_REPORT_PERIOD_S: Final = 1.0


class Reporter:
    """Publishes KV events after every step. Loads go out at once when the engine gets or loses its last work, otherwise
    at most every MIN_REPORT_PERIOD_S, and in idle times every MAX_REPORT_PERIOD_S.
    """

    def __init__(self, gateways: Callable[[], Sequence[str]]) -> None:
        """`gateways`: where those listen that have called this replica."""
        self._gateways = gateways
        self._publisher: KVPublisher | None = None
        self._load: EngineLoad | None = None
        self._reported_s = 0.0
        self._had_work = False

    @property
    def load(self) -> EngineLoad | None:
        """As last reported; None before the first time."""
        return self._load

    def start(self, publisher: KVPublisher) -> None:
        """Begin to publish. Until then the engine keeps its events."""
        self._publisher = publisher

    def observe(self, core: EngineCore) -> None:
        """Called in the engine's thread; never blocks."""
        if self._publisher is None:
            return
        self._publisher.publish(core.take_kv_events())
        now = time.monotonic()
        is_due = now - self._reported_s >= (MIN_REPORT_PERIOD_S if core.has_work else MAX_REPORT_PERIOD_S)
        if is_due or core.has_work != self._had_work:
            self._had_work = core.has_work
            self._reported_s = now
            self._load = core.load()
            self._publisher.publish_load(encode_load(LoadReport(self._load, tuple(self._gateways()))))
