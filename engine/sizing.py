"""What each rank of a group needs in memory, from a checkpoint's headers alone. Pure arithmetic, no torch.

Weights are counted exactly as the layers keep them, by one table of their shard rules. Activations are an upper bound
for the largest step.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import NamedTuple

from shoal.engine.config import ConfigError, Device, EngineConfig, ModelConfig
from shoal.engine.memory.kv_layout import KVLayout, blocks_needed
from shoal.engine.models.registry import FAMILIES
from shoal.engine.models.spec import DecoderSpec, GatedMLPSpec, MoESpec
from shoal.engine.models.weight_shapes import layer_shapes
from shoal.engine.models.weights.quantized import BLOCK_BYTES, BLOCK_INPUTS, kept_type
from shoal.engine.parallel.topology import Topology

_FLOAT32_BYTES = 4
_INDEX_BYTES = 64  # of a token: its id, position and slot, int64 each, and copies of them
_HIDDEN_COPIES = 5  # residual, delta of the layer before, what attention added, its norm, and what the MLP adds
# A token's hidden states, for each of its experts: what it gives, and on a CPU also what it got and two orders of both.
_EXPERT_HIDDEN_COPIES: Mapping[Device, int] = {"cpu": 4, "cuda": 1}
_LOGITS_COPIES = 4  # as computed, as processed, as weights of the draw, and in order


@dataclass(frozen=True, slots=True)
class RankMemory:
    """Bytes that one rank needs, or several that share a memory."""

    weight_bytes: int
    kv_bytes_per_token: int
    activation_bytes: int

    def __add__(self, other: RankMemory) -> RankMemory:
        return RankMemory(
            self.weight_bytes + other.weight_bytes,
            self.kv_bytes_per_token + other.kv_bytes_per_token,
            self.activation_bytes + other.activation_bytes,
        )


class _Share(NamedTuple):
    """How tensor ranks divide a weight [out, in]: along `axis`, the features of a rank."""

    axis: int
    features: Callable[[ModelConfig, Topology, int], range]


def _query_features(model: ModelConfig, topology: Topology, whole: int) -> range:
    heads = topology.head_shard(model.num_heads, model.num_kv_heads).heads
    return range(heads.start * model.head_dim, heads.stop * model.head_dim)


def _kv_features(model: ModelConfig, topology: Topology, whole: int) -> range:
    heads = topology.head_shard(model.num_heads, model.num_kv_heads).kv_heads
    return range(heads.start * model.head_dim, heads.stop * model.head_dim)


def _features(model: ModelConfig, topology: Topology, whole: int) -> range:
    return topology.shard(whole)


# The shard rules of engine/layers by the fields of LayerNames. What is not named is whole on every tensor rank.
_SHARES: Mapping[str, _Share] = {
    "q": _Share(0, _query_features),
    "k": _Share(0, _kv_features),
    "v": _Share(0, _kv_features),
    "o": _Share(1, _query_features),
    "gate": _Share(0, _features),
    "up": _Share(0, _features),
    "down": _Share(1, _features),
    "expert_gate": _Share(0, _features),
    "expert_up": _Share(0, _features),
    "expert_down": _Share(1, _features),
}


class _Piece(NamedTuple):
    """A tensor of a layer: its field in LayerNames, its whole shape, and how those of its product are stored in a GGUF
    file, if they are to stay so.
    """

    part: str
    shape: tuple[int, ...]
    is_bias: bool
    stored: tuple[str, ...] = ()

    def num_bytes(self, model: ModelConfig, topology: Topology, dtype_bytes: int) -> int:
        """Those that a rank keeps. Raises ConfigError if the ranks cannot share the tensor."""
        elements = self.elements(model, topology)
        if self.stored:
            axis, features = _SHARES[self.part]
            columns = features(model, topology, self.shape[1]) if axis == 1 else range(self.shape[1])
            return _matrix_bytes(elements, self.stored, columns, dtype_bytes)
        return elements * (_FLOAT32_BYTES if self.part.endswith("norm") else dtype_bytes)

    def elements(self, model: ModelConfig, topology: Topology) -> int:
        """Those that a rank keeps. Raises ConfigError if the ranks cannot share the tensor."""
        whole = math.prod(self.shape)
        if self.part not in _SHARES:
            return whole
        axis, features = _SHARES[self.part]
        if self.is_bias and axis == 1:  # once in the sum over ranks
            return whole if topology.tensor_rank == 0 else 0
        return whole // self.shape[axis] * len(features(model, topology, self.shape[axis]))


def _matrix_bytes(elements: int, stored: tuple[str, ...], columns: range, dtype_bytes: int) -> int:
    kept = kept_type(stored, columns) if stored else None
    return elements * dtype_bytes if kept is None else elements // BLOCK_INPUTS * BLOCK_BYTES[kept]


class ModelSizing:
    """Sizes the ranks of one model, for any shape: the parallel settings of `config` are not looked at."""

    def __init__(self, config: EngineConfig) -> None:
        model = config.model
        family = FAMILIES.get(model.architecture)
        self._config = config
        self._draft = ModelSizing(config.draft) if config.draft is not None else None
        self._spec = family.spec(model) if family is not None else None
        self._stored = model.stored_types if config.quantization == "gguf" else {}
        self._layers = (
            [_pieces(model, self._spec, layer, self._stored) for layer in range(model.num_layers)] if self._spec else []
        )

    def group(
        self, tensor_parallel: int, pipeline_parallel: int, stage_layers: tuple[int, ...] | None = None
    ) -> tuple[RankMemory, ...]:
        """All ranks of a shape, stage by stage. Raises ConfigError as `rank` does."""
        return tuple(
            self.rank(Topology(tensor_rank, tensor_parallel, stage, pipeline_parallel, stage_layers))
            for stage in range(pipeline_parallel)
            for tensor_rank in range(tensor_parallel)
        )

    def rank(self, topology: Topology) -> RankMemory:
        """With its part of the draft model. Raises ConfigError naming the parallel size that the model's layers, heads
        or features do not allow, or "speculative" if the draft model's do not.
        """
        is_split = topology.tensor_size * topology.num_stages > 1
        if self._spec is None and is_split:
            raise ConfigError(
                f"{self._config.model.architecture} runs through transformers' own code, on one rank only: set "
                "tensor_parallel and pipeline_parallel to 1",
                field="tensor_parallel" if topology.tensor_size > 1 else "pipeline_parallel",
            )
        memory = RankMemory(
            weight_bytes=self._weight_bytes(topology),
            kv_bytes_per_token=rank_layout(self._config, topology).bytes_per_token,
            activation_bytes=self._activation_bytes(topology),
        )
        place = topology.of_draft(self._config)
        if self._draft is None or place is None:
            return memory
        try:
            # Its activations come after the model's own, but what is free then need not be in one piece.
            return memory + self._draft.rank(place)
        except ConfigError as refusal:
            raise ConfigError(f"speculative: the draft model: {refusal}", field="speculative") from refusal

    def _weight_bytes(self, topology: Topology) -> int:
        config, model = self._config, self._config.model
        if self._spec is None:
            return model.num_parameters * config.dtype_bytes
        total = 0
        for layer in topology.layer_range(model.num_layers):
            for piece, count in self._layers[layer].items():
                total += count * piece.num_bytes(model, topology, config.dtype_bytes)
        names = self._spec.names
        if topology.is_first_stage:
            total += self._table_bytes(names.embedding, topology)
        if topology.is_last_stage:
            total += model.hidden_size * _FLOAT32_BYTES  # final norm
            shares_table = self._spec.is_tied and topology.is_first_stage and not self._copies_table(names.embedding)
            total += (
                0
                if shares_table
                else self._table_bytes(names.embedding if self._spec.is_tied else names.head, topology)
            )
        return total

    def _table_bytes(self, name: str, topology: Topology) -> int:
        """Of a rank's part of the embedding table or of the head."""
        model = self._config.model
        elements = len(topology.vocab_shard(model.vocab_size)) * model.hidden_size
        return _matrix_bytes(elements, self._types(name), range(model.hidden_size), self._config.dtype_bytes)

    def _types(self, name: str) -> tuple[str, ...]:
        return (self._stored[name],) if name in self._stored else ()

    def _copies_table(self, name: str) -> bool:
        """Whether the device's products want a layout of their own, so that a tied head is a copy of the table.

        True of CPUs with C++ kernels, without which the answer is an upper bound, unless the table is quantized: rows
        are read from any layout of it.
        """
        config = self._config
        types, columns = self._types(name), range(config.model.hidden_size)
        is_quantized = bool(types) and kept_type(types, columns) is not None
        return config.device == "cpu" and config.dtype != "float16" and not is_quantized

    def _activation_bytes(self, topology: Topology) -> int:
        """Upper bound for a step of max_step_tokens (T) that draws a token for max_running_requests (R):

            max(T * (5 * hidden + widest layer), T * hidden + R * (2 * hidden + 4 * vocabulary in float32))
            + T * hidden for every other stage, whose hidden states are on their way
            + what tensor ranks exchange
            + the tables of cosines and sines, and 64 bytes of indices a token

        Attention takes 3 * (query + KV features): the merged projection, normed heads, and what it returns. An MLP
        takes 3 * inner features: gate, up and their product; experts as much for each of a token's experts, and
        its hidden states in float32. Features, inner features and vocabulary are the rank's own.
        """
        config, model = self._config, self._config.model
        tokens, rows, element = config.max_step_tokens, config.max_running_requests, config.dtype_bytes
        hidden = tokens * model.hidden_size * element
        features = len(_query_features(model, topology, 0)) + len(_kv_features(model, topology, 0))
        attention = 3 * features * element
        mlp = max(self._mlp_bytes(layer, topology) for layer in topology.layer_range(model.num_layers))
        peak = _HIDDEN_COPIES * hidden + tokens * max(attention, mlp)
        if topology.is_last_stage:
            logits = _LOGITS_COPIES * len(topology.vocab_shard(model.vocab_size)) * _FLOAT32_BYTES
            peak = max(peak, hidden + rows * (2 * model.hidden_size * element + logits))
        peak += (topology.num_stages - 1) * hidden + self._exchange_bytes(topology)
        return peak + self._rotary_bytes(topology) + tokens * _INDEX_BYTES

    def _exchange_bytes(self, topology: Topology) -> int:
        """Parts of all tensor ranks side by side: hidden states on a CPU (a GPU adds them up in place), or on the last
        stage the logits of requests whose draw looks at the whole vocabulary, twice.
        """
        if topology.tensor_size == 1:
            return 0
        config, model = self._config, self._config.model
        hidden = config.max_step_tokens * model.hidden_size * config.dtype_bytes * (config.device == "cpu")
        logits = 2 * config.max_running_requests * len(topology.vocab_shard(model.vocab_size)) * _FLOAT32_BYTES
        return topology.tensor_size * max(hidden, logits * topology.is_last_stage)

    def _mlp_bytes(self, layer: int, topology: Topology) -> int:
        """Of one token, in one layer."""
        config, model = self._config, self._config.model
        if self._spec is None:  # transformers' own code
            return 3 * (model.hf_config.get("intermediate_size") or 4 * model.hidden_size) * config.dtype_bytes
        mlp = self._spec.mlp[layer]
        inner = 3 * len(topology.shard(mlp.intermediate_size)) * config.dtype_bytes
        match mlp:
            case GatedMLPSpec():
                return inner
            case MoESpec(experts_per_token=experts):
                return experts * (inner + _EXPERT_HIDDEN_COPIES[config.device] * model.hidden_size * _FLOAT32_BYTES)

    def _rotary_bytes(self, topology: Topology) -> int:
        if self._spec is None:
            return 0
        tables = {self._spec.rotary[layer] for layer in topology.layer_range(self._config.model.num_layers)}
        width = sum(rotary.rotary_dim for rotary in tables if rotary is not None)
        return self._config.max_model_len * width * _FLOAT32_BYTES


