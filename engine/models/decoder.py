"""The one decoder. It is built for a range of layers, with the embedding on the first stage and the head on the last.

Layers pass on a delta that is not yet in the residual, so that adding it is fused with the next norm. How families
differ is decided by DecoderLoader, which puts the parts together.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from shoal.engine.layers.attention import Attention, AttentionBatch, LastTokens
from shoal.engine.layers.embedding import ParallelLMHead, VocabParallelEmbedding
from shoal.engine.layers.linear import QKVParallelLinear, RowParallelLinear
from shoal.engine.layers.mlp import GatedMLP
from shoal.engine.layers.moe import MoE
from shoal.engine.layers.norm import RMSNorm
from shoal.engine.parallel.topology import HeadShard
from shoal.kernels.dispatch import Operations


class SelfAttention:
    """Merged qkv projection, optional q/k norms, optional rotary embedding, paged attention, output projection."""

    def __init__(
        self,
        *,
        qkv: QKVParallelLinear,
        q_norm: RMSNorm | None,
        k_norm: RMSNorm | None,
        cos_sin: Tensor | None,
        attention: Attention,
        output: RowParallelLinear,
        shard: HeadShard,
        head_dim: int,
        ops: Operations,
    ) -> None:
        norm_bytes = sum(norm.weight_bytes for norm in (q_norm, k_norm) if norm is not None)
        self.weight_bytes = qkv.weight_bytes + output.weight_bytes + norm_bytes
        self._qkv = qkv
        self._q_norm = q_norm
        self._k_norm = k_norm
        self._cos_sin = cos_sin  # [positions, rotary_dim] float32
        self._attention = attention
        self._output = output
        self._head_counts = [len(shard.heads), len(shard.kv_heads), len(shard.kv_heads)]
        self._head_dim = head_dim
        self._rotary = ops.rotary

    def __call__(
        self, x: Tensor, positions: Tensor, kv: Tensor, batch: AttentionBatch, wanted: LastTokens | None
    ) -> Tensor:
        """x [tokens, hidden] -> [tokens, hidden], or [wanted, hidden]."""
        heads = self._qkv(x).view(len(x), -1, self._head_dim)  # [tokens, heads + 2 * kv_heads, head_dim]
        q, k, v = torch.split(heads, self._head_counts, dim=1)
        if self._q_norm is not None and self._k_norm is not None:
            q, k = self._q_norm(q), self._k_norm(k)
        if self._cos_sin is not None:
            self._rotary(q, k, positions, self._cos_sin)
        return self._output(self._attention(q, k, v, kv, batch, wanted))


class DecoderLayer:
    """Attention and MLP, each between an optional pair of norms."""

    def __init__(
        self,
        *,
        attention_norm: RMSNorm,
        attention: SelfAttention,
        attention_post_norm: RMSNorm | None,
        mlp_norm: RMSNorm,
        mlp: GatedMLP | MoE,
        mlp_post_norm: RMSNorm | None,
    ) -> None:
        parts = (attention_norm, attention, attention_post_norm, mlp_norm, mlp, mlp_post_norm)
        self.weight_bytes = sum(part.weight_bytes for part in parts if part is not None)
        self._attention_norm = attention_norm
        self._attention = attention
        self._attention_post_norm = attention_post_norm
        self._mlp_norm = mlp_norm
        self._mlp = mlp
        self._mlp_post_norm = mlp_post_norm

    def attend(
        self,
        delta: Tensor | None,
        residual: Tensor,
        positions: Tensor,
        kv: Tensor,
        batch: AttentionBatch,
        wanted: LastTokens | None,
    ) -> Tensor:
        """Add `delta` (None in a stage's first layer) to `residual` in place; the next one is [tokens, hidden], or
        [wanted, hidden].
        """
        norm = self._attention_norm
        x = norm(residual) if delta is None else norm.add(delta, residual)
        x = self._attention(x, positions, kv, batch, wanted)
        return x if self._attention_post_norm is None else self._attention_post_norm(x)

    def feed_forward(self, delta: Tensor, residual: Tensor) -> Tensor:
        """Add `delta` to `residual` in place, both [tokens, hidden]; return the next one."""
        x = self._mlp(self._mlp_norm.add(delta, residual))
        return x if self._mlp_post_norm is None else self._mlp_post_norm(x)


class Decoder:
    """One pipeline stage of a decoder-only transformer. A Model."""

    is_capturable = True

    def __init__(
        self,
        *,
        layer_range: range,
        layers: Sequence[DecoderLayer],
        embedding: VocabParallelEmbedding | None,
        final_norm: RMSNorm | None,
        head: ParallelLMHead | None,
        ops: Operations,
    ) -> None:
        self.layer_range = layer_range
        parts = (*layers, embedding, final_norm, head)
        self.weight_bytes = sum(part.weight_bytes for part in parts if part is not None)
        self._layers = layers
        self._embedding = embedding
        self._final_norm = final_norm
        self._head = head
        self._ops = ops

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        attention: AttentionBatch,
        kv: Sequence[Tensor],
        hidden: Tensor | None = None,
    ) -> Tensor:
        """As Model.forward: [tokens, hidden], before the final norm."""
        if hidden is None:
            assert self._embedding is not None, "later stages take hidden states"
            hidden = self._embedding(input_ids)
        residual = hidden
        delta = None
        for layer, layer_kv in zip(self._layers, kv, strict=True):
            # Behind the last attention of all, a token is of use to nobody but its own logits.
            wanted = attention.wanted if layer is self._layers[-1] and self._head is not None else None
            delta = layer.attend(delta, residual, positions, layer_kv, attention, wanted)
            if wanted is not None:
                residual = self._ops.take_rows(residual, wanted.tokens)
            delta = layer.feed_forward(delta, residual)
        if delta is not None:
            self._ops.add(delta, residual)
        return residual

    def logits(self, hidden: Tensor) -> Tensor:
        """As Model.logits: [rows, columns of this rank] float32."""
        assert self._final_norm is not None, "logits belong to the last stage"
        assert self._head is not None, "logits belong to the last stage"
        return self._head(self._final_norm(hidden))
