"""A program under test: a process with all that it starts, which only runs while it is its turn.

Several of them are loaded at once, on cores that each would take for itself. So those that wait are stopped (SIGSTOP):
they keep their memory, and take no time from the one that is measured. What else runs on the machine is watched, and a
turn that it disturbed is taken again.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

from machine import Workload

from shoal.cluster.commands.processes import descendants

STOP_TIMEOUT_S = 20.0
LOG_TAIL = 3000  # characters
MAX_TRIES = 6  # of a turn
MAX_DISTURBANCE = 0.04  # share of the cores that strangers may have in a turn, beside a tick or two
CALM_S, CALM_TIMEOUT_S = 0.5, 60.0
NUM_CORES = os.cpu_count() or 1
TICKS_PER_S = os.sysconf("SC_CLK_TCK")

T = TypeVar("T")


def num_tries(workload: Workload) -> int:
    """A single round is only for show."""
    return MAX_TRIES if workload.repeats > 1 else 1


class PeerError(RuntimeError):
    """A program ended, did not come up, or answered nonsense. What it had printed is in the message."""


def busy_s() -> float:
    """CPU seconds so far of everything, and those that the machine's host took."""
    names = ("user", "nice", "system", "idle", "iowait", "irq", "softirq", "steal")
    numbers = Path("/proc/stat").read_text().partition("\n")[0].split()[1:]
    ticks = dict(zip(names, map(int, numbers), strict=False))
    return (sum(ticks.values()) - ticks["idle"] - ticks["iowait"]) / TICKS_PER_S


def wait_until_calm() -> None:
    """Until next to nothing runs on the machine, or CALM_TIMEOUT_S have gone by."""
    deadline = time.monotonic() + CALM_TIMEOUT_S
    is_calm = False
    while not is_calm and time.monotonic() < deadline:
        before = busy_s()
        time.sleep(CALM_S)
        is_calm = busy_s() - before <= MAX_DISTURBANCE * CALM_S * NUM_CORES


class Program:
    """A context manager, which ends the program. It runs at first, until the end of its first turn.

    `is_asked`: it has a pipe for `ask`. Otherwise all that it prints goes to its log.
    """

    def __init__(
        self, name: str, command: Sequence[str], environment: Mapping[str, str], *, is_asked: bool = False
    ) -> None:
        self.name = name
        self._log = tempfile.NamedTemporaryFile("w+", prefix="peer-", suffix=".log")  # noqa: SIM115  (end() closes it)
        self._process = subprocess.Popen(
            command,
            env={**os.environ, **environment},
            stdin=subprocess.PIPE if is_asked else subprocess.DEVNULL,
            stdout=subprocess.PIPE if is_asked else self._log,
            stderr=self._log,
            text=True,
            start_new_session=True,  # Ctrl-C is for the benchmark, which then ends its programs
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end()

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        self._signal(signal.SIGCONT)
        try:
            yield
        finally:
            self._signal(signal.SIGSTOP)

    def undisturbed(self, work: Callable[[int], T], *, tries: int) -> T:
        """The result of a turn in which nothing else took the cores; after so many tries, that of the last one. `work`
        is told how often it was tried before.
        """
        for attempt in range(tries):
            with self.turn():
                start, before = time.perf_counter(), self._strangers_s()
                result = work(attempt)
                strangers_s, seconds = self._strangers_s() - before, time.perf_counter() - start
            share = (strangers_s - 5 / TICKS_PER_S) / (seconds * NUM_CORES)
            if share <= MAX_DISTURBANCE or attempt == tries - 1:
                break
            print(f"  {self.name}: again, as other programs took {share:.0%} of the cores", flush=True)
            wait_until_calm()
        return result

    def ask(self, line: str = "") -> str:
        """Write a line, if there is one, and read one. Raises PeerError if the program has ended."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            if line:
                self._process.stdin.write(line + "\n")
                self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise self.error("ended")
        return answer

    def error(self, what: str) -> PeerError:
        log = Path(self._log.name).read_text(errors="replace")
        return PeerError(f"{self.name} {what}. It had printed:\n{log[-LOG_TAIL:]}")

    @property
    def is_running(self) -> bool:
        return self._process.poll() is None

    def memory_bytes(self) -> int:
        """Resident memory of all its processes; what several share counts once (PSS)."""
        total = 0
        for pid in self._processes():
            with contextlib.suppress(OSError):  # gone meanwhile
                lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
                total += sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))
        return total

    def end(self) -> None:
        """Ask it to end, then kill whatever is left of it."""
        processes = self._processes()
        self._signal(signal.SIGCONT)
        if self._process.stdin is not None:
            self._process.stdin.close()
        self._process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(STOP_TIMEOUT_S)
        for pid in {*processes, *self._processes()}:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._process.wait()
        self._log.close()

    def _strangers_s(self) -> float:
        """CPU seconds so far of all that is neither of this program nor of this process."""
        ticks = 0
        for pid in self._processes():
            with contextlib.suppress(OSError):  # gone meanwhile
                fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
                ticks += sum(map(int, fields[11:15]))  # user and system time, its own and that of children that ended
        return busy_s() - ticks / TICKS_PER_S - time.process_time()

    def _processes(self) -> list[int]:
        return [self._process.pid, *descendants(self._process.pid)]

    def _signal(self, number: signal.Signals) -> None:
        """To all of its processes, and to those that they start meanwhile."""
        reached: set[int] = set()
        while left := set(self._processes()) - reached:
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)
            reached |= left
