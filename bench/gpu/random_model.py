"""Models of well-known shapes with random weights made on the device, so that nothing is stored or read."""

from __future__ import annotations

import zlib
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from shoal.engine.config import EngineConfig, EngineOptions, Machine, ModelConfig, resolve
from shoal.engine.executor import ExecutorInfo, RankInfo
from shoal.engine.memory.kv_layout import KVLayout
from shoal.engine.models.decoder import Decoder
from shoal.engine.models.decoder_loader import DecoderLoader
from shoal.engine.models.registry import FAMILIES
from shoal.engine.models.weight_shapes import expected_shapes
from shoal.engine.parallel.collectives import SingleRank
from shoal.engine.parallel.pipeline import SingleStage
from shoal.engine.parallel.topology import SINGLE
from shoal.engine.plan import StepPlan, StepResult
from shoal.engine.runner.cuda_graphs import GraphCapture
from shoal.engine.runner.kv_store import KVStore
from shoal.engine.runner.model_runner import ModelRunner, PendingStep
from shoal.kernels.dispatch import Operations, QuantizedWeight

_COMMON: dict[str, Any] = {"rms_norm_eps": 1e-5, "hidden_act": "silu", "max_position_embeddings": 32768}

# config.json's fields. The one like Mixtral-8x7B has 8 of its 32 layers, so that it fits.
SHAPES: dict[str, dict[str, Any]] = {
    "Llama-3.1-8B": _COMMON | {
        "architectures": ["LlamaForCausalLM"], "hidden_size": 4096, "intermediate_size": 14336,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
        "vocab_size": 128256, "rope_theta": 500000.0,
    },
    "Qwen3-0.6B": _COMMON | {
        "architectures": ["Qwen3ForCausalLM"], "hidden_size": 1024, "intermediate_size": 3072,
        "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128,
        "vocab_size": 151936, "rope_theta": 1000000.0, "tie_word_embeddings": True,
    },
    "Mixtral, 8 layers": _COMMON | {
        "architectures": ["MixtralForCausalLM"], "hidden_size": 4096, "intermediate_size": 14336,
        "num_hidden_layers": 8, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
        "vocab_size": 32000, "rope_theta": 1000000.0, "num_local_experts": 8, "num_experts_per_tok": 2,
    },
}  # fmt: skip
_TINY = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 60, "max_position_embeddings": 64,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class RandomModel:
    """A model and what a step of it costs."""

    config: ModelConfig
    model: Decoder
    weight_bytes: int  # read in a step, with all experts; rows of an embedding table count for nothing
    expert_bytes: int  # of these, those of experts

    def step_bytes(self, num_requests: int, context: int) -> float:
        """Memory read by a step that gives each of so many requests, with so much context, a token."""
        used = 1 - (1 - self._share_of_experts) ** num_requests
        kv = 2 * self.config.num_layers * self.config.num_kv_heads * self.config.head_dim * 2 * context * num_requests
        return self.weight_bytes - self.expert_bytes * (1 - used) + kv

    def step_flops(self, num_requests: int) -> float:
        """Of its matrix products, with the experts that are used."""
        used = self.weight_bytes - self.expert_bytes * (1 - self._share_of_experts)
        return used * num_requests  # 2 bytes and 2 operations each

    @property
    def _share_of_experts(self) -> float:
        """That a token uses."""
        fields = self.config.hf_config
        return int(fields.get("num_experts_per_tok", 1)) / int(fields.get("num_local_experts", 1))


class RandomWeights:
    """A WeightReader: the same numbers for the same name and device, whoever asks."""

    def __init__(self, dtype: torch.dtype, device: torch.device, spread: float) -> None:
        self.dtype = dtype
        self._device = device
        self._spread = spread

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(shape, dtype=dtype or self.dtype, device=self._device)

    def read_quantized(
        self, parts: Sequence[tuple[str, range]], columns: range | None = None
    ) -> QuantizedWeight | None:
        return None

    def read_into(self, out: Tensor, name: str, rows: range | None = None, columns: range | None = None) -> None:
        generator = torch.Generator(self._device).manual_seed(zlib.crc32(f"{name} {rows} {columns}".encode()))
        if "norm" in name:
            out.uniform_(0.5, 1.5, generator=generator)
        else:
            out.normal_(0.0, self._spread, generator=generator)


def make_model(
    name: str, ops: Operations, device: torch.device, *, is_tiny: bool, dtype: torch.dtype = torch.bfloat16
) -> RandomModel:
    """In the shape of SHAPES[name], or a tiny one of its family, whose tokens vary."""
    fields = SHAPES[name] | (_TINY if is_tiny else {})
    family = FAMILIES[fields["architectures"][0]]
    config = ModelConfig(
        path=name,
        architecture=fields["architectures"][0],
        num_layers=fields["num_hidden_layers"],
        hidden_size=fields["hidden_size"],
        num_heads=fields["num_attention_heads"],
        num_kv_heads=fields["num_key_value_heads"],
        head_dim=fields["head_dim"],
        vocab_size=fields["vocab_size"],
        max_position=fields["max_position_embeddings"],
        layer_windows=family.layer_windows(fields),
        stored_dtype="bfloat16",
        num_parameters=0,
        eos_token_ids=(),
        hf_config=fields,
    )
    spec = family.spec(config)
    sizes = {name: torch.Size(shape).numel() for name, shape in expected_shapes(config, spec).items()}
    config = replace(config, num_parameters=sum(sizes.values()))
    model = DecoderLoader(
        config, spec, RandomWeights(dtype, device, 0.2 if is_tiny else 0.02), num_positions=config.max_position,
        device=device, ops=ops, topology=SINGLE, collectives=SingleRank(),
    ).load()  # fmt: skip
    table = 0 if spec.is_tied else sizes[spec.names.embedding]
    experts = sum(size for name, size in sizes.items() if "experts." in name)
    return RandomModel(config, model, 2 * (config.num_parameters - table), 2 * experts)


def make_config(model: RandomModel, **options: Any) -> EngineConfig:
    """For a GPU, whatever runs it."""
    return resolve(EngineOptions(model="", device="cuda", **options), model.config, Machine("cuda", 2**36, 1))


class RandomExecutor:
    """An Executor of one rank over a model that is there. `capture` records decode steps, if it is given."""

    def __init__(
        self,
        config: EngineConfig,
        model: RandomModel,
        ops: Operations,
        device: torch.device,
        capture: GraphCapture | None,
    ) -> None:
        self._config = config
        self._model = model
        self._ops = ops
        self._device = device
        self._capture = capture
        self._in_flight: deque[PendingStep] = deque()

    def start(self) -> ExecutorInfo:
        config, num_blocks = self._config, self._config.num_blocks
        assert num_blocks is not None
        kv = KVStore(KVLayout.of(config), num_blocks, getattr(torch, config.dtype), self._device)
        self._runner = ModelRunner(
            config, config.max_model_len, self._model.model, kv, ops=self._ops, topology=SINGLE,
            collectives=SingleRank(), links=SingleStage(), capture=self._capture,
        )  # fmt: skip
        return ExecutorInfo(num_blocks, (RankInfo(0, 0, "", 0, str(self._device), 0, config.model.num_layers, 0, 0),))

    def submit(self, plan: StepPlan) -> None:
        self._in_flight.append(self._runner.launch(plan))

    def collect(self) -> StepResult:
        return self._in_flight.popleft().wait()

    def check(self) -> None:
        pass

    def close(self) -> None:
        self._in_flight.clear()
        del self._runner
