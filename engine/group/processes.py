"""Ranks as processes of this host."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Sequence
from pathlib import Path

import msgspec

from shoal.engine.config import count_cores
from shoal.engine.group.launcher import RankHandle, RankStart

COMMAND = ("-m", "shoal.engine.group.rank")
LAST_LINES = 5  # of what a rank that ended had printed, quoted in the error
# Of libgomp's threads, which wait for each other between the kernels of a step, some 300,000 times by default. Then a
# step takes ten times as long when another busy process wants a core. This is some 25 us: who waits for a thread whose
# core was taken soon gives it its own.
SPIN_COUNT = "2000"


class ProcessLauncher:
    """Starts each rank as a Python of its own, fresh: the user's main module is not imported again.

    A rank gets its start over a pipe, so that the key shows in no process list. It ends when the pipe closes, which the
    system does however this process ends; Linux's own parent-death signal would come as soon as the *thread* that
    started the rank ends. On CUDA each rank sees one device, in the order of CUDA_VISIBLE_DEVICES.
    """

    def __init__(self, command: Sequence[str] = COMMAND) -> None:
        """`command` is what Python runs; it comes to `rank.run_process()`."""
        self._command = command

    @property
    def bind_host(self) -> str:
        return "127.0.0.1"

    def launch(self, starts: Sequence[RankStart]) -> list[RankHandle]:
        return [RankProcess(start, self._command) for start in starts]


class RankProcess:
    """A rank's process. What it prints goes on to this process's standard error."""

    def __init__(self, start: RankStart, command: Sequence[str]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-P", *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=_environment(start),
            process_group=0,  # Ctrl-C is for the coordinator
        )
        self._last_lines: deque[str] = deque(maxlen=LAST_LINES)
        self._reader = threading.Thread(target=self._forward, name=f"rank-{start.rank}-output", daemon=True)
        self._reader.start()
        assert self._process.stdin is not None
        self._process.stdin.write(msgspec.json.encode(start) + b"\n")
        self._process.stdin.flush()

    @property
    def pid(self) -> int:
        return self._process.pid

    def exit_reason(self) -> str | None:
        code = self._process.poll()
        if code is None:
            return None
        self._reader.join(0.1)  # the rest of what it printed
        how = f"was killed by signal {-code} ({signal.Signals(-code).name})" if code < 0 else f"exited with code {code}"
        return "; ".join([how, *self._last_lines])

    def kill(self) -> None:
        self._process.kill()

    def _forward(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as output:
            for line in output:
                text = line.decode(errors="replace").rstrip()
                if text:
                    self._last_lines.append(text)
                print(text, file=sys.stderr, flush=True)


def _environment(start: RankStart) -> dict[str, str]:
    devices = os.environ.get("CUDA_VISIBLE_DEVICES")
    listed = [str(rank) for rank in range(start.num_ranks)] if devices is None else devices.split(",")
    return {
        "OMP_NUM_THREADS": str(max(1, count_cores() // start.num_ranks)),
        "GOMP_SPINCOUNT": SPIN_COUNT,
        **os.environ,
        # The same modules as here, however this process found them.
        "PYTHONPATH": os.pathsep.join(path or str(Path.cwd()) for path in sys.path),
        "PYTHONUNBUFFERED": "1",
        "CUDA_VISIBLE_DEVICES": listed[start.rank] if start.rank < len(listed) else "",
    }
