"""Which rows of logits draw a token in one step, and how."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from shoal.engine.request import RequestId, SamplingParams


@dataclass(frozen=True, slots=True)
class SampleBatch:
    """The settings of the rows that draw in one step. Arrays are [samples].

    A request with drafts has several rows, one behind the other: row i draws what follows the first i drafts.
    """

    request_ids: list[RequestId]
    params: list[SamplingParams]
    num_outputs: list[int]  # tokens generated before this one, drafts included
    seeds: npt.NDArray[np.uint64]
    streams: npt.NDArray[np.uint32]
    positions: npt.NDArray[np.int64]  # of the token to be drawn
    num_guessed: npt.NDArray[np.int64]  # drafts before that position
    guesses: npt.NDArray[np.int64]  # the draft at that position, below 0 where there is none
    temperature: npt.NDArray[np.float32]  # 0: greedy
    top_k: npt.NDArray[np.int32]  # 0: off
    top_p: npt.NDArray[np.float32]
    min_p: npt.NDArray[np.float32]
