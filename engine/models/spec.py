"""How a family differs from the others: plain values that the one decoder is built from. No torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

from shoal.engine.config import ModelConfig
from shoal.engine.layers.rotary_spec import RotarySpec

Activation = Literal["silu", "gelu_tanh"]


@dataclass(frozen=True, slots=True)
class LayerNames:
    """Names of one layer's modules; `.weight` and `.bias` follow.

    Post-norms are applied to what attention or the MLP returns, before the residual is added (sandwich placement);
    None where the family has none.
    """

    attention_norm: str = "input_layernorm"
    attention_post_norm: str | None = None
    q: str = "self_attn.q_proj"
    k: str = "self_attn.k_proj"
    v: str = "self_attn.v_proj"
    o: str = "self_attn.o_proj"
    q_norm: str = "self_attn.q_norm"
    k_norm: str = "self_attn.k_norm"
    mlp_norm: str = "post_attention_layernorm"
    mlp_post_norm: str | None = None
    gate: str = "mlp.gate_proj"
    up: str = "mlp.up_proj"
    down: str = "mlp.down_proj"
    router: str = "mlp.gate"
    expert_gate: str = "mlp.experts.{expert}.gate_proj"
    expert_up: str = "mlp.experts.{expert}.up_proj"
    expert_down: str = "mlp.experts.{expert}.down_proj"

    def of_expert(self, expert: int) -> tuple[str, str, str]:
        """Gate, up and down of one expert."""
        gate, up, down = (
            name.replace("{expert}", str(expert)) for name in (self.expert_gate, self.expert_up, self.expert_down)
        )
        return gate, up, down


@dataclass(frozen=True, slots=True)
class WeightNames:
    """A family's weights in Hugging Face's spelling. `layer` holds names relative to "model.layers.<n>."."""

    embedding: str = "model.embed_tokens.weight"
    final_norm: str = "model.norm"
    head: str = "lm_head.weight"
    layer: LayerNames = LayerNames()

    def of_layer(self, layer: int) -> LayerNames:
        """Full names."""
        parts = {part.name: getattr(self.layer, part.name) for part in fields(LayerNames)}
        return LayerNames(**{part: name and f"model.layers.{layer}.{name}" for part, name in parts.items()})


@dataclass(frozen=True, slots=True)
class GatedMLPSpec:
    """A dense gated feed-forward layer."""

    intermediate_size: int
    activation: Activation = "silu"
    has_bias: bool = False


@dataclass(frozen=True, slots=True)
class MoESpec:
    """A mixture of gated feed-forward layers without biases, of which a router chooses some for each token."""

    num_experts: int
    experts_per_token: int
    intermediate_size: int  # of each expert
    is_renormalized: bool  # a token's experts share a weight of 1; otherwise what the router gives them
    activation: Activation = "silu"


@dataclass(frozen=True, slots=True)
class DecoderSpec:
    """One decoder, less the counts and windows in ModelConfig."""

    mlp: tuple[GatedMLPSpec | MoESpec, ...]  # per layer
    rotary: tuple[RotarySpec | None, ...]  # per layer; None: no position embedding (NoPE)
    norm_eps: float
    query_scale: float  # attention scores are query_scale * q.k
    norm_offset: float = 0.0  # added to every stored norm weight
    has_qkv_bias: bool = False
    has_output_bias: bool = False
    has_qk_norm: bool = False  # RMS norm over head_dim of each query and key head, before rotary
    attention_softcap: float | None = None
    final_softcap: float | None = None
    embedding_scale: float | None = None  # rounded to the model's dtype, as the families were trained
    is_tied: bool = False  # the head is the embedding table
    names: WeightNames = WeightNames()


@dataclass(frozen=True, slots=True)
class Family:
    """What the registry knows of a family: both functions read config.json's fields under their own names."""

    layer_windows: Callable[[Mapping[str, Any]], tuple[int | None, ...]]
    spec: Callable[[ModelConfig], DecoderSpec]
