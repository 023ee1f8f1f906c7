"""How many bytes a KV block takes, and how many blocks fit. Pure arithmetic.

A block holds `block_size` tokens of K and V, for every layer and every **KV head** (not query head: with grouped or
multi-query attention the query heads share them; Ainslie et al. 2023, arXiv 2305.13245).
"""

from __future__ import annotations

from dataclasses import dataclass

from shoal.engine.config import ConfigError, EngineConfig


@dataclass(frozen=True, slots=True)
class KVLayout:
    """The shape of one rank's pool: [num_blocks, layers, 2, kv_heads, block_size, head_dim]."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    element_bytes: int

    @classmethod
    def of(cls, config: EngineConfig, num_layers: int | None = None, num_kv_heads: int | None = None) -> KVLayout:
        """For the whole model, or for a rank that has `num_layers` of its layers and `num_kv_heads` of its KV heads."""
        model = config.model
        layers = model.num_layers if num_layers is None else num_layers
        kv_heads = model.num_kv_heads if num_kv_heads is None else num_kv_heads
        return cls(layers, kv_heads, model.head_dim, config.block_size, config.dtype_bytes)

    @property
    def bytes_per_token(self) -> int:
        return self.num_layers * 2 * self.num_kv_heads * self.head_dim * self.element_bytes

    @property
    def bytes_per_block(self) -> int:
        return self.bytes_per_token * self.block_size

    def shape(self, num_blocks: int) -> tuple[int, int, int, int, int, int]:
        return (num_blocks, self.num_layers, 2, self.num_kv_heads, self.block_size, self.head_dim)

    def blocks_in(self, budget_bytes: int) -> int:
        """Blocks that fit into `budget_bytes`, block 0 (never handed out) included."""
        return budget_bytes // self.bytes_per_block


def blocks_needed(num_tokens: int, block_size: int) -> int:
    return -(-num_tokens // block_size)


def kv_bytes_per_token(config: EngineConfig) -> int:
    """Of the whole model, and of its draft model."""
    draft = 0 if config.draft is None else KVLayout.of(config.draft).bytes_per_token
    return KVLayout.of(config).bytes_per_token + draft


def check_pool(config: EngineConfig, num_blocks: int) -> int:
    """The longest request that this pool can hold, at most config.max_model_len.

    Raises ConfigError when not even one block can be handed out, or when max_model_len was asked for and does not fit.
    """
    capacity = (num_blocks - 1) * config.block_size  # block 0 is never handed out
    token_bytes = kv_bytes_per_token(config)
    mib = token_bytes * config.block_size / 2**20
    if capacity < min(config.max_model_len, 2 * config.block_size):
        raise ConfigError(
            f"no memory for even one request: the KV pool would have {max(num_blocks - 1, 0)} blocks of "
            f"{config.block_size} tokens ({mib:.2f} MiB each). Give it more with kv_memory_bytes or memory_fraction, "
            f"or use a smaller dtype or model",
            field="kv_memory_bytes",
        )
    if capacity >= config.max_model_len:
        return config.max_model_len
    if config.is_max_model_len_explicit:
        raise ConfigError(
            f"max_model_len {config.max_model_len} needs {blocks_needed(config.max_model_len, config.block_size)} KV "
            f"blocks, the pool has {num_blocks - 1} ({capacity} tokens): set max_model_len to at most {capacity}, or "
            f"raise kv_memory_bytes to {config.max_model_len * token_bytes}",
            field="max_model_len",
        )
    return capacity
