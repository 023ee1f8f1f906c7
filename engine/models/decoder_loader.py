"""Puts a decoder together: a family's spec, this rank's share of the weights, the device's operations."""

from __future__ import annotations

import torch

from shoal.engine.config import ModelConfig
from shoal.engine.layers.attention import Attention
from shoal.engine.layers.embedding import ParallelLMHead, VocabParallelEmbedding
from shoal.engine.layers.linear import MergedColumnParallelLinear, QKVParallelLinear, RowParallelLinear
from shoal.engine.layers.mlp import GatedMLP
from shoal.engine.layers.moe import MoE, ParallelExperts, Router
from shoal.engine.layers.norm import RMSNorm
from shoal.engine.layers.rotary import rotary_table
from shoal.engine.layers.weight_reader import WeightReader
from shoal.engine.models.decoder import Decoder, DecoderLayer, SelfAttention
from shoal.engine.models.spec import DecoderSpec, GatedMLPSpec, LayerNames, MoESpec
from shoal.engine.parallel.collectives import Collectives
from shoal.engine.parallel.topology import Topology
from shoal.kernels.dispatch import Operations


class DecoderLoader:
    """Loads one rank's decoder, layer by layer. `num_positions` bounds the positions that it will see."""

    def __init__(
        self,
        config: ModelConfig,
        spec: DecoderSpec,
        reader: WeightReader,
        *,
        num_positions: int,
        device: torch.device,
        ops: Operations,
        topology: Topology,
        collectives: Collectives,
    ) -> None:
        self._config = config
        self._spec = spec
        self._reader = reader
        self._ops = ops
        self._topology = topology
        self._collectives = collectives
        self._layer_range = topology.layer_range(config.num_layers)
        self._heads = topology.head_shard(config.num_heads, config.num_kv_heads)
        self._rotary_tables = {
            rotary: rotary_table(rotary, num_positions, device)
            for rotary in {spec.rotary[layer] for layer in self._layer_range}
            if rotary is not None
        }

    def load(self) -> Decoder:
        """Read the weights of this rank's stage."""
        is_last = self._topology.is_last_stage
        embedding = self._embedding() if self._topology.is_first_stage else None
        return Decoder(
            layer_range=self._layer_range,
            layers=[self._layer(layer) for layer in self._layer_range],
            embedding=embedding,
            final_norm=self._norm(self._spec.names.final_norm) if is_last else None,
            head=self._head(embedding) if is_last else None,
            ops=self._ops,
        )

    def _embedding(self) -> VocabParallelEmbedding:
        return VocabParallelEmbedding.load(
            self._reader,
            self._spec.names.embedding,
            vocab_size=self._config.vocab_size,
            hidden_size=self._config.hidden_size,
            scale=self._spec.embedding_scale,
            ops=self._ops,
            topology=self._topology,
            collectives=self._collectives,
        )

    def _head(self, embedding: VocabParallelEmbedding | None) -> ParallelLMHead:
        names, softcap = self._spec.names, self._spec.final_softcap
        if self._spec.is_tied and embedding is not None:
            return ParallelLMHead.tied(embedding, softcap=softcap, ops=self._ops)
        return ParallelLMHead.load(
            self._reader,
            names.embedding if self._spec.is_tied else names.head,
            vocab_size=self._config.vocab_size,
            hidden_size=self._config.hidden_size,
            softcap=softcap,
            ops=self._ops,
            topology=self._topology,
        )

    def _layer(self, layer: int) -> DecoderLayer:
        names = self._spec.names.of_layer(layer)
        post_norms = (names.attention_post_norm, names.mlp_post_norm)
        attention_post_norm, mlp_post_norm = (self._norm(name) if name else None for name in post_norms)
        return DecoderLayer(
            attention_norm=self._norm(names.attention_norm),
            attention=self._attention(layer, names),
            attention_post_norm=attention_post_norm,
            mlp_norm=self._norm(names.mlp_norm),
            mlp=self._mlp(layer, names),
            mlp_post_norm=mlp_post_norm,
        )

    def _attention(self, layer: int, names: LayerNames) -> SelfAttention:
        config, spec = self._config, self._spec
        heads = self._heads.heads
        rotary = spec.rotary[layer]
        return SelfAttention(
            qkv=QKVParallelLinear.load(
                self._reader,
                (names.q, names.k, names.v),
                size_in=config.hidden_size,
                head_dim=config.head_dim,
                shard=self._heads,
                has_bias=spec.has_qkv_bias,
                ops=self._ops,
            ),
            q_norm=self._norm(names.q_norm, config.head_dim) if spec.has_qk_norm else None,
            k_norm=self._norm(names.k_norm, config.head_dim) if spec.has_qk_norm else None,
            cos_sin=None if rotary is None else self._rotary_tables[rotary],
            attention=Attention(
                scale=spec.query_scale,
                window=config.layer_windows[layer],
                softcap=spec.attention_softcap,
                ops=self._ops,
            ),
            output=RowParallelLinear.load(
                self._reader,
                names.o,
                size_out=config.hidden_size,
                columns=range(heads.start * config.head_dim, heads.stop * config.head_dim),
                has_bias=spec.has_output_bias,
                ops=self._ops,
                topology=self._topology,
                collectives=self._collectives,
            ),
            shard=self._heads,
            head_dim=config.head_dim,
            ops=self._ops,
        )

    def _mlp(self, layer: int, names: LayerNames) -> GatedMLP | MoE:
        mlp = self._spec.mlp[layer]
        return self._gated_mlp(mlp, names) if isinstance(mlp, GatedMLPSpec) else self._moe(mlp, names)

    def _gated_mlp(self, mlp: GatedMLPSpec, names: LayerNames) -> GatedMLP:
        gate_up = MergedColumnParallelLinear.load(
            self._reader,
            (names.gate, names.up),
            size_in=self._config.hidden_size,
            size_out=mlp.intermediate_size,
            has_bias=mlp.has_bias,
            ops=self._ops,
            topology=self._topology,
        )
        down = RowParallelLinear.load(
            self._reader,
            names.down,
            size_out=self._config.hidden_size,
            columns=self._topology.shard(mlp.intermediate_size),
            has_bias=mlp.has_bias,
            ops=self._ops,
            topology=self._topology,
            collectives=self._collectives,
        )
        return GatedMLP(gate_up, down, mlp.activation)

    def _moe(self, mlp: MoESpec, names: LayerNames) -> MoE:
        router = Router.load(
            self._reader,
            names.router,
            hidden_size=self._config.hidden_size,
            num_experts=mlp.num_experts,
            experts_per_token=mlp.experts_per_token,
            is_renormalized=mlp.is_renormalized,
            ops=self._ops,
        )
        experts = ParallelExperts.load(
            self._reader,
            [names.of_expert(expert) for expert in range(mlp.num_experts)],
            hidden_size=self._config.hidden_size,
            inner_size=mlp.intermediate_size,
            activation=mlp.activation,
            ops=self._ops,
            topology=self._topology,
            collectives=self._collectives,
        )
        return MoE(router, experts)

    def _norm(self, name: str, size: int | None = None) -> RMSNorm:
        return RMSNorm.load(
            self._reader,
            name,
            size=size or self._config.hidden_size,
            eps=self._spec.norm_eps,
            offset=self._spec.norm_offset,
            ops=self._ops,
        )
