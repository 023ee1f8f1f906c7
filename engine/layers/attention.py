"""Paged attention of one layer, and what one step says about its requests."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from shoal.kernels.dispatch import Operations


@dataclass(frozen=True, slots=True)
class LastTokens:
    """Tokens at the end of requests, all that the layers' last hidden states are wanted of."""

    tokens: Tensor  # [wanted] int64: indices into the tokens of the step, ascending
    query_starts: Tensor  # [requests + 1] int32: those of request i are [query_starts[i], query_starts[i + 1]) of them
    max_query_len: int


@dataclass(frozen=True, slots=True)
class AttentionBatch:
    """Where the tokens of one step read and write KV, the same for every layer. Tensors are on the model's device."""

    slots: Tensor  # [tokens] int64: block * block_size + offset, -1 writes nothing
    block_tables: Tensor  # [requests, max_blocks] int32
    query_starts: Tensor  # [requests + 1] int32: tokens of request i are [query_starts[i], query_starts[i + 1])
    context_lens: Tensor  # [requests] int32: tokens with KV after this step
    max_query_len: int
    wanted: LastTokens | None = None  # None: all tokens


class Attention:
    """Writes new keys and values into a layer's blocks, then attends causally, within `window` if it has one."""

    def __init__(self, *, scale: float, window: int | None, softcap: float | None, ops: Operations) -> None:
        self._scale = scale
        self._window = window
        self._softcap = softcap
        self._ops = ops

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, kv: Tensor, batch: AttentionBatch, wanted: LastTokens | None = None
    ) -> Tensor:
        """q [tokens, heads, head_dim], k and v [tokens, kv_heads, head_dim] -> [tokens, heads * head_dim], or
        [wanted, heads * head_dim].

        kv [num_blocks, 2, kv_heads, block_size, head_dim] is written in place.
        """
        self._ops.kv_write(k, v, kv, batch.slots)
        queries = batch if wanted is None else wanted
        attended = self._ops.attention(
            q if wanted is None else self._ops.take_rows(q, wanted.tokens),
            kv,
            batch.block_tables,
            queries.query_starts,
            batch.context_lens,
            queries.max_query_len,
            scale=self._scale,
            window=self._window,
            softcap=self._softcap,
        )
        return attended.flatten(1)