def rank_layout(config: EngineConfig, topology: Topology) -> KVLayout:
    """What one rank holds of a KV block of the model: its layers, its KV heads."""
    model = config.model
    return KVLayout.of(
        config,
        num_layers=len(topology.layer_range(model.num_layers)),
        num_kv_heads=len(topology.head_shard(model.num_heads, model.num_kv_heads).kv_heads),
    )


def rank_block_bytes(config: EngineConfig, topology: Topology) -> int:
    """Bytes of one KV block on one rank, those of the draft model too."""
    num_bytes = rank_layout(config, topology).bytes_per_block
    draft, place = config.draft, topology.of_draft(config)
    if draft is not None and place is not None:
        num_bytes += rank_layout(draft, place).bytes_per_block
    return num_bytes


def group_block_bytes(config: EngineConfig) -> int:
    """Bytes of one KV block over all ranks; KV heads that several ranks keep count for each."""
    topologies = (Topology.of_rank(rank, config) for rank in range(config.num_ranks))
    return sum(rank_block_bytes(config, topology) for topology in topologies)


def most_blocks(config: EngineConfig) -> int:
    """KV blocks that can be of use: every running request at full length, and as much again for cached prefixes."""
    return 2 * config.max_running_requests * blocks_needed(config.max_model_len, config.block_size) + 1


