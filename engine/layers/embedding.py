"""The two ends of a decoder, split by rows of the vocabulary."""

from __future__ import annotations

import torch
from torch import Tensor

from shoal.engine.layers.linear import Linear
from shoal.engine.layers.weight_reader import WeightReader
from shoal.engine.parallel.collectives import Collectives
from shoal.engine.parallel.topology import Topology
from shoal.kernels.dispatch import Operations


class VocabParallelEmbedding:
    """Rows of the embedding table, split over ranks; a rank adds zero for the tokens of others."""

    def __init__(
        self, weight: Tensor, start: int, vocab_size: int, scale: float | None, ops: Operations,
        collectives: Collectives,
    ) -> None:  # fmt: skip
        """Rows are multiplied by `scale`, rounded to their dtype."""
        self.weight = weight  # [rows of this rank, hidden]
        self._scale = 1.0 if scale is None else float(torch.tensor(scale, dtype=weight.dtype))
        self._embedding = ops.embedding
        self._start = start
        self._vocab_size = vocab_size
        self.num_tokens = max(0, min(len(weight), vocab_size - start))  # rows that do not pad the vocabulary
        self._all_reduce = collectives.all_reduce

    @classmethod
    def load(
        cls, reader: WeightReader, name: str, *, vocab_size: int, hidden_size: int, scale: float | None,
        ops: Operations, topology: Topology, collectives: Collectives,
    ) -> VocabParallelEmbedding:  # fmt: skip
        weight = _read_vocab_rows(reader, name, vocab_size, hidden_size, topology)
        return cls(weight, topology.vocab_shard(vocab_size).start, vocab_size, scale, ops, collectives)

    @property
    def weight_bytes(self) -> int:
        return self.weight.nbytes

    def __call__(self, input_ids: Tensor) -> Tensor:
        """input_ids [tokens] int64 -> [tokens, hidden], a fresh tensor."""
        rows = self.weight.shape[0]
        if rows >= self._vocab_size:
            return self._embedding(input_ids, self.weight, self._scale)
        local = input_ids - self._start
        is_elsewhere = (local < 0) | (local >= rows)
        hidden = self._embedding(local.masked_fill(is_elsewhere, 0), self.weight, self._scale)
        return self._all_reduce(hidden.masked_fill_(is_elsewhere.unsqueeze(1), 0))


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
        linear = Linear(embedding.weight, None, ops)
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


def _read_vocab_rows(reader: WeightReader, name: str, vocab_size: int, hidden_size: int, topology: Topology) -> Tensor:
    """This rank's rows [ceil(vocab / ranks), hidden], zero where they pad the vocabulary."""
    rows = _own_tokens(vocab_size, topology)
    weight = reader.empty(len(topology.vocab_shard(vocab_size)), hidden_size)
    reader.read_into(weight[: len(rows)], name, rows=rows)
    weight[len(rows) :].zero_()
    return weight
