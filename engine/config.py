"""What a replica is told, what it is, and what was decided: three frozen values and the one function between them.

`EngineOptions` is what a user may set, with None for "decide for me". `ModelConfig` holds the facts of a checkpoint
and `Machine` those of the host or device. `resolve()` turns the three into an `EngineConfig` in which nothing is open;
no default is decided anywhere else and no config is written to after construction.

Standard library only: the host half of the engine never imports torch.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, get_args

Device = Literal["cpu", "cuda"]
DTypeName = Literal["float32", "bfloat16", "float16"]
SchedulingPolicy = Literal["shortest_first", "fcfs", "priority"]
Quantization = Literal["none", "gguf"]
SpeculativeMethod = Literal["ngram", "suffix", "draft_model"]

DTYPE_BYTES: Mapping[str, int] = {"float32": 4, "bfloat16": 2, "float16": 2}
DTYPE_ALIASES: Mapping[str, DTypeName] = {
    "float32": "float32", "fp32": "float32", "f32": "float32",
    "bfloat16": "bfloat16", "bf16": "bfloat16",
    "float16": "float16", "fp16": "float16", "f16": "float16", "half": "float16",
}  # fmt: skip

DEFAULT_CPU_KV_BYTES = 2 * 2**30
MAX_SPECULATIVE_TOKENS = 64


class ConfigError(ValueError):
    """A setting, a checkpoint or a machine that cannot work, with the way out in the message.

    `field` names the setting to change (or "model" for a checkpoint that cannot be loaded).
    """

    def __init__(self, message: str, *, field: str = "model") -> None:
        super().__init__(message)
        self.field = field


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeculativeOptions:
    """Speculative decoding: where drafts come from, and how many there may be. It never changes what is generated.

    method: "ngram" continues the last few tokens as they went on before in the same request; "suffix" looks at the
        longest such match, and at what the replica has generated lately too; "draft_model" asks a smaller model.
    num_speculative_tokens: drafts of one request in one step, at most.
    prompt_lookup_min, prompt_lookup_max: "ngram" looks for the last so many tokens, the most first; "suffix" wants a
        match of at least the first.
    suffix_history_tokens: "suffix" remembers so many generated tokens of the replica, for each cache salt apart.
    model: "draft_model": a checkpoint with the same vocabulary; it guesses as far as its own positions go.
    draft_tensor_parallel: "draft_model": ranks that share it, 1 or as many as share the model itself.
    adaptive: draft as much as pays, judged by what was accepted and what steps cost; otherwise always as much as there
        is.
    """

    method: SpeculativeMethod
    num_speculative_tokens: int = 8
    prompt_lookup_min: int = 2
    prompt_lookup_max: int = 5
    suffix_history_tokens: int = 65536
    model: str | None = None
    draft_tensor_parallel: int = 1
    adaptive: bool = True

    def __post_init__(self) -> None:
        """Raises ConfigError."""
        if self.method not in get_args(SpeculativeMethod):
            raise _speculative_error(f"method must be one of {', '.join(get_args(SpeculativeMethod))}", self.method)
        if not 1 <= self.num_speculative_tokens <= MAX_SPECULATIVE_TOKENS:
            raise _speculative_error(
                f"num_speculative_tokens must be between 1 and {MAX_SPECULATIVE_TOKENS}", self.num_speculative_tokens
            )
        if not 1 <= self.prompt_lookup_min <= self.prompt_lookup_max:
            raise _speculative_error(
                "prompt_lookup_min must be at least 1 and at most prompt_lookup_max",
                f"{self.prompt_lookup_min} and {self.prompt_lookup_max}",
            )
        if self.suffix_history_tokens < 0:
            raise _speculative_error("suffix_history_tokens must be at least 0", self.suffix_history_tokens)
        if self.draft_tensor_parallel < 1:
            raise _speculative_error("draft_tensor_parallel must be at least 1", self.draft_tensor_parallel)
        if (self.method == "draft_model") != (self.model is not None):
            raise _speculative_error('method "draft_model" needs a model, and no other method takes one', self.model)

    @classmethod
    def of(cls, value: SpeculativeOptions | Mapping[str, Any] | str | None) -> SpeculativeOptions | None:
        """From a method's name, or a mapping of the fields above. Raises ConfigError."""
        if value is None or isinstance(value, SpeculativeOptions):
            return value
        given = {"method": value} if isinstance(value, str) else dict(value)
        known = [field.name for field in fields(cls)]
        for name in given:
            if name not in known:
                raise _speculative_error(f"it takes {', '.join(known)}", name)
        if "method" not in given:
            raise _speculative_error(f"method is missing: one of {', '.join(get_args(SpeculativeMethod))}", value)
        return cls(**given)


