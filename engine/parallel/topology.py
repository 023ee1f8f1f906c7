"""Where a rank stands, and which part of a model is its own. Pure arithmetic, no torch.

Tensor parallelism follows Megatron-LM (Shoeybi et al. 2019, arXiv:1909.08053): attention is split by heads, the MLP by
its inner features, the vocabulary by rows. Shares differ by at most one unit, so that nine heads fit two ranks as well.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from shoal.engine.config import ConfigError, EngineConfig, EngineOptions


class HeadShard(NamedTuple):
    """The query heads of one rank and the KV heads that they read, as ranges over the heads of the whole model."""

    heads: range
    kv_heads: range


@dataclass(frozen=True, slots=True)
class Topology:
    """One rank's place: `tensor_rank` of `tensor_size` within pipeline stage `stage` of `num_stages`."""

    tensor_rank: int
    tensor_size: int
    stage: int
    num_stages: int
    stage_layers: tuple[int, ...] | None = None  # layers of each stage; None: dealt evenly

    @classmethod
    def of_rank(cls, rank: int, config: EngineOptions | EngineConfig) -> Topology:
        """Of the `rank`-th rank of a group: stage by stage, tensor ranks side by side."""
        stage, tensor_rank = divmod(rank, config.tensor_parallel)
        return cls(tensor_rank, config.tensor_parallel, stage, config.pipeline_parallel, config.stage_layers)

    @property
    def rank(self) -> int:
        """The number of this rank within its group."""
        return self.stage * self.tensor_size + self.tensor_rank

    @property
    def name(self) -> str:
        """For programs: "pp0/tp1" is the second tensor rank of the first stage."""
        return f"pp{self.stage}/tp{self.tensor_rank}"

    def __post_init__(self) -> None:
        assert 0 <= self.tensor_rank < self.tensor_size, self
        assert 0 <= self.stage < self.num_stages, self

    @property
    def is_first_stage(self) -> bool:
        return self.stage == 0

    @property
    def is_last_stage(self) -> bool:
        return self.stage == self.num_stages - 1

    def of_draft(self, config: EngineConfig) -> Topology | None:
        """This rank's place in the draft model, which is whole on the last stage, shared by its tensor ranks or on the
        first of them only. None where nothing of it is.
        """
        draft = config.draft
        if draft is None or not self.is_last_stage:
            return None
        if draft.tensor_parallel > 1:
            return Topology(self.tensor_rank, self.tensor_size, stage=0, num_stages=1)
        return SINGLE if self.tensor_rank == 0 else None

    def layer_range(self, num_layers: int) -> range:
        """This stage's layers. Raises ConfigError if a stage would have none."""
        if self.num_stages > num_layers:
            raise ConfigError(
                f"{self.num_stages} pipeline stages are more than the model's {num_layers} layers: "
                f"use at most {num_layers} stages",
                field="pipeline_parallel",
            )
        if self.stage_layers is not None:
            start = sum(self.stage_layers[: self.stage])
            return range(start, start + self.stage_layers[self.stage])
        return _share(num_layers, self.stage, self.num_stages)

    def shard(self, size: int) -> range:
        """This rank's share of `size` features, in pairs where `size` is even: 16-bit dot products take two at a time.

        Raises ConfigError if a rank would have none.
        """
        if self.tensor_size > size:
            raise ConfigError(
                f"{self.tensor_size} tensor ranks cannot share {size} features: use at most {size}",
                field="tensor_parallel",
            )
        unit = 2 if size % 2 == 0 and size >= 2 * self.tensor_size else 1
        units = _share(size // unit, self.tensor_rank, self.tensor_size)
        return range(units.start * unit, units.stop * unit)

    def vocab_shard(self, vocab_size: int) -> range:
        """This rank's rows of a vocabulary padded to equal shares; may end past `vocab_size`."""
        rows = -(-vocab_size // self.tensor_size)
        return range(self.tensor_rank * rows, (self.tensor_rank + 1) * rows)

    def head_shard(self, num_heads: int, num_kv_heads: int) -> HeadShard:
        """This rank's attention heads: whole groups of query heads with their KV head.

        With more ranks than KV heads, each KV head is kept by several ranks, which share its query heads.
        Raises ConfigError if the ranks cannot share the heads evenly enough.
        """
        group = num_heads // num_kv_heads  # query heads per KV head
        if self.tensor_size <= num_kv_heads:
            kv_heads = _share(num_kv_heads, self.tensor_rank, self.tensor_size)
            return HeadShard(range(kv_heads.start * group, kv_heads.stop * group), kv_heads)
        if self.tensor_size % num_kv_heads or self.tensor_size > num_heads:
            raise ConfigError(
                f"{self.tensor_size} tensor ranks cannot share {num_heads} heads with {num_kv_heads} KV heads: use at "
                f"most {num_kv_heads}, or a multiple of {num_kv_heads} up to {num_heads}",
                field="tensor_parallel",
            )
        replicas = self.tensor_size // num_kv_heads  # ranks that keep the same KV head
        kv_head = self.tensor_rank // replicas
        heads = _share(group, self.tensor_rank % replicas, replicas)
        start = kv_head * group
        return HeadShard(range(start + heads.start, start + heads.stop), range(kv_head, kv_head + 1))


SINGLE = Topology(tensor_rank=0, tensor_size=1, stage=0, num_stages=1)


def _share(size: int, index: int, parts: int) -> range:
    """Part `index` of `size` units dealt into `parts` runs whose lengths differ by at most one."""
    return range(size * index // parts, size * (index + 1) // parts)
