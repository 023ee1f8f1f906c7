"""The facts of architectures that only transformers knows, through its own configuration classes.

Imported only for those: transformers takes seconds to import.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import transformers

from shoal.engine.config import ConfigError
from shoal.engine.models.config_fields import FULL, SLIDING

_CAUSAL_SUFFIXES = ("ForCausalLM", "LMHeadModel")
_NEEDED = ("num_hidden_layers", "hidden_size", "num_attention_heads", "vocab_size", "max_position_embeddings")
_OPTIONAL = ("num_key_value_heads", "head_dim")


def transformers_fields(directory: Path, architecture: str) -> Mapping[str, Any]:
    """The configuration under the names that most families use, whatever this one calls them.

    Raises ConfigError, naming the architecture, if transformers does not know it or it is not a causal decoder whose
    layers all are attention.
    """
    if architecture not in dir(transformers):
        raise ConfigError(
            f"{architecture} is unknown here and to transformers {transformers.__version__}: update transformers, or "
            "use a model of another architecture"
        )
    config = _read(directory, architecture)
    if not architecture.endswith(_CAUSAL_SUFFIXES) or config.is_encoder_decoder:
        raise ConfigError(f"{architecture} is not a causal decoder: only models that continue text can be served")
    lost = [name for name in _NEEDED if getattr(config, name, None) is None]
    if lost:
        raise ConfigError(f"{architecture} cannot be served: its configuration states no {', '.join(lost)}")
    foreign = set(getattr(config, "layer_types", None) or ()) - {FULL, SLIDING}
    if foreign:
        raise ConfigError(f"{architecture} cannot be served: it has layers of type {', '.join(sorted(foreign))}")
    stated = {name: getattr(config, name, None) for name in (*_NEEDED, *_OPTIONAL)}
    return {**config.to_dict(), **{name: value for name, value in stated.items() if value is not None}}


def _read(directory: Path, architecture: str) -> Any:
    try:
        config = transformers.AutoConfig.from_pretrained(directory, local_files_only=True)
        return config.get_text_config(decoder=True)
    except Exception as error:  # validators of foreign code: no common base class
        raise ConfigError(
            f"transformers cannot read the {architecture} configuration in {directory}: {error}"
        ) from error
