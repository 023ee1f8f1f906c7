"""GPUs by name: what `--gpus 2x8xH100` means, and which ones this host has."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass

from shoal.cluster.config import parse_bytes
from shoal.engine.config import ConfigError, Machine, count_cores
from shoal.engine.machine import host_machine
from shoal.engine.shapes import Devices

# Memory in GB (10**9 bytes) as the data sheets state it: never more than the driver finds.
_DATA_SHEET_GB: Mapping[str, int] = {
    "T4": 16, "V100-16GB": 16, "V100-32GB": 32,
    "L4": 24, "L40": 48, "L40S": 48, "A10": 24, "A10G": 24, "A30": 24, "A40": 48,
    "A100-40GB": 40, "A100-80GB": 80,
    "H100": 80, "H100-80GB": 80, "H100-NVL": 94, "H200": 141, "H200-141GB": 141, "B200": 180,
    "RTX3090": 24, "RTX4090": 24, "RTX5090": 32, "RTXA6000": 48, "RTX6000ADA": 48,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class NamedDevices:
    """Devices, and what one of them is called."""

    name: str
    devices: Devices


def parse_gpus(text: str) -> NamedDevices:
    """ "8xH100", "2x8xH100" (two nodes of eight) or "4x24GiB". Raises ConfigError."""
    match = re.fullmatch(r"(?:(?:(\d+)x)?(\d+)x)?([a-z0-9][a-z0-9. -]*)", text.strip(), re.IGNORECASE)
    if match is None:
        raise ConfigError(f"--gpus {text!r} cannot be read: {_EXAMPLES}", field="gpus")
    num_nodes, per_node = int(match[1] or 1), int(match[2] or 1)
    if num_nodes * per_node == 0:
        raise ConfigError(f"--gpus {text!r} are no GPUs: {_EXAMPLES}", field="gpus")
    return _gpus(match[3], _memory_bytes(match[3]), per_node, num_nodes)


def local_devices() -> NamedDevices:
    """The GPUs of this host, as the NVIDIA driver lists them, or its CPU. Raises ConfigError if GPUs differ."""
    if shutil.which("nvidia-smi") is not None:
        query = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
        listed = subprocess.run(query, capture_output=True, text=True, check=False, timeout=30)
        gpus = listed.stdout.split("\n")[:-1] if listed.returncode == 0 else []
        if len(set(gpus)) > 1:
            raise ConfigError(
                f"this host has GPUs of several kinds ({'; '.join(gpus)}): name those to use, {_EXAMPLES}"
            )
        if gpus:
            name, mebibytes = gpus[0].rsplit(",", 1)
            return _gpus(name, int(mebibytes) * 2**20, len(gpus), 1)
    machine = host_machine()
    return NamedDevices("CPU of this host", Devices(machine, machine.num_cores))


def _gpus(name: str, memory_bytes: int, per_node: int, num_nodes: int) -> NamedDevices:
    return NamedDevices(name, Devices(Machine("cuda", memory_bytes, count_cores()), per_node, num_nodes))


def _memory_bytes(name: str) -> int:
    known = _DATA_SHEET_GB.get(name.upper())
    if known is not None:
        return known * 10**9
    try:
        memory = parse_bytes(name) if name[0].isdecimal() else None
    except ValueError:
        memory = None
    if not isinstance(memory, int):
        raise ConfigError(
            f"--gpus: {name!r} is not a GPU known here ({', '.join(_DATA_SHEET_GB)}): give its memory instead, as in "
            "4x24GiB",
            field="gpus",
        )
    return memory


_EXAMPLES = "write 8xH100, 2x8xH100 for two nodes of eight, or 4x24GiB"
