"""Which tensors a decoder needs, and whether a checkpoint has exactly those. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from shoal.engine.config import ConfigError, ModelConfig
from shoal.engine.models.spec import DecoderSpec, GatedMLPSpec, LayerNames, MoESpec
from shoal.engine.models.weights.stored import StoredTensor
from shoal.engine.parallel.topology import SINGLE, Topology

SHOWN = 3  # names in a message
Shapes = Mapping[str, tuple[int, ...]]


def expected_shapes(config: ModelConfig, spec: DecoderSpec, topology: Topology = SINGLE) -> Shapes:
    """Every tensor that a stage reads, by name, with its whole shape; by default, every tensor of the model."""
    names = spec.names
    table = (config.vocab_size, config.hidden_size)
    shapes: dict[str, tuple[int, ...]] = {}
    if topology.is_first_stage or (topology.is_last_stage and spec.is_tied):
        shapes[names.embedding] = table
    for layer in topology.layer_range(config.num_layers):
        shapes |= layer_shapes(config, spec, layer)
    if topology.is_last_stage:
        shapes[f"{names.final_norm}.weight"] = (config.hidden_size,)
        if not spec.is_tied:
            shapes[names.head] = table
    return shapes


def layer_shapes(config: ModelConfig, spec: DecoderSpec, layer: int) -> Shapes:
    """The tensors of one layer."""
    names = spec.names.of_layer(layer)
    hidden = config.hidden_size
    q_size, kv_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    linears = [
        (names.q, q_size, hidden, spec.has_qkv_bias),
        (names.k, kv_size, hidden, spec.has_qkv_bias),
        (names.v, kv_size, hidden, spec.has_qkv_bias),
        (names.o, hidden, q_size, spec.has_output_bias),
        *_mlp_linears(names, spec.mlp[layer], hidden),
    ]
    norms = [names.attention_norm, names.attention_post_norm, names.mlp_norm, names.mlp_post_norm]
    shapes: dict[str, tuple[int, ...]] = {f"{name}.weight": (hidden,) for name in norms if name is not None}
    if spec.has_qk_norm:
        shapes |= {f"{name}.weight": (config.head_dim,) for name in (names.q_norm, names.k_norm)}
    for name, size_out, size_in, has_bias in linears:
        shapes[f"{name}.weight"] = (size_out, size_in)
        if has_bias:
            shapes[f"{name}.bias"] = (size_out,)
    return shapes


def _mlp_linears(names: LayerNames, mlp: GatedMLPSpec | MoESpec, hidden: int) -> Iterator[tuple[str, int, int, bool]]:
    """Name, outputs, inputs, has_bias of each matrix."""
    inner = mlp.intermediate_size
    match mlp:
        case GatedMLPSpec():
            parts, has_bias = [(names.gate, names.up, names.down)], mlp.has_bias
        case MoESpec():
            parts, has_bias = [names.of_expert(expert) for expert in range(mlp.num_experts)], False
            yield names.router, mlp.num_experts, hidden, False
    for gate, up, down in parts:
        yield gate, inner, hidden, has_bias
        yield up, inner, hidden, has_bias
        yield down, hidden, inner, has_bias


def check_stored(
    path: str, stored: Mapping[str, StoredTensor], expected: Shapes, *, ignored: Iterable[str] = ()
) -> None:
    """Raise ConfigError naming the first tensors that are missing, superfluous or of another shape.

    Buffers of old checkpoints (rotary_emb.inv_freq) and `ignored` names may be there.
    """
    missing = [name for name in expected if name not in stored]
    if missing:
        raise ConfigError(f"{path} lacks {_some(missing)}: the weights do not belong to its configuration")
    known = {*expected, *ignored}
    superfluous = [name for name in stored if name not in known and not name.endswith("rotary_emb.inv_freq")]
    if superfluous:
        raise ConfigError(f"{path} holds {_some(superfluous)}, which its architecture does not use: check config.json")
    for name, shape in expected.items():
        if stored[name].shape != shape:
            raise ConfigError(
                f"{path} stores {name} as {list(stored[name].shape)}, its configuration asks for {list(shape)}"
            )


def _some(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"{len(names)} tensor{'s' * (len(names) > 1)} ({', '.join(names[:SHOWN])}{more})"
