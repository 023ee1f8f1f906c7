"""Drawing over a vocabulary that tensor ranks share. No row of logits leaves its rank, unless top_k asks for as many.

min_p, top_k and top_p each keep the tokens above some logit, so all that ranks must agree on are these thresholds, the
sums of the weights they keep, and the token. Ties need no care: a token tied with the last one kept is kept by its
rank. Every decision is made from gathered values, which are the same on all ranks, bit for bit.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from shoal.engine.parallel.collectives import Collectives
from shoal.engine.parallel.topology import Topology
from shoal.engine.sampling.batch import SampleBatch
from shoal.engine.sampling.random_numbers import uniforms
from shoal.engine.sampling.transfer import to_device

_DIGIT_BITS = 8
_DIGITS = 1 << _DIGIT_BITS


class SplitVocabularyDraw:
    """A Draw of one of several ranks.

    For each row a rank sends 2 numbers, 2 more where it is not greedy, k more for top_k (the largest of the
    step's) and 1025 more for top_p.
    """

    def __init__(self, vocab_size: int, topology: Topology, collectives: Collectives) -> None:
        self._vocab_size = vocab_size
        self._start = topology.vocab_shard(vocab_size).start
        self._rank, self._num_ranks = topology.tensor_rank, topology.tensor_size
        self._all_gather = collectives.all_gather

    def __call__(self, logits: Tensor, batch: SampleBatch) -> Tensor:
        highest, tokens = self._highest(logits)
        drawn = np.flatnonzero(batch.temperature)
        if len(drawn) == 0:
            return tokens
        rows, device = to_device(drawn, logits.device), logits.device
        logits = logits[rows]  # [drawn, columns]
        weights = torch.exp((logits.double() - highest[rows]) / _column(batch.temperature[drawn], device))
        weights.masked_fill_(weights < _column(batch.min_p[drawn], device), 0.0)  # [drawn, columns]
        self._keep_top_k(weights, logits, batch.top_k[drawn])
        self._keep_top_p(weights, logits, batch.top_p[drawn])
        uniform = uniforms(batch.seeds[drawn], batch.streams[drawn], batch.positions[drawn])
        tokens[rows] = self._invert(weights, _column(uniform, device))
        return tokens

    def _highest(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """The highest logits [rows, 1] float64 of all ranks, and the lowest ids [rows] int64 that have them."""
        column = logits.argmax(dim=1, keepdim=True)  # the first among equals
        own = torch.cat((logits.gather(1, column).double(), (column + self._start).double()), dim=1)  # [rows, 2]
        values, ids = self._all_gather(own).view(len(logits), self._num_ranks, 2).unbind(dim=2)  # [rows, ranks]
        first = values.argmax(dim=1, keepdim=True)
        return values.gather(1, first), ids.gather(1, first).squeeze(1).long()

    def _keep_top_k(self, weights: Tensor, logits: Tensor, top_k: npt.NDArray[np.int32]) -> None:
        """Drop weights [rows, columns] in place. What is among the k highest is among the k highest of its rank."""
        chosen = np.flatnonzero((top_k > 0) & (top_k < self._vocab_size))
        if len(chosen) == 0:
            return
        rows = to_device(chosen, logits.device)
        own = logits[rows]
        highest = torch.topk(own, min(int(top_k[chosen].max()), own.shape[1]), sorted=False).values
        ordered = self._all_gather(highest).sort(dim=1, descending=True).values  # [rows, ranks * k]
        lowest = ordered.gather(1, to_device(top_k[chosen].astype(np.int64) - 1, logits.device).unsqueeze(1))
        weights[rows] = weights[rows].masked_fill_(own < lowest, 0.0)

    def _keep_top_p(self, weights: Tensor, logits: Tensor, top_p: npt.NDArray[np.float32]) -> None:
        """Drop weights [rows, columns] in place."""
        chosen = np.flatnonzero(top_p < 1)
        if len(chosen) == 0:
            return
        rows = to_device(chosen, logits.device)
        keys, kept = _ordered_keys(logits[rows]), weights[rows]
        total = self._all_gather(kept.sum(dim=1, keepdim=True)).sum(dim=1, keepdim=True)  # [rows, 1]
        lowest = self._lowest_kept(keys, kept, total * _column(top_p[chosen], logits.device))
        weights[rows] = kept.masked_fill_(keys < lowest, 0.0)

    def _lowest_kept(self, keys: Tensor, mass: Tensor, target: Tensor) -> Tensor:
        """The highest key [rows, 1] such that it and all above have a mass of `target` [rows, 1], over all ranks.

        keys [rows, n] int64 below 2^32, mass [rows, n] float64. Radix selection, as for k-selection on GPUs (Alabi et
        al. 2012, "Fast k-selection algorithms for graphics processing units"), with sums instead of counts.
        """
        lowest = torch.zeros_like(target, dtype=torch.int64)
        for shift in range(32 - _DIGIT_BITS, -1, -_DIGIT_BITS):
            # One bin for each next digit of `lowest`, and one before them for the keys below.
            bins = ((keys - lowest) >> shift).clamp_(-1, _DIGITS - 1).add_(1)
            sums = torch.zeros(len(keys), 1 + _DIGITS, dtype=torch.float64, device=keys.device)
            sums.scatter_add_(1, bins, mass)
            sums = self._all_gather(sums[:, 1:]).view(len(keys), self._num_ranks, _DIGITS).sum(dim=1)
            upwards = sums.flip(1).cumsum(dim=1).flip(1)  # [rows, digits]: mass from each digit on
            digit = (upwards >= target).sum(dim=1, keepdim=True) - 1
            lowest += digit.clamp_(min=0) << shift
        return lowest

    def _invert(self, weights: Tensor, uniform: Tensor) -> Tensor:
        """The first tokens [rows] int64 whose running sums of `weights` exceed uniform [rows, 1] * their total."""
        running = weights.cumsum(dim=1)  # [rows, columns]
        own_total = running[:, -1:].contiguous()
        through = self._all_gather(own_total).cumsum(dim=1)  # [rows, ranks]
        target = uniform * through[:, -1:]
        owner = (through <= target).sum(dim=1, keepdim=True).clamp_(max=self._num_ranks - 1)
        before = through[:, self._rank - 1 : self._rank] if self._rank else 0.0
        column = torch.searchsorted(running, target - before, right=True)  # [rows, 1]
        last = torch.searchsorted(running, own_total)  # should rounding leave the sums short of the target
        return self._all_gather(column.minimum(last) + self._start).gather(1, owner).squeeze(1)


def _ordered_keys(logits: Tensor) -> Tensor:
    """Integers in [0, 2^32), int64, in the order of float32 `logits`; -0 counts as 0."""
    bits = (logits + 0.0).view(torch.int32)
    return torch.where(bits >= 0, bits, bits ^ 0x7FFFFFFF).long() + 2**31


def _column(values: npt.NDArray[np.generic], device: torch.device) -> Tensor:
    """[rows] -> [rows, 1] float64."""
    return to_device(values.astype(np.float64), device).unsqueeze(1)
