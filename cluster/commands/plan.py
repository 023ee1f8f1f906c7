"""`shoal plan`: what a model needs and which shapes of a group fit given devices. Reads headers and starts nothing."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from shoal.cluster.commands.gpus import NamedDevices, local_devices, parse_gpus
from shoal.cluster.config import ClusterConfig, locate_model
from shoal.engine.config import EngineConfig, EngineOptions, SpeculativeOptions
from shoal.engine.memory.kv_layout import KVLayout, kv_bytes_per_token
from shoal.engine.shapes import ShapeReport, best_shape, gib, planned_config, shape_reports

_RULE = (
    "It leaves no device idle if that can be, and has the fewest ranks that hold a request of full length; of those",
    "that give nearly the most KV tokens over all replicas, the fewest stages.",
)
_COLUMNS = ("TP", "PP", "ranks", "replicas", "weights", "activations", "KV pool", "KV tokens", "full requests")


@dataclass(frozen=True, slots=True)
class Plan:
    """One model on some devices: every shape, and the one to begin with."""

    name: str
    config: EngineConfig
    target: NamedDevices
    reports: Sequence[ShapeReport]
    best: ShapeReport | None

    @property
    def shown(self) -> list[ShapeReport]:
        """Shapes that leave no device idle, and the best one."""
        return [
            report
            for report in self.reports
            if self.target.devices.num_devices % report.num_ranks == 0 or report is self.best
        ]


def plan(config: ClusterConfig, *, gpus: str | None = None, is_json: bool = False) -> int:
    """Print the plan of every model; exit code 0 if each fits somehow. Raises ConfigError."""
    target = local_devices() if gpus is None else parse_gpus(gpus)
    plans = [make_plan(model.name, model.options(locate_model(model.model)), target) for model in config.models]
    if is_json:
        print(json.dumps([as_json(made) for made in plans], indent=2))
    else:
        print("\n\n".join("\n".join(lines(made)) for made in plans))
    return 0 if all(made.best is not None for made in plans) else 1


def make_plan(name: str, options: EngineOptions, target: NamedDevices) -> Plan:
    """Size every shape of one model. Raises ConfigError for a checkpoint or options that cannot work."""
    config = planned_config(options, target.devices.machine)
    reports = shape_reports(config, target.devices)
    return Plan(name, config, target, reports, best_shape(reports, target.devices))


def as_json(made: Plan) -> dict[str, Any]:
    """Everything, all shapes too; sizes in bytes, of the rank that has most."""
    config, devices = made.config, made.target.devices
    return {
        "model": made.name,
        "architecture": config.model.architecture,
        "num_parameters": config.model.num_parameters,
        "dtype": config.dtype,
        "quantization": config.quantization,
        "max_model_len": config.max_model_len,
        "speculative": None if config.speculative is None else asdict(config.speculative),
        "kv_bytes_per_token": kv_bytes_per_token(config),
        "devices": {
            "name": made.target.name,
            "num_nodes": devices.num_nodes,
            "per_node": devices.per_node,
            "memory_bytes": devices.machine.free_bytes,
        },
        "shapes": [_shape(report, is_best=report is made.best) for report in made.reports],
    }


def lines(made: Plan) -> Iterator[str]:
    """The plan as people read it."""
    config, model = made.config, made.config.model
    layout = KVLayout.of(config)
    yield f"{made.name}: {model.architecture}, requests of up to {config.max_model_len:,} tokens"
    yield f"  weights  {_weights(made)}"
    yield (
        f"  KV       {layout.num_layers} layers x 2 x {layout.num_kv_heads} KV heads x {layout.head_dim} x "
        f"{layout.element_bytes} bytes = {layout.bytes_per_token:,} bytes per token, "
        f"{gib(layout.bytes_per_token * config.max_model_len)} for a full request"
    )
    if config.speculative is not None:
        yield f"  drafts   {_drafts(config.speculative)}"
    if (draft := config.draft) is not None:
        draft_bytes, kv_bytes = draft.model.num_parameters * config.dtype_bytes, KVLayout.of(draft).bytes_per_token
        yield f"           {gib(draft_bytes)} of weights and {kv_bytes:,} bytes of KV per token on the last stage"
    yield f"  devices  {_devices(made)}"
    yield ""
    yield from (f"  {line}" for line in _table(made))
    yield ""
    yield "  Weights, activations and KV pool are of the rank that has most; KV tokens and requests of one replica."
    if made.best is None:
        yield "  No shape fits: use more or larger devices, a smaller dtype, or a smaller max_model_len."
        return
    tensor, pipeline = made.best.tensor_parallel, made.best.pipeline_parallel
    yield f"  > is where to begin: tensor_parallel {tensor}, pipeline_parallel {pipeline}."
    yield from (f"    {line}" for line in _RULE)
    hidden = len(made.reports) - len(made.shown)
    if hidden:
        yield f"  Left out: {hidden} whose ranks do not divide the devices; --json has them."


def _weights(made: Plan) -> str:
    config, num_parameters = made.config, made.config.model.num_parameters
    if config.quantization != "none":
        whole = made.reports[0]  # on one rank
        return f"{num_parameters:,} parameters, in 4 and 8 bits where stored so = {gib(whole.weight_bytes)}"
    weight_bytes = num_parameters * config.dtype_bytes
    return f"{num_parameters:,} parameters x {config.dtype_bytes} bytes ({config.dtype}) = {gib(weight_bytes)}"


def _drafts(speculative: SpeculativeOptions) -> str:
    source = speculative.method if speculative.model is None else f"{speculative.method} {speculative.model}"
    adaptive = ", fewer where they do not pay" if speculative.adaptive else ""
    return f"{source}, up to {speculative.num_speculative_tokens} tokens a step{adaptive}"


def _devices(made: Plan) -> str:
    config, devices = made.config, made.target.devices
    memory = gib(devices.machine.free_bytes)
    if config.kv_memory_bytes is not None:
        pool = f"the KV pool of a replica takes {gib(config.kv_memory_bytes)}"
    else:
        usable = gib(int(devices.machine.free_bytes * config.memory_fraction))
        pool = f"{usable} ({config.memory_fraction:.0%}) may be used, the rest is for CUDA contexts and buffers"
    if config.device == "cpu":
        return f"{made.target.name}: {devices.per_node} cores and {memory} free, shared by all ranks; {pool}"
    nodes = f"{devices.num_nodes} nodes of " if devices.num_nodes > 1 else ""
    return f"{nodes}{devices.per_node} x {made.target.name} with {memory} each; {pool}"


def _table(made: Plan) -> Iterator[str]:
    rows = [(_cells(report), report) for report in made.shown]
    widths = [max(map(len, column)) for column in zip(_COLUMNS, *(cells for cells, _ in rows), strict=True)]
    yield "  " + _aligned(_COLUMNS, widths)
    for cells, report in rows:
        mark = ">" if report is made.best else " "
        refused = f"{_aligned(cells[:3], widths)}  {report.refusal}"
        yield f"{mark} {_aligned(cells, widths) if report.fits else refused}"


def _cells(report: ShapeReport) -> tuple[str, ...]:
    shape = (str(report.tensor_parallel), str(report.pipeline_parallel), str(report.num_ranks))
    if not report.fits:
        return (*shape, *("" for _ in _COLUMNS[3:]))
    sizes = (gib(report.weight_bytes), gib(report.activation_bytes), gib(report.kv_bytes))
    return (*shape, str(report.num_replicas), *sizes, f"{report.kv_tokens:,}", str(report.full_requests))


def _aligned(cells: Sequence[str], widths: Sequence[int]) -> str:
    return "  ".join(cell.rjust(width) for cell, width in zip(cells, widths, strict=False))


def _shape(report: ShapeReport, *, is_best: bool) -> dict[str, Any]:
    return {
        "tensor_parallel": report.tensor_parallel,
        "pipeline_parallel": report.pipeline_parallel,
        "num_ranks": report.num_ranks,
        "num_replicas": report.num_replicas,
        "weight_bytes": report.weight_bytes,
        "activation_bytes": report.activation_bytes,
        "kv_bytes": report.kv_bytes,
        "kv_tokens": report.kv_tokens,
        "max_model_len": report.max_model_len,
        "full_requests": report.full_requests,
        "is_best": is_best,
        "refusal": None if report.refusal is None else str(report.refusal),
    }