def _speculative_error(message: str, value: object) -> ConfigError:
    return ConfigError(f"speculative: {message}, got {value!r}", field="speculative")


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """What a user may set for one replica. None means: decided by `resolve()`.

    model: a directory with config.json and safetensors, or a .gguf file.
    dtype: "auto" (the checkpoint's own, bfloat16 where that is quantized), or any key of DTYPE_ALIASES.
    quantization: "none" expands quantized weights to `dtype` when they are loaded; "gguf" keeps those of a GGUF file in
        4 and 8 bits and rounds what they are multiplied with to 8: less memory and more tokens per second on a CPU.
    device: "auto" (cuda if there is one), "cpu" or "cuda".
    max_model_len: prompt plus generated tokens of one request, at most.
    block_size: tokens per KV block.
    kv_memory_bytes: memory for the KV pool; otherwise `memory_fraction` of what is free after the weights.
    num_blocks: exact size of the KV pool in blocks, for tests and experiments; overrides kv_memory_bytes.
    max_step_tokens: the token budget of one step.
    max_running_requests: requests that hold KV at once.
    watermark: share of the pool that admission leaves free, so that running requests can grow.
    scheduling_policy: which prompts are computed first. "shortest_first": those with the fewest tokens to compute,
        within bounds, and a lower priority value is worth a head start; "fcfs": in order of arrival; "priority": lower
        values first, then arrival.
    ageing_s: with policy "priority", waiting this long outweighs one priority level.
    tensor_parallel: ranks that share every layer (heads, MLP features, vocabulary).
    pipeline_parallel: stages, each with its share of the layers. The replica has tensor_parallel * pipeline_parallel
        ranks; kv_memory_bytes is of all of them together.
    stage_layers: layers of each stage, in order; otherwise dealt as evenly as they go.
    async_scheduling: plan the next step while one runs; by default wherever the ranks do not share the coordinator's
        thread.
    cuda_graphs: on a GPU that is alone, record what a decode step launches and launch it at once.
    num_threads: CPU threads of each rank.
    speculative: speculative decoding; None is off.
    step_timeout_s: a step that takes longer means that a rank hangs, and the replica is given up.
    heartbeat_timeout_s: a rank that is silent for so long counts as dead.
    """

    model: str
    dtype: str = "auto"
    quantization: Quantization = "none"
    device: str = "auto"
    max_model_len: int | None = None
    block_size: int | None = None
    kv_memory_bytes: int | None = None
    num_blocks: int | None = None
    memory_fraction: float | None = None
    max_step_tokens: int | None = None
    max_running_requests: int | None = None
    enable_prefix_caching: bool = True
    scheduling_policy: SchedulingPolicy = "shortest_first"
    watermark: float = 0.01
    ageing_s: float = 30.0
    num_threads: int | None = None
    seed: int = 0
    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    stage_layers: tuple[int, ...] | None = None
    async_scheduling: bool | None = None
    cuda_graphs: bool = True
    speculative: SpeculativeOptions | None = None
    step_timeout_s: float = 300.0
    heartbeat_timeout_s: float = 10.0

    @property
    def num_ranks(self) -> int:
        return self.tensor_parallel * self.pipeline_parallel


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Facts of a checkpoint, read from config.json or from GGUF metadata. Counts are of the whole model."""

    path: str
    architecture: str  # as in config.json "architectures", e.g. "LlamaForCausalLM"
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_position: int  # longest position that the checkpoint was made for
    layer_windows: tuple[int | None, ...]  # attention window per layer in tokens, None: full attention
    stored_dtype: DTypeName | Literal["quantized"]
    num_parameters: int  # counted from the stored tensor shapes
    eos_token_ids: tuple[int, ...]
    hf_config: Mapping[str, Any] = field(repr=False)  # the family's own fields, by their config.json names
    stored_types: Mapping[str, str] = field(default_factory=dict, repr=False)  # of a GGUF file: type of each tensor

    @property
    def is_quantized(self) -> bool:
        """Whether it is a GGUF file with quantized weights."""
        return bool(self.stored_types) and self.stored_dtype == "quantized"


@dataclass(frozen=True, slots=True)
class Machine:
    """What one rank runs on."""

    device: Device
    free_bytes: int  # memory that may be used now: available RAM, or free device memory
    num_cores: int
    has_fast_bfloat16: bool = True  # native bf16 products (AVX512-BF16, AMX, any CUDA device since Ampere)


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Everything decided, for one replica."""

    model: ModelConfig
    device: Device
    dtype: DTypeName
    max_model_len: int
    is_max_model_len_explicit: bool
    block_size: int
    num_blocks: int | None  # None: from kv_memory_bytes
    kv_memory_bytes: int | None  # None: memory_fraction of what is free once the weights are loaded
    memory_fraction: float
    max_step_tokens: int
    max_running_requests: int
    enable_prefix_caching: bool
    scheduling_policy: SchedulingPolicy
    watermark: float
    ageing_s: float
    num_threads: int
    seed: int
    tensor_parallel: int
    pipeline_parallel: int
    stage_layers: tuple[int, ...] | None
    async_scheduling: bool
    cuda_graphs: bool
    step_timeout_s: float
    heartbeat_timeout_s: float
    speculative: SpeculativeOptions | None = None
    draft_model: ModelConfig | None = None  # facts of speculative.model
    quantization: Quantization = "none"

    @property
    def dtype_bytes(self) -> int:
        return DTYPE_BYTES[self.dtype]

    @property
    def num_ranks(self) -> int:
        return self.tensor_parallel * self.pipeline_parallel

    @property
    def draft(self) -> EngineConfig | None:
        """The draft model as the last stage runs it: whole, in the same dtype, over blocks of the same size.

        It is quantized where the model is, if its file can be.
        """
        if self.speculative is None or self.draft_model is None:
            return None
        return replace(
            self,
            model=self.draft_model,
            max_model_len=min(self.max_model_len, self.draft_model.max_position),
            tensor_parallel=self.tensor_parallel if self.speculative.draft_tensor_parallel > 1 else 1,
            pipeline_parallel=1,
            stage_layers=None,
            speculative=None,
            draft_model=None,
            quantization=self.quantization if self.draft_model.is_quantized else "none",
        )

    @property
    def max_steps_in_flight(self) -> int:
        """One step for each stage, and one that waits so that no rank does."""
        return self.pipeline_parallel + self.async_scheduling


