"""Ranks as threads of the test's process: real messages, real gloo, real workers, no process to start."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import pytest

from shoal.engine.group.launcher import Launcher, RankHandle, RankStart
from shoal.engine.group.rank import Rank


class ThreadLauncher:
    bind_host = "127.0.0.1"

    def launch(self, starts: Sequence[RankStart]) -> list[RankHandle]:
        return [RankThread(start) for start in starts]


class RankThread:
    def __init__(self, start: RankStart) -> None:
        self._rank = Rank(start, on_lost=lambda reason: None)
        self._thread = threading.Thread(target=self._rank.run, daemon=True)
        self._thread.start()

    def exit_reason(self) -> str | None:
        return None if self._thread.is_alive() else "ended"

    def kill(self) -> None:
        self._rank.stop()


@pytest.fixture
def thread_launcher() -> Callable[[], Launcher]:
    return ThreadLauncher
