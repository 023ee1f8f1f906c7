"""Every process that this one started, directly or not: Ray's daemons, its workers, the HTTP proxy.

Their parents may die before them, and they change their titles (which overwrites their environment), so they are
found as descendants, with orphans handed to this process instead of to init. Linux only: elsewhere nothing is found,
and Ray's own clean-up must do.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import time
from pathlib import Path
from typing import Final

_PR_SET_CHILD_SUBREAPER: Final = 36  # linux/prctl.h
_POLL_S: Final = 0.05
_KILL_TIMEOUT_S: Final = 2.0


def adopt_orphans() -> None:
    """From now on, a descendant whose parent dies becomes a child of this process."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def descendants(ancestor: int | None = None) -> list[int]:
    """Ids of all running processes below that one, by default below this one."""
    children: dict[int, list[int]] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # gone meanwhile
            # "pid (name) state parent ...": the name may hold anything, a parenthesis too.
            state, parent = (folder / "stat").read_text().rpartition(")")[2].split()[:2]
            if state != "Z":
                children.setdefault(int(parent), []).append(int(folder.name))
    found = list(children.get(ancestor or os.getpid(), ()))
    for pid in found:  # grows while it is walked
        found += children.get(pid, ())
    return found


def end_descendants(wait_s: float) -> int:
    """Let the descendants end for `wait_s`, then kill those that have not; answers how many those were."""
    deadline = time.monotonic() + wait_s
    while (left := descendants()) and time.monotonic() < deadline:
        time.sleep(_POLL_S)
    killed = set(left)
    deadline = time.monotonic() + _KILL_TIMEOUT_S
    while left and time.monotonic() < deadline:  # one may start another while we look
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(_POLL_S)
        left = descendants()
        killed.update(left)
    return len(killed)
