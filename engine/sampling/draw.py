"""Drawing a token from each row of logits, wherever the vocabulary is; here by a rank that has all of it."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt
from torch import Tensor

from shoal.engine.parallel.collectives import Collectives
from shoal.engine.parallel.topology import Topology
from shoal.engine.sampling.batch import SampleBatch
from shoal.engine.sampling.random_numbers import uniforms
from shoal.engine.sampling.split_draw import SplitVocabularyDraw
from shoal.engine.sampling.transfer import to_device
from shoal.kernels.dispatch import Operations


class Draw(Protocol):
    """One token a row, as the contract of kernels' `sample` says, the same on every tensor rank."""

    def __call__(self, logits: Tensor, batch: SampleBatch) -> Tensor:
        """logits [samples, columns of this rank] float32 -> token ids [samples] int64, without waiting for them."""
        ...


class WholeVocabularyDraw:
    """A Draw of a rank that is alone."""

    def __init__(self, ops: Operations) -> None:
        self._sample = ops.sample

    def __call__(self, logits: Tensor, batch: SampleBatch) -> Tensor:
        return self._sample(logits, *(to_device(values, logits.device) for values in draw_settings(batch).values()))


def draw_settings(batch: SampleBatch) -> dict[str, npt.NDArray[np.generic]]:
    """What kernels' `sample` takes beside the logits, in its order: [samples] each."""
    is_greedy = not batch.temperature.any()
    return {
        "temperature": batch.temperature,
        "top_k": batch.top_k,
        "top_p": batch.top_p,
        "min_p": batch.min_p,
        # Greedy rows do not look at it.
        "uniform": batch.temperature if is_greedy else uniforms(batch.seeds, batch.streams, batch.positions),
    }


def make_draw(ops: Operations, vocab_size: int, topology: Topology, collectives: Collectives) -> Draw:
    """The Draw of a rank of this topology."""
    if topology.tensor_size == 1:
        return WholeVocabularyDraw(ops)
    return SplitVocabularyDraw(vocab_size, topology, collectives)
