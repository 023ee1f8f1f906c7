"""The two ends of a decoder, split by rows of the vocabulary."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from shoal.engine.layers.linear import Linear
from shoal.engine.layers.weight_reader import WeightReader
from shoal.engine.parallel.collectives import Collectives
from shoal.engine.parallel.topology import Topology
from shoal.kernels.dispatch import Operations, QuantizedWeight


class VocabParallelEmbedding:
    """Rows of the embedding table, split over ranks; a rank adds zero for the tokens of others."""

    def __init__(
        self, table: Tensor | Linear, own: range, vocab_size: int, dtype: torch.dtype, scale: float | None,
        ops: Operations, collectives: Collectives,
    ) -> None:  # fmt: skip
        """`table`: the rows `own` of the vocabulary [rows, hidden]; a Linear, of which rows are taken, if quantized.

        Rows are multiplied by `scale`, rounded to `dtype`.
        """
        self.table = table
        self._own = own
        self._scale = 1.0 if scale is None else float(torch.tensor(scale, dtype=dtype))
        self._embedding = ops.embedding
        self._vocab_size = vocab_size
        self._dtype = dtype
        self.num_tokens = max(0, min(len(own), vocab_size - own.start))  # rows that do not pad the vocabulary
        self._all_reduce = collectives.all_reduce

    @classmethod
    def load(
        cls, reader: WeightReader, name: str, *, vocab_size: int, hidden_size: int, scale: float | None,
        ops: Operations, topology: Topology, collectives: Collectives,
    ) -> VocabParallelEmbedding:  # fmt: skip
        weight = _read_vocab_rows(reader, name, vocab_size, hidden_size, topology)
        table = Linear(weight, None, ops) if isinstance(weight, QuantizedWeight) else weight
        return cls(table, topology.vocab_shard(vocab_size), vocab_size, reader.dtype, scale, ops, collectives)

    @property
    def weight_bytes(self) -> int:
        return self.table.nbytes if isinstance(self.table, Tensor) else self.table.weight_bytes

    def __call__(self, input_ids: Tensor) -> Tensor:
        """input_ids [tokens] int64 -> [tokens, hidden], a fresh tensor."""
        if len(self._own) >= self._vocab_size:
            return self._rows(input_ids)
        local = input_ids - self._own.start
        is_elsewhere = (local < 0) | (local >= len(self._own))
        hidden = self._rows(local.masked_fill(is_elsewhere, 0))
        return self._all_reduce(hidden.masked_fill_(is_elsewhere.unsqueeze(1), 0))

    def _rows(self, ids: Tensor) -> Tensor:
        """ids [tokens], counted from this rank's first row -> [tokens, hidden]."""
        if isinstance(self.table, Tensor):
            return self._embedding(ids, self.table, self._scale)
        rows = self.table.rows(ids, self._dtype)
        return rows if self._scale == 1 else rows.mul_(self._scale)


class ParallelLMHead:
    """Hidden states to logits. Each rank computes those of its rows of the vocabulary, and keeps them."""

    def __init__(self, linear: Linear, num_tokens: int, softcap: float | None, weight_bytes: int) -> None:
        """`num_tokens`: leading rows that do not pad the vocabulary."""
        self.weight_bytes = weight_bytes
        self._linear = linear
        self._num_tokens = num_tokens
        self._softcap = softcap

    @classmethod
    def load(
        cls, reader: WeightReader, name: str, *, vocab_size: int, hidden_size: int, softcap: float | None,
        ops: Operations, topology: Topology,
    ) -> ParallelLMHead:  # fmt: skip
        linear = Linear(_read_vocab_rows(reader, name, vocab_size, hidden_size, topology), None, ops)
        return cls(linear, len(_own_tokens(vocab_size, topology)), softcap, linear.weight_bytes)

    @classmethod
    def tied(cls, embedding: VocabParallelEmbedding, *, softcap: float | None, ops: Operations) -> ParallelLMHead:
        """A head that is the embedding table: shared memory, or a packed copy where the device wants one."""
        if isinstance(embedding.table, Linear):
            return cls(embedding.table, embedding.num_tokens, softcap, 0)
        linear = Linear(embedding.table, None, ops)
        return cls(linear, embedding.num_tokens, softcap, 0 if linear.is_plain else linear.weight_bytes)

    def __call__(self, hidden: Tensor) -> Tensor:
        """hidden [rows, hidden] -> logits [rows, ceil(vocab / ranks)] float32 of this rank's part of the vocabulary.

        -inf where the part pads the vocabulary.
        """
        logits = self._linear(hidden, out_dtype=torch.float32)
        if self._softcap is not None:
            logits = torch.tanh(logits / self._softcap) * self._softcap
        if self._num_tokens < logits.shape[1]:
            logits[:, self._num_tokens :] = -torch.inf
        return logits


def _own_tokens(vocab_size: int, topology: Topology) -> range:
    """The token ids of this rank's rows, without those that pad the vocabulary."""
    rows = topology.vocab_shard(vocab_size)
    return range(min(rows.start, vocab_size), min(rows.stop, vocab_size))


def _read_vocab_rows(
    reader: WeightReader, name: str, vocab_size: int, hidden_size: int, topology: Topology
) -> Tensor | QuantizedWeight:
    """This rank's rows [ceil(vocab / ranks), hidden], zero where they pad the vocabulary."""
    rows = _own_tokens(vocab_size, topology)
    num_rows = len(topology.vocab_shard(vocab_size))
    quantized = reader.read_quantized([(name, rows)])
    if quantized is not None:
        return replace(quantized, blocks=F.pad(quantized.blocks, (0, 0, 0, num_rows - len(rows))))
    weight = reader.empty(num_rows, hidden_size)
    reader.read_into(weight[: len(rows)], name, rows=rows)
    weight[len(rows) :].zero_()
    return weight
