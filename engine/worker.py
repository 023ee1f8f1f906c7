"""One rank: device set-up, loading, the KV pool, steps. And `LocalExecutor`, a single rank in this process."""

from __future__ import annotations

import ctypes
import os
import platform
import socket
import time
from collections import deque
from dataclasses import replace

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
from shoal.engine.executor import EngineFactory, ExecutorInfo, Progress, RankInfo
from shoal.engine.machine import free_host_bytes, host_machine
from shoal.engine.memory.kv_layout import KVLayout, check_pool
from shoal.engine.models.registry import Model, load_model, read_draft_config, read_model_config
from shoal.engine.parallel.collectives import Collectives, SingleRank
from shoal.engine.parallel.pipeline import SingleStage, StageLinks
from shoal.engine.parallel.topology import SINGLE, Topology
from shoal.engine.plan import StepPlan, StepResult
from shoal.engine.runner.cuda_graphs import CudaCapture
from shoal.engine.runner.drafter import Drafter
from shoal.engine.runner.kv_store import KVStore
from shoal.engine.runner.model_runner import ModelRunner, PendingStep
from shoal.engine.shapes import check_shape
from shoal.engine.sizing import ModelSizing, group_block_bytes, most_blocks, rank_block_bytes, rank_layout
from shoal.engine.spans import RankWork
from shoal.kernels import dispatch


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
    return host_machine()


def resolve_options(options: EngineOptions) -> EngineConfig:
    """Options to config, for the checkpoint and the machine at hand. Raises ConfigError for what cannot work there."""
    machine = detect_machine(options.device)
    config = resolve(options, read_model_config(options.model), machine, read_draft_config(options))
    check_shape(config, machine)
    return config


def check_options(options: EngineOptions) -> None:
    """Raise ConfigError for a group that cannot work on this host, before its ranks start.

    A GPU is not asked, because that takes memory of it; there the ranks find out before they load.
    """
    if options.device == "cpu" or not torch.cuda.is_available():
        resolve_options(options)


