"""Linear layers and their shard rules, named after Megatron-LM's (Shoeybi et al. 2019, arXiv:1909.08053).

Column-parallel layers keep a share of the output features, row-parallel ones a share of the input features and add
up their results. Weights that read the same input are merged into one matrix when they are loaded.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from shoal.engine.layers.weight_reader import WeightReader
from shoal.engine.parallel.collectives import Collectives
from shoal.engine.parallel.topology import HeadShard, Topology
from shoal.kernels.dispatch import Activation, Operations, QuantizedWeight


class Linear:
    """y = x W^T + b over this rank's part of W, packed for its device.

    Takes the weight over: the caller must not keep it, or packing doubles its memory.
    """

    def __init__(self, weight: Tensor | QuantizedWeight, bias: Tensor | None, ops: Operations) -> None:
        self.weight_bytes = weight.nbytes + (bias.nbytes if bias is not None else 0)
        self._packed = ops.pack_linear(weight)  # [out, in]
        self._bias = bias  # [out]
        self._linear = ops.linear
        self._gated_linear = ops.gated_linear
        self._quantized_rows = ops.quantized_rows

    @property
    def is_plain(self) -> bool:
        """Whether the weight is kept as it was given, without a second copy."""
        return self._packed.layout == "plain"

    def __call__(self, x: Tensor, *, out_dtype: torch.dtype | None = None) -> Tensor:
        """x [tokens, in] -> [tokens, out], in the dtype of x where out_dtype is None."""
        return self._linear(x, self._packed, self._bias, out_dtype=out_dtype)

    def rows(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """Rows of a quantized weight: ids [tokens] int64 -> [tokens, in]."""
        return self._quantized_rows(self._packed, ids, dtype)


class ColumnParallelLinear(Linear):
    """Output features are split: this rank computes its own share of them."""

    @classmethod
    def load(
        cls, reader: WeightReader, name: str, *, size_in: int, size_out: int, has_bias: bool,
        ops: Operations, topology: Topology,
    ) -> ColumnParallelLinear:  # fmt: skip
        weight, bias = _read_rows(reader, [(name, topology.shard(size_out))], size_in, has_bias)
        return cls(weight, bias, ops)


class MergedColumnParallelLinear(Linear):
    """Several column-parallel layers of equal size over one input; outputs side by side, in order."""

    @classmethod
    def load(
        cls, reader: WeightReader, names: Sequence[str], *, size_in: int, size_out: int, has_bias: bool,
        ops: Operations, topology: Topology,
    ) -> MergedColumnParallelLinear:  # fmt: skip
        """`size_out` is the size of each."""
        rows = topology.shard(size_out)
        weight, bias = _read_rows(reader, [(name, rows) for name in names], size_in, has_bias)
        return cls(weight, bias, ops)

    def gated(self, x: Tensor, activation: Activation) -> Tensor:
        """activation(gate) * up, if the layers are those two: x [tokens, in] -> [tokens, out / 2]."""
        return self._gated_linear(x, self._packed, self._bias, activation)


class QKVParallelLinear(Linear):
    """Query, key and value projections in one product, split by heads; ranks that outnumber KV heads keep copies."""

    @classmethod
    def load(
        cls, reader: WeightReader, names: tuple[str, str, str], *, size_in: int, head_dim: int, shard: HeadShard,
        has_bias: bool, ops: Operations,
    ) -> QKVParallelLinear:  # fmt: skip
        q, k, v = names
        heads, kv_heads = _feature_range(shard.heads, head_dim), _feature_range(shard.kv_heads, head_dim)
        weight, bias = _read_rows(reader, [(q, heads), (k, kv_heads), (v, kv_heads)], size_in, has_bias)
        return cls(weight, bias, ops)


class RowParallelLinear(Linear):
    """Input features are split: ranks compute partial sums, and one all-reduce adds them up."""

    def __init__(
        self, weight: Tensor | QuantizedWeight, bias: Tensor | None, ops: Operations, collectives: Collectives
    ) -> None:
        super().__init__(weight, bias, ops)
        self._all_reduce = collectives.all_reduce

    @classmethod
    def load(
        cls, reader: WeightReader, name: str, *, size_out: int, columns: range, has_bias: bool,
        ops: Operations, topology: Topology, collectives: Collectives,
    ) -> RowParallelLinear:  # fmt: skip
        """`columns` are the input features that this rank holds."""
        weight: Tensor | QuantizedWeight | None
        weight = reader.read_quantized([(f"{name}.weight", range(size_out))], columns)
        if weight is None:
            weight = reader.empty(size_out, len(columns))
            reader.read_into(weight, f"{name}.weight", columns=columns)
        bias = None
        if has_bias and topology.tensor_rank == 0:  # once in the sum
            bias = reader.empty(size_out)
            reader.read_into(bias, f"{name}.bias")
        return cls(weight, bias, ops, collectives)

    def __call__(self, x: Tensor, *, out_dtype: torch.dtype | None = None) -> Tensor:
        """x [tokens, in of this rank] -> [tokens, out], the same on every rank."""
        return self._all_reduce(super().__call__(x, out_dtype=out_dtype))


def _feature_range(heads: range, head_dim: int) -> range:
    return range(heads.start * head_dim, heads.stop * head_dim)


def _read_rows(
    reader: WeightReader, parts: Sequence[tuple[str, range]], size_in: int, has_bias: bool
) -> tuple[Tensor | QuantizedWeight, Tensor | None]:
    """The named weights' rows, one below the other: [out, size_in], and their biases [out]."""
    size_out = sum(len(rows) for _, rows in parts)
    weight: Tensor | QuantizedWeight | None
    weight = reader.read_quantized([(f"{name}.weight", rows) for name, rows in parts])
    if weight is None:
        weight = reader.empty(size_out, size_in)
    bias = reader.empty(size_out) if has_bias else None
    start = 0
    for name, rows in parts:
        end = start + len(rows)
        if isinstance(weight, Tensor):
            reader.read_into(weight[start:end], f"{name}.weight", rows=rows)
        if bias is not None:
            reader.read_into(bias[start:end], f"{name}.bias", rows=rows)
        start = end
    return weight, bias
