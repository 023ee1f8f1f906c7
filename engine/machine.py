"""What this host offers, asked of the operating system. No torch."""

from __future__ import annotations

import os
from pathlib import Path

from shoal.engine.config import Machine, count_cores


def host_machine() -> Machine:
    """The CPU of this host, as one rank would find it."""
    return Machine("cpu", free_host_bytes(), count_cores(), _has_cpu_bfloat16())


def free_host_bytes() -> int:
    """Memory that can be taken without swapping, within this process's cgroup."""
    free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                free = int(line.split()[1]) * 1024
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.exists() and used.exists() and limit.read_text().strip() != "max":
        free = min(free, max(0, int(limit.read_text()) - int(used.read_text())))
    return free


def _has_cpu_bfloat16() -> bool:
    cpuinfo = Path("/proc/cpuinfo")
    flags = cpuinfo.read_text().split() if cpuinfo.exists() else []
    return any(flag in flags for flag in ("avx512_bf16", "amx_bf16", "bf16"))
