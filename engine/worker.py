"""One rank: device set-up, loading, the KV pool, steps. And `LocalExecutor`, a single rank in this process."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from pathlib import Path

import torch

from shoal.engine.config import (
    ConfigError,
    Device,
    EngineConfig,
    EngineOptions,
    Machine,
    count_cores,
    resolve,
)
from shoal.engine.executor import ExecutorInfo
from shoal.engine.memory.kv_layout import KVLayout, check_pool
from shoal.engine.models.registry import load_model, read_model_config
from shoal.engine.parallel.collectives import SingleRank
from shoal.engine.parallel.topology import SINGLE, Topology
from shoal.engine.plan import StepPlan, StepResult
from shoal.engine.runner.kv_store import KVStore
from shoal.engine.runner.model_runner import ModelRunner
from shoal.kernels import dispatch

Progress = Callable[[str, int, int], None]  # (what, done, total)


def detect_machine(device: str = "auto") -> Machine:
    """What this process can run on. Raises ConfigError for a device that is not here."""
    if device not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"device {device!r} is not known: use 'auto', 'cpu' or 'cuda'", field="device")
    has_cuda = torch.cuda.is_available()
    if device == "cuda" and not has_cuda:
        raise ConfigError("device 'cuda' was asked for, but torch sees no CUDA device here", field="device")
    if has_cuda and device != "cpu":
        free, _ = torch.cuda.mem_get_info()
        return Machine("cuda", free, count_cores(), torch.cuda.is_bf16_supported())
    return Machine("cpu", _free_host_bytes(), count_cores(), _has_cpu_bfloat16())


def resolve_options(options: EngineOptions) -> EngineConfig:
    """Options to config, for the checkpoint and the machine at hand. Raises ConfigError for what cannot work there."""
    config = resolve(options, read_model_config(options.model), detect_machine(options.device))
    if config.kv_memory_bytes is not None and config.num_blocks is None:  # otherwise known once the weights are loaded
        layout = KVLayout.of(config)
        check_pool(config, layout.blocks_in(config.kv_memory_bytes), layout)
    return config


class Worker:
    """One rank. `load()` brings the weights up, `allocate()` the pool; after both, `execute()` runs steps."""

    def __init__(self, config: EngineConfig, topology: Topology = SINGLE) -> None:
        self._config = config
        self._topology = topology
        self._device = torch.device(config.device)
        self._runner: ModelRunner | None = None

    def load(self, progress: Progress | None = None) -> None:
        """Read this rank's weights. Raises ConfigError."""
        self.use_threads()
        self._ops = dispatch.operations(self._config.device)

        def report(done: int, total: int) -> None:
            if progress is not None:
                progress("loading weights", done, total)

        self._model = load_model(self._config, self._ops, self._topology, SingleRank(), progress=report)
        self._layout = KVLayout.of(self._config, num_layers=len(self._model.layer_range))

    @property
    def weight_bytes(self) -> int:
        return self._model.weight_bytes

    def num_blocks_possible(self) -> int:
        """KV blocks that this rank has memory for. Raises ConfigError if kv_memory_bytes is more than there is."""
        config = self._config
        if config.num_blocks is not None:
            return config.num_blocks
        free = _free_host_bytes() if config.device == "cpu" else torch.cuda.mem_get_info()[0]
        budget = int(free * config.memory_fraction) if config.kv_memory_bytes is None else config.kv_memory_bytes
        if budget > free:
            raise ConfigError(
                f"kv_memory_bytes {budget} is more than the {free} bytes that are free on {config.device}: "
                f"set kv_memory_bytes to less, or leave it out",
                field="kv_memory_bytes",
            )
        # More than every running request at full length plus as much again for cached prefixes is never used.
        most = 2 * config.max_running_requests * -(-config.max_model_len // config.block_size) + 1
        return min(self._layout.blocks_in(budget), most)

    def allocate(self, num_blocks: int) -> int:
        """Make the KV pool; answers its bytes. Raises ConfigError if it cannot hold even one request."""
        config = self._config
        max_model_len = check_pool(config, num_blocks, self._layout)
        kv = KVStore(self._layout, num_blocks, getattr(torch, config.dtype), self._device)
        self._runner = ModelRunner(config, max_model_len, self._model, kv, self._ops, self._device)
        return kv.num_bytes

    def execute(self, plan: StepPlan) -> StepResult:
        assert self._runner is not None, "allocate() comes first"
        return self._runner.execute(plan)

    def use_threads(self) -> None:
        """Give the calling thread its share of cores: OpenMP keeps the count per thread."""
        if self._config.device == "cpu" and torch.get_num_threads() != self._config.num_threads:
            torch.set_num_threads(self._config.num_threads)


class LocalExecutor:
    """One rank in this process: no message leaves it."""

    def __init__(self, config: EngineConfig, progress: Progress | None = None) -> None:
        self._config = config
        self._progress = progress
        self._worker: Worker | None = None

    def start(self) -> ExecutorInfo:
        worker = Worker(self._config)
        worker.load(self._progress)
        num_blocks = worker.num_blocks_possible()
        kv_bytes = worker.allocate(num_blocks)
        self._worker = worker
        return ExecutorInfo(num_blocks, kv_bytes, worker.weight_bytes, _device_name(self._config.device))

    def execute(self, plan: StepPlan) -> StepResult:
        assert self._worker is not None, "start() comes first"
        self._worker.use_threads()
        return self._worker.execute(plan)

    def close(self) -> None:
        self._worker = None


def local_engine(options: EngineOptions) -> Callable[[Progress], tuple[EngineConfig, LocalExecutor]]:
    """For AsyncEngine: one rank in this process. What it makes raises ConfigError for options that cannot work."""

    def make(progress: Progress) -> tuple[EngineConfig, LocalExecutor]:
        config = resolve_options(options)
        return config, LocalExecutor(config, progress)

    return make


def _free_host_bytes() -> int:
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


def _device_name(device: Device) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine()