def _pieces(model: ModelConfig, spec: DecoderSpec, layer: int, stored: Mapping[str, str]) -> Counter[_Piece]:
    """The tensors of a layer; a layer of experts has few kinds of very many."""
    names = spec.names.of_layer(layer)
    parts = {name: part for part, name in asdict(names).items()}
    products: list[tuple[str, ...]] = [(names.q, names.k, names.v), (names.o,), (names.gate, names.up), (names.down,)]
    mlp = spec.mlp[layer]
    if isinstance(mlp, MoESpec):
        for expert in range(mlp.num_experts):
            gate, up, down = names.of_expert(expert)
            parts |= {gate: "expert_gate", up: "expert_up", down: "expert_down"}
            products += [(gate, up), (down,)]
    types = {  # of each matrix that may stay quantized: how those of its product are stored
        name: tuple(stored[f"{other}.weight"] for other in product)
        for product in products
        for name in product
        if all(f"{other}.weight" in stored for other in product)
    }
    pieces: Counter[_Piece] = Counter()
    for name, shape in layer_shapes(model, spec, layer).items():
        module, _, kind = name.rpartition(".")
        is_bias = kind == "bias"
        pieces[_Piece(parts[module], shape, is_bias, () if is_bias else types.get(module, ()))] += 1
    return pieces