class Worker:
    """One rank. `load()` brings the weights up, `allocate()` the pool; after both, `launch()` starts steps.

    ranks_on_host: ranks of the group that share this host, and with it the memory where the device is a CPU.
    """

    def __init__(
        self,
        config: EngineConfig,
        topology: Topology = SINGLE,
        collectives: Collectives | None = None,
        links: StageLinks | None = None,
        *,
        ranks_on_host: int = 1,
    ) -> None:
        self._config = config
        self._topology = topology
        self._collectives = collectives or SingleRank()
        self._links = links or SingleStage()
        self._ranks_on_host = ranks_on_host
        self._device = torch.device(config.device)
        self._runner: ModelRunner | None = None

    def load(self, progress: Progress | None = None) -> None:
        """Read this rank's weights, those of the draft model too. Raises ConfigError."""
        self.use_threads()
        self._ops = dispatch.operations(self._config.device)

        num_read = 0  # bytes of the model itself, while its draft model is read

        def report(done: int, total: int) -> None:
            if progress is not None:
                progress("loading weights", num_read + done, num_read + total)

        self._model = load_model(self._config, self._ops, self._topology, self._collectives, progress=report)
        self._draft_model: Model | None = None
        if (part := self._draft_part()) is not None:
            num_read = self._model.weight_bytes
            draft, topology, collectives = part
            self._draft_model = load_model(draft, self._ops, topology, collectives, progress=report)
        _trim_heap()

    def _draft_part(self) -> tuple[EngineConfig, Topology, Collectives] | None:
        """This rank's part in the draft model, if it has one."""
        draft, topology = self._config.draft, self._topology.of_draft(self._config)
        if draft is None or topology is None:
            return None
        return draft, topology, self._collectives if topology.tensor_size > 1 else SingleRank()

    @property
    def weight_bytes(self) -> int:
        return self._model.weight_bytes + (0 if self._draft_model is None else self._draft_model.weight_bytes)

    def num_blocks_possible(self) -> int:
        """KV blocks that this rank has memory for. Raises ConfigError if kv_memory_bytes is more than there is."""
        config = self._config
        if config.num_blocks is not None:
            return config.num_blocks
        if config.device == "cpu":
            free = free_host_bytes() // self._ranks_on_host
        else:
            free = torch.cuda.mem_get_info()[0]
        free = max(0, free - ModelSizing(config).rank(self._topology).activation_bytes)
        block_bytes = rank_block_bytes(config, self._topology)
        if config.kv_memory_bytes is None:
            num_blocks = int(free * config.memory_fraction) // block_bytes
        else:
            num_blocks = config.kv_memory_bytes // group_block_bytes(config)
        if num_blocks * block_bytes > free:
            raise ConfigError(
                f"kv_memory_bytes {config.kv_memory_bytes} needs {num_blocks * block_bytes} bytes on {self._name}, "
                f"where {free} are free on {config.device}: set kv_memory_bytes to less, or leave it out",
                field="kv_memory_bytes",
            )
        return min(num_blocks, most_blocks(config))

    def allocate(self, num_blocks: int) -> int:
        """Make the KV pools; answers their bytes. Raises ConfigError if they cannot hold even one request."""
        config = self._config
        max_model_len = check_pool(config, num_blocks)
        kv = self._make_pool(rank_layout(config, self._topology), num_blocks)
        drafter, num_bytes = None, kv.num_bytes
        if (part := self._draft_part()) is not None and self._draft_model is not None:
            draft, topology, collectives = part
            draft_kv = self._make_pool(rank_layout(draft, topology), num_blocks)
            drafter = Drafter(
                draft, self._draft_model, draft_kv, ops=self._ops, topology=topology, collectives=collectives
            )
            num_bytes += draft_kv.num_bytes
        self._runner = ModelRunner(
            config,
            max_model_len,
            self._model,
            kv,
            ops=self._ops,
            topology=self._topology,
            collectives=self._collectives,
            links=self._links,
            drafter=drafter,
            capture=CudaCapture() if config.cuda_graphs else None,
        )
        return num_bytes

    def _make_pool(self, layout: KVLayout, num_blocks: int) -> KVStore:
        return KVStore(layout, num_blocks, getattr(torch, self._config.dtype), self._device)

    def info(self, kv_bytes: int, node: str) -> RankInfo:
        """This rank, loaded, on host `node` with a pool of `kv_bytes`."""
        return RankInfo(
            stage=self._topology.stage,
            tensor_rank=self._topology.tensor_rank,
            node=node,
            pid=os.getpid(),
            device_name=_device_name(self._config.device),
            first_layer=self._model.layer_range.start,
            num_layers=len(self._model.layer_range),
            weight_bytes=self.weight_bytes,
            kv_bytes=kv_bytes,
        )

    def expect(self, plan: StepPlan) -> None:
        """A plan has come that will be launched behind those expected before it."""
        self._links.expect_hidden(plan.num_tokens)

    def launch(self, plan: StepPlan) -> PendingStep:
        """Start a step that was expected, behind those before. On a CPU it is done when this returns."""
        assert self._runner is not None, "allocate() comes first"
        return self._runner.launch(plan)

    @property
    def _name(self) -> str:
        return f"rank {self._topology.rank}" if self._config.num_ranks > 1 else "this machine"

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
        self._in_flight: deque[tuple[PendingStep, float]] = deque()  # and when each was launched
        self._ended = 0.0  # the last step
        self._work = RankWork(SINGLE.name, 0, 0.0, 0.0)

    def start(self) -> ExecutorInfo:
        worker = Worker(self._config)
        worker.load(self._progress)
        num_blocks = worker.num_blocks_possible()
        kv_bytes = worker.allocate(num_blocks)
        self._worker = worker
        return ExecutorInfo(num_blocks, (worker.info(kv_bytes, socket.gethostname()),))

    def submit(self, plan: StepPlan) -> None:
        assert self._worker is not None, "start() comes first"
        self._worker.use_threads()
        self._worker.expect(plan)
        start = time.perf_counter()
        self._in_flight.append((self._worker.launch(plan), start))
        if self._config.device == "cpu":  # done already
            self._count(time.perf_counter() - start)

    def collect(self) -> StepResult:
        pending, start = self._in_flight.popleft()
        result = pending.wait()
        if self._config.device != "cpu":
            start, self._ended = max(start, self._ended), time.perf_counter()
            self._count(self._ended - start)
        return replace(result, ranks=(self._work,))

    def _count(self, seconds: float) -> None:
        self._work = RankWork(self._work.rank, self._work.num_steps + 1, self._work.compute_s + seconds, 0.0)

    def check(self) -> None:
        pass  # there is nobody else who could fail

    def close(self) -> None:
        self._in_flight.clear()
        self._worker = None


def local_engine(options: EngineOptions) -> EngineFactory:
    """One rank in this process."""

    def make(progress: Progress) -> tuple[EngineConfig, LocalExecutor]:
        config = resolve_options(options)
        return config, LocalExecutor(config, progress)

    return make


def _trim_heap() -> None:
    """Give back what loading has freed: glibc keeps pieces of less than 32 MiB, which adds up to a tenth of a model."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _device_name(device: Device) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine()
