"""Which shapes (tensor_parallel x pipeline_parallel) a model can take on given devices. Pure arithmetic, no torch.

A shape fits if every device holds its rank's weights, activations and share of a KV pool for at least one request.
Without kv_memory_bytes, memory_fraction of a device may be used; the rest is for what is not counted here: the CUDA
context, NCCL's buffers, fragmentation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from operator import add

from shoal.engine.config import ConfigError, EngineConfig, EngineOptions, Machine, resolve
from shoal.engine.memory.kv_layout import blocks_needed, check_pool
from shoal.engine.models.registry import read_draft_config, read_model_config
from shoal.engine.sizing import ModelSizing, RankMemory, group_block_bytes, most_blocks

_NODE_DEVICES = 8  # that a node is taken to have where nobody says
_SHOWN = 5  # shapes in a message
_NEARLY_MOST = 0.9  # KV tokens within a tenth of the most count as equal


@dataclass(frozen=True, slots=True)
class Devices:
    """What ranks can be placed on: nodes alike, of GPUs that are each a `machine`, or of one CPU whose cores and memory
    the ranks share.
    """

    machine: Machine
    per_node: int  # GPUs, or cores
    num_nodes: int = 1

    @property
    def num_devices(self) -> int:
        return self.per_node * self.num_nodes

    def num_replicas(self, tensor_parallel: int, pipeline_parallel: int) -> int:
        """Groups of this shape that find a place, the tensor ranks of a stage on one node. A CPU node has one group."""
        if self.machine.device == "cpu":
            return self.num_nodes if tensor_parallel * pipeline_parallel <= self.per_node else 0
        return self.num_nodes * (self.per_node // tensor_parallel) // pipeline_parallel

    def is_used_up(self, report: ShapeReport) -> bool:
        """Whether the replicas of a shape leave no GPU idle."""
        return self.machine.device == "cpu" or report.num_replicas * report.num_ranks == self.num_devices


@dataclass(frozen=True, slots=True)
class ShapeReport:
    """What one shape needs and gives. `refusal` says why it cannot be; then there are no blocks and no replicas."""

    tensor_parallel: int
    pipeline_parallel: int
    ranks: tuple[RankMemory, ...] = field(repr=False)  # stage by stage; none if the model cannot be split so
    block_size: int
    num_blocks: int = 0  # KV blocks of every rank, block 0 included
    max_model_len: int = 0  # the longest request that the pool holds
    full_requests: int = 0  # requests of the length asked for that the pool holds at once
    num_replicas: int = 0
    refusal: ConfigError | None = None

    @property
    def num_ranks(self) -> int:
        return self.tensor_parallel * self.pipeline_parallel

    @property
    def fits(self) -> bool:
        return self.refusal is None

    @property
    def kv_tokens(self) -> int:
        """Of one replica; block 0 is never handed out."""
        return max(self.num_blocks - 1, 0) * self.block_size

    @property
    def weight_bytes(self) -> int:
        """Of the rank that has most of it."""
        return max((rank.weight_bytes for rank in self.ranks), default=0)

    @property
    def activation_bytes(self) -> int:
        """Of the rank that has most of it."""
        return max((rank.activation_bytes for rank in self.ranks), default=0)

    @property
    def kv_bytes(self) -> int:
        """Of the rank that has most of it."""
        return max((rank.kv_bytes_per_token for rank in self.ranks), default=0) * self.block_size * self.num_blocks


def planned_config(options: EngineOptions, machine: Machine) -> EngineConfig:
    """As `resolve`, for a machine that need not be this one. Reads the checkpoint's headers. Raises ConfigError."""
    return resolve(options, read_model_config(options.model), machine, read_draft_config(options))


