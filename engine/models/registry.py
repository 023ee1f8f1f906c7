"""From a path to a model: which architecture it is, what the checkpoint says, and the code that runs it.

Importing this module and reading a configuration need no torch; `load_model` does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shoal.engine.config import ConfigError, EngineConfig, EngineOptions, ModelConfig
from shoal.engine.models import gemma2, gemma3, llama, mistral, mixtral, qwen2, qwen3, qwen3_moe, smollm3
from shoal.engine.models.checkpoint import Checkpoint, read_checkpoint
from shoal.engine.models.config_fields import count
from shoal.engine.models.model import Model
from shoal.engine.models.spec import Family
from shoal.engine.models.weights.gguf_names import hugging_face_tensors

if TYPE_CHECKING:
    from shoal.engine.parallel.collectives import Collectives
    from shoal.engine.parallel.topology import Topology
    from shoal.kernels.dispatch import Operations

__all__ = ["FAMILIES", "Model", "load_model", "read_draft_config", "read_model_config"]

FAMILIES: Mapping[str, Family] = {
    "LlamaForCausalLM": llama.FAMILY,
    "MistralForCausalLM": mistral.FAMILY,
    "MixtralForCausalLM": mixtral.FAMILY,
    "Qwen2ForCausalLM": qwen2.FAMILY,
    "Qwen3ForCausalLM": qwen3.FAMILY,
    "Qwen3MoeForCausalLM": qwen3_moe.FAMILY,
    "SmolLM3ForCausalLM": smollm3.FAMILY,
    "Gemma2ForCausalLM": gemma2.FAMILY,
    "Gemma3ForCausalLM": gemma3.FAMILY,
}


def read_model_config(path: str) -> ModelConfig:
    """The facts of the checkpoint at `path`, from its headers. Raises ConfigError as `read_checkpoint` does."""
    checkpoint = read_checkpoint(Path(path))
    family = FAMILIES.get(checkpoint.architecture)
    if family is not None:
        return _model_config(checkpoint, checkpoint.fields, family.layer_windows(checkpoint.fields))
    from shoal.engine.models.transformers_config import transformers_fields

    fields = transformers_fields(checkpoint.path, checkpoint.architecture)
    # transformers' code tells the attention its window; None here only keeps blocks longer than needed.
    return _model_config(checkpoint, fields, (None,) * fields["num_hidden_layers"])


def read_draft_config(options: EngineOptions) -> ModelConfig | None:
    """The facts of the draft model's checkpoint, None without one. Raises ConfigError."""
    if options.speculative is None or options.speculative.model is None:
        return None
    try:
        return read_model_config(options.speculative.model)
    except ConfigError as error:
        raise ConfigError(f"speculative: {error}", field="speculative") from error


def load_model(
    config: EngineConfig,
    ops: Operations,
    topology: Topology,
    collectives: Collectives,
    progress: Callable[[int, int], None] | None = None,
) -> Model:
    """Load this rank's part of the model. `progress` is told stored bytes read and to be read, as weights come in.

    Raises ConfigError if the weights do not fit the configuration or cannot be split as `topology` asks.
    """
    if config.model.architecture not in FAMILIES:
        from shoal.engine.models.transformers_backend import load_transformers_model

        return load_transformers_model(config, ops, topology, progress)
    from shoal.engine.models.family_model import load_family_model

    spec = FAMILIES[config.model.architecture].spec(config.model)
    return load_family_model(config, spec, ops, topology, collectives, progress)


def _model_config(
    checkpoint: Checkpoint, fields: Mapping[str, Any], layer_windows: tuple[int | None, ...]
) -> ModelConfig:
    num_heads = count(fields, "num_attention_heads")
    num_kv_heads = fields.get("num_key_value_heads") or num_heads
    hidden_size = count(fields, "hidden_size")
    if num_heads % num_kv_heads:
        raise ConfigError(f"{checkpoint.path} has {num_heads} heads that cannot share {num_kv_heads} KV heads evenly")
    return ModelConfig(
        path=str(checkpoint.path),
        architecture=checkpoint.architecture,
        num_layers=count(fields, "num_hidden_layers"),
        hidden_size=hidden_size,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=fields.get("head_dim") or hidden_size // num_heads,
        vocab_size=count(fields, "vocab_size"),
        max_position=count(fields, "max_position_embeddings"),
        layer_windows=layer_windows,
        stored_dtype=checkpoint.stored_dtype,
        num_parameters=checkpoint.num_parameters,
        eos_token_ids=checkpoint.eos_token_ids,
        hf_config=fields,
        stored_types=_stored_types(checkpoint),
    )


def _stored_types(checkpoint: Checkpoint) -> Mapping[str, str]:
    """By Hugging Face's names; of GGUF files only, whose weights may stay as they are."""
    if checkpoint.gguf is None:
        return {}
    return {name: tensor.dtype for name, tensor in hugging_face_tensors(checkpoint.gguf).items()}