def resolve(
    options: EngineOptions, model: ModelConfig, machine: Machine, draft_model: ModelConfig | None = None
) -> EngineConfig:
    """Decide every open setting. Pure. Raises ConfigError naming the field that cannot work.

    `draft_model`: the facts of options.speculative.model, where that is set.
    """
    on_cpu = machine.device == "cpu"
    max_model_len = options.max_model_len
    if max_model_len is None:
        max_model_len = model.max_position
    elif max_model_len > model.max_position:
        raise ConfigError(
            f"max_model_len {max_model_len} is longer than the {model.max_position} positions of {model.path}: "
            f"set max_model_len to at most {model.max_position}",
            field="max_model_len",
        )
    for name in ("max_model_len", "block_size", "max_step_tokens", "max_running_requests", "num_threads",
                 "num_blocks", "kv_memory_bytes", "tensor_parallel", "pipeline_parallel"):  # fmt: skip
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ConfigError(f"{name} must be at least 1, got {value}", field=name)
    for name in ("watermark", "memory_fraction"):
        value = getattr(options, name)
        if value is not None and not 0 <= value < 1:
            raise ConfigError(f"{name} must be at least 0 and below 1, got {value}", field=name)
    if options.memory_fraction == 0:
        raise ConfigError("memory_fraction must be above 0", field="memory_fraction")
    for name in ("ageing_s", "step_timeout_s", "heartbeat_timeout_s"):
        if getattr(options, name) <= 0:
            raise ConfigError(f"{name} must be positive, got {getattr(options, name)}", field=name)
    _check_stage_layers(options, model)
    _check_quantization(options, model, machine)
    _check_draft_model(options, model, draft_model)
    if options.scheduling_policy not in get_args(SchedulingPolicy):
        raise ConfigError(
            f"scheduling_policy must be one of {', '.join(get_args(SchedulingPolicy))}, "
            f"got {options.scheduling_policy!r}",
            field="scheduling_policy",
        )
    # Large enough that matrix products run at full rate, small enough that a step does not stall decoding.
    max_step_tokens = options.max_step_tokens or (1024 if on_cpu else 8192)
    max_running_requests = options.max_running_requests or min(64 if on_cpu else 256, max_step_tokens)
    if max_running_requests > max_step_tokens:
        raise ConfigError(
            f"max_running_requests {max_running_requests} is more than max_step_tokens {max_step_tokens}: every "
            f"running request needs a token a step; lower the first or raise the second",
            field="max_running_requests",
        )
    return EngineConfig(
        model=model,
        device=machine.device,
        dtype=_resolve_dtype(options.dtype, model, machine),
        max_model_len=max_model_len,
        is_max_model_len_explicit=options.max_model_len is not None,
        block_size=options.block_size or 16,
        num_blocks=options.num_blocks,
        # A CPU shares its memory with everything else on the host: a modest pool unless told otherwise.
        kv_memory_bytes=options.kv_memory_bytes
        or (min(DEFAULT_CPU_KV_BYTES, machine.free_bytes // 2) if on_cpu and options.memory_fraction is None else None),
        memory_fraction=options.memory_fraction or (0.5 if on_cpu else 0.9),
        max_step_tokens=max_step_tokens,
        max_running_requests=max_running_requests,
        enable_prefix_caching=options.enable_prefix_caching,
        scheduling_policy=options.scheduling_policy,
        watermark=options.watermark,
        ageing_s=options.ageing_s,
        num_threads=options.num_threads or machine.num_cores,
        seed=options.seed,
        tensor_parallel=options.tensor_parallel,
        pipeline_parallel=options.pipeline_parallel,
        stage_layers=options.stage_layers,
        # A single CPU rank computes in the coordinator's own thread: nothing could overlap.
        async_scheduling=not on_cpu or options.num_ranks > 1
        if options.async_scheduling is None
        else options.async_scheduling,
        cuda_graphs=options.cuda_graphs and not on_cpu and options.num_ranks == 1,
        step_timeout_s=options.step_timeout_s,
        heartbeat_timeout_s=options.heartbeat_timeout_s,
        speculative=options.speculative,
        draft_model=draft_model,
        quantization=options.quantization,
    )


def _check_quantization(options: EngineOptions, model: ModelConfig, machine: Machine) -> None:
    if options.quantization not in get_args(Quantization):
        raise ConfigError(
            f"quantization must be one of {', '.join(get_args(Quantization))}, got {options.quantization!r}",
            field="quantization",
        )
    if options.quantization == "none":
        return
    if machine.device != "cpu":
        raise ConfigError(
            'quantization "gguf" runs on CPUs only: set device to "cpu", or quantization to "none" to expand the '
            "weights when they are loaded",
            field="quantization",
        )
    if not model.is_quantized:
        raise ConfigError(
            f'quantization "gguf" keeps the quantized weights of a GGUF file, and {model.path} has none: give a .gguf '
            'file of type Q8_0, Q4_0 or Q4_1, or set quantization to "none"',
            field="quantization",
        )


def _check_stage_layers(options: EngineOptions, model: ModelConfig) -> None:
    layers = options.stage_layers
    if layers is None:
        return
    if len(layers) != options.pipeline_parallel or min(layers, default=0) < 1 or sum(layers) != model.num_layers:
        raise ConfigError(
            f"stage_layers {list(layers)} must give each of {options.pipeline_parallel} stages at least one layer, and "
            f"{model.num_layers} in all: change it, or leave it out to deal the layers evenly",
            field="stage_layers",
        )


def _check_draft_model(options: EngineOptions, model: ModelConfig, draft_model: ModelConfig | None) -> None:
    if options.speculative is None or options.speculative.model is None:
        return
    assert draft_model is not None, "the facts of speculative.model are to be given"
    if draft_model.vocab_size != model.vocab_size:
        raise _speculative_error(
            f"the draft model must have the vocabulary of {model.path}, {model.vocab_size} tokens; "
            f"{draft_model.path} has another one",
            draft_model.vocab_size,
        )
    size = options.speculative.draft_tensor_parallel
    if size not in (1, options.tensor_parallel):
        raise _speculative_error(
            f"draft_tensor_parallel must be 1 or tensor_parallel ({options.tensor_parallel})", size
        )


def _resolve_dtype(name: str, model: ModelConfig, machine: Machine) -> DTypeName:
    if name != "auto":
        if name not in DTYPE_ALIASES:
            raise ConfigError(
                f"dtype {name!r} is not known: use 'auto' or one of {', '.join(sorted(DTYPE_ALIASES))}",
                field="dtype",
            )
        return DTYPE_ALIASES[name]
    stored: DTypeName = "bfloat16" if model.stored_dtype == "quantized" else model.stored_dtype
    if machine.device == "cpu":
        # fp16 products run at a twentieth of the bf16 rate on CPUs; bf16 without hardware support is slower than fp32.
        return "bfloat16" if stored != "float32" and machine.has_fast_bfloat16 else "float32"
    return stored


def count_cores() -> int:
    """Cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