def shape_reports(config: EngineConfig, devices: Devices) -> list[ShapeReport]:
    """Every shape that has a place on the devices, fewest ranks first, whether it fits or not."""
    sizing = ModelSizing(config)
    shapes = [
        (tensor, pipeline)
        for tensor in range(1, devices.per_node + 1)
        for pipeline in range(1, devices.num_devices // tensor + 1)
        if devices.num_replicas(tensor, pipeline)
    ]
    shapes.sort(key=lambda shape: (shape[0] * shape[1], shape[1]))
    return [_report(config, sizing, shape, devices) for shape in shapes]


def best_shape(reports: Sequence[ShapeReport], devices: Devices) -> ShapeReport | None:
    """The shape to begin with, None if none fits. It leaves no device idle if that can be, has the fewest ranks that
    hold a request of full length (or of most length, if none does), and of those that give nearly the most KV tokens
    over all replicas the fewest stages.
    """
    fitting = [report for report in reports if report.fits]
    if not fitting:
        return None
    fitting = [report for report in fitting if devices.is_used_up(report)] or fitting
    longest = max(report.max_model_len for report in fitting)
    fitting = [report for report in fitting if report.max_model_len == longest]
    fewest = min(report.num_ranks for report in fitting)
    fitting = [report for report in fitting if report.num_ranks == fewest]
    most = max(report.kv_tokens * report.num_replicas for report in fitting)
    fitting = [report for report in fitting if report.kv_tokens * report.num_replicas >= _NEARLY_MOST * most]
    return min(fitting, key=lambda report: report.pipeline_parallel)


def check_shape(config: EngineConfig, machine: Machine, *, ranks_on_host: int | None = None) -> None:
    """Raise ConfigError, saying which shapes fit and the KV tokens of each, if the shape of `config` does not. Another
    one names the KV pool that was asked for and cannot be.

    `machine` stands for each of the devices that the ranks will run on. ranks_on_host: ranks that share the memory of a
    CPU host; otherwise all of them.
    """
    sizing = ModelSizing(config)
    wanted = (config.tensor_parallel, config.pipeline_parallel)
    ranks_on_host = ranks_on_host or config.num_ranks
    hosts = -(-config.num_ranks // ranks_on_host)
    devices = Devices(machine, max(_NODE_DEVICES, ranks_on_host), num_nodes=hosts)
    refusal = _report(config, sizing, wanted, devices, ranks_on_host).refusal
    if refusal is None:
        return
    if refusal.field not in ("tensor_parallel", "pipeline_parallel"):
        raise refusal
    others = [report for report in shape_reports(config, devices) if report.fits]
    others.sort(
        key=lambda report: (
            config.model.num_heads % report.tensor_parallel > 0,  # tensor ranks with more to do than others
            abs(report.num_ranks - config.num_ranks),
            report.pipeline_parallel,
        )
    )
    raise ConfigError(f"{refusal}. {_fitting(others[:_SHOWN])}", field=refusal.field)


def _report(
    config: EngineConfig,
    sizing: ModelSizing,
    shape: tuple[int, int],
    devices: Devices,
    ranks_on_host: int | None = None,
) -> ShapeReport:
    tensor_parallel, pipeline_parallel = shape
    stage_layers = config.stage_layers if shape == (config.tensor_parallel, config.pipeline_parallel) else None
    config = replace(
        config,
        tensor_parallel=tensor_parallel,
        pipeline_parallel=pipeline_parallel,
        stage_layers=stage_layers,
    )
    report = ShapeReport(tensor_parallel, pipeline_parallel, (), config.block_size)
    try:
        ranks = sizing.group(tensor_parallel, pipeline_parallel, stage_layers)
        report = replace(report, ranks=ranks)
        shares_memory = config.device == "cpu"
        pooled = _pooled(ranks, (ranks_on_host or len(ranks)) if shares_memory else 1)
        num_blocks = min(_num_blocks(config, pool, devices.machine.free_bytes) for pool in pooled)
        max_model_len = check_pool(config, num_blocks)
    except ConfigError as refusal:
        return replace(report, refusal=refusal)
    return replace(
        report,
        num_blocks=num_blocks,
        max_model_len=max_model_len,
        full_requests=(num_blocks - 1) // blocks_needed(config.max_model_len, config.block_size),
        num_replicas=devices.num_replicas(*shape),
    )


def _pooled(ranks: Sequence[RankMemory], size: int) -> list[RankMemory]:
    """The needs of ranks that share a memory, `size` of them each, added up."""
    return [reduce(add, ranks[start : start + size]) for start in range(0, len(ranks), size)]


def _num_blocks(config: EngineConfig, pool: RankMemory, memory_bytes: int) -> int:
    """KV blocks beside everything else in one memory. Raises ConfigError if it is too small."""
    fixed = pool.weight_bytes + pool.activation_bytes
    block_bytes = pool.kv_bytes_per_token * config.block_size
    needs = f"{gib(pool.weight_bytes)} of weights and {gib(pool.activation_bytes)} of activations"
    place = "a host" if config.device == "cpu" else "a device"
    num_blocks = config.num_blocks
    if num_blocks is None and config.kv_memory_bytes is not None:
        num_blocks = min(config.kv_memory_bytes // group_block_bytes(config), most_blocks(config))
    if num_blocks is not None:
        if fixed > memory_bytes:
            raise ConfigError(f"{needs} are more than the {gib(memory_bytes)} of {place}", field=_split_field(config))
        if fixed + num_blocks * block_bytes > memory_bytes:
            name = "kv_memory_bytes" if config.num_blocks is None else "num_blocks"
            raise ConfigError(
                f"{needs} and {gib(num_blocks * block_bytes)} of KV pool are more than the {gib(memory_bytes)} of "
                f"{place}: set {name} to less, or leave it out",
                field=name,
            )
        return num_blocks
    usable = int(memory_bytes * config.memory_fraction)
    is_explicit = config.is_max_model_len_explicit
    least_tokens = config.max_model_len if is_explicit else min(config.max_model_len, 2 * config.block_size)
    least_blocks = blocks_needed(least_tokens, config.block_size) + 1
    if fixed + least_blocks * block_bytes > usable:
        raise ConfigError(
            f"{needs} leave no room for a request of {least_tokens} tokens ({gib(least_blocks * block_bytes)}) in the "
            f"{gib(usable)} that may be used of {place}",
            field=_split_field(config),
        )
    return min((usable - fixed) // block_bytes, most_blocks(config))


def _split_field(config: EngineConfig) -> str:
    """The setting to change where the ranks of a shape are too large."""
    return "tensor_parallel" if config.tensor_parallel >= config.pipeline_parallel else "pipeline_parallel"


def _fitting(reports: Sequence[ShapeReport]) -> str:
    if not reports:
        return "No other shape fits such devices: use a smaller dtype or model, or devices with more memory"
    shown = (
        f"{report.tensor_parallel} x {report.pipeline_parallel} ({report.kv_tokens:,} KV tokens)" for report in reports
    )
    return f"Shapes that fit (tensor_parallel x pipeline_parallel): {', '.join(shown)}"


def gib(num_bytes: int) -> str:
    """As people read it."""
    return f"{num_bytes / 2**30:.1f} GiB" if num_bytes >= 0.95 * 2**30 else f"{num_bytes / 2**20:.3g} MiB"
