"""The two ends of a decoder, split by rows of the vocabulary."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from shoal.engine.layers.linear import Linear
from shoal.engine.layers.weight_reader import WeightReader
from shoal.engine.parallel.collectives import Collectives
from shoal.engine.parallel.topology import Topology
from shoal.kernels.dispatch import Operations


class VocabParallelEmbedding:
    """Rows of the embedding table, split over ranks; a rank adds zero for the tokens of others."""

    def __init__(self, weight: Tensor, start: int, vocab_size: int, collectives: Collectives) -> None:
        self.weight = weight  # [rows of this rank, hidden]
        self._start = start
        self._vocab_size = vocab_size
        self._all_reduce = collectives.all_reduce

    @classmethod
    def load(
        cls, reader: WeightReader, name: str, *, vocab_size: int, hidden_size: int,
        topology: Topology, collectives: Collectives,
    ) -> VocabParallelEmbedding:  # fmt: skip
        weight = _read_vocab_rows(reader, name, vocab_size, hidden_size, topology)
        return cls(weight, topology.vocab_shard(vocab_size).start, vocab_size, collectives)

    @property
    def weight_bytes(self) -> int:
        return self.weight.nbytes

    def __call__(self, input_ids: Tensor) -> Tensor:
        """input_ids [tokens] int64 -> [tokens, hidden], a fresh tensor."""
        rows = self.weight.shape[0]
        if rows >= self._vocab_size:
            return F.embedding(input_ids, self.weight)
        local = input_ids - self._start
        is_elsewhere = (local < 0) | (local >= rows)
        hidden = F.embedding(local.masked_fill(is_elsewhere, 0), self.weight)
        return self._all_reduce(hidden.masked_fill_(is_elsewhere.unsqueeze(1), 0))


class ParallelLMHead:
    """Hidden states to logits: each rank computes its rows of the vocabulary, and all gather them."""

    def __init__(self, linear: Linear, vocab_size: int, collectives: Collectives, weight_bytes: int) -> None:
        self.weight_bytes = weight_bytes
        self._linear = linear
        self._vocab_size = vocab_size
        self._all_gather = collectives.all_gather

    @classmethod
    def load(
        cls, reader: WeightReader, name: str, *, vocab_size: int, hidden_size: int,
        ops: Operations, topology: Topology, collectives: Collectives,
    ) -> ParallelLMHead:  # fmt: skip
        linear = Linear(_read_vocab_rows(reader, name, vocab_size, hidden_size, topology), None, ops)
        return cls(linear, vocab_size, collectives, linear.weight_bytes)

    @classmethod
    def tied(
        cls, embedding: VocabParallelEmbedding, *, vocab_size: int, ops: Operations, collectives: Collectives
    ) -> ParallelLMHead:
        """A head that is the embedding table: shared memory, or a packed copy where the device wants one."""
        linear = Linear(embedding.weight, None, ops)
        return cls(linear, vocab_size, collectives, 0 if linear.is_plain else linear.weight_bytes)

    def __call__(self, hidden: Tensor) -> Tensor:
        """hidden [rows, hidden] -> logits [rows, vocab] float32 on every rank."""
        return self._all_gather(self._linear(hidden, out_dtype=torch.float32))[:, : self._vocab_size]


def _read_vocab_rows(reader: WeightReader, name: str, vocab_size: int, hidden_size: int, topology: Topology) -> Tensor:
    """This rank's rows [ceil(vocab / ranks), hidden], zero where they pad the vocabulary."""
    padded = topology.vocab_shard(vocab_size)
    rows = range(min(padded.start, vocab_size), min(padded.stop, vocab_size))
    weight = reader.empty(len(padded), hidden_size)
    reader.read_into(weight[: len(rows)], name, rows=rows)
    weight[len(rows) :].zero_()
    return weight
