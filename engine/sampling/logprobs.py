"""Log-probabilities of drawn tokens and of the most likely ones, over a vocabulary that tensor ranks may share."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from shoal.engine.parallel.collectives import Collectives
from shoal.engine.request import TokenLogprobs


class Logprobs(NamedTuple):
    """Of some rows, natural logarithms."""

    logprob: Tensor  # [rows] float32 of the drawn tokens
    rank: Tensor  # [rows] int64, 1 for the most likely token
    top_ids: Tensor  # [rows, top] int64, the most likely token first
    top_logprobs: Tensor  # [rows, top] float32

    def to_host(self) -> Logprobs:
        """Copies in the host's memory; not there yet when this returns, where the device works by itself."""
        return Logprobs(*(values.to("cpu", non_blocking=True) for values in self))

    def of_row(self, row: int, num_top: int) -> TokenLogprobs:
        """Waits for the device unless this is in the host's memory."""
        return TokenLogprobs(
            logprob=float(self.logprob[row]),
            rank=int(self.rank[row]),
            top_ids=tuple(self.top_ids[row, :num_top].tolist()),
            top_logprobs=tuple(self.top_logprobs[row, :num_top].tolist()),
        )


def logprobs_of(logits: Tensor, tokens: Tensor, num_top: int, start: int, collectives: Collectives) -> Logprobs:
    """logits [rows, columns] float32: this rank's part of the vocabulary, which begins with token `start`.

    tokens [rows] int64 were drawn; num_top is at least 1 and at most the size of the vocabulary. A rank sends
    3 + 2 * num_top numbers for each row.
    """
    rows, columns = logits.shape
    own_top = torch.topk(logits, min(num_top, columns))
    ids = collectives.all_gather(own_top.indices + start)  # [rows, ranks * top]
    values = collectives.all_gather(own_top.values)  # [rows, ranks * top]
    top = torch.topk(values, num_top)
    highest = top.values[:, :1]  # [rows, 1]

    column = (tokens - start).unsqueeze(1)  # [rows, 1]
    nearest = column.clamp(0, columns - 1)
    own = logits.gather(1, nearest).masked_fill(nearest != column, -torch.inf)  # [rows, 1]
    # log(sum(exp(logits - the rank's highest))), by log_softmax: torch's sums add up a row in another order where there
    # are fewer rows.
    log_sum = -torch.log_softmax(logits, dim=1).gather(1, own_top.indices[:, :1])  # [rows, 1]
    parts = torch.cat((log_sum, own), dim=1)  # [rows, 2]
    log_sums, owns = collectives.all_gather(parts).view(rows, -1, 2).unbind(dim=2)  # [rows, ranks]
    rank_highest = values.view(rows, -1, own_top.values.shape[1])[:, :, 0]  # [rows, ranks]
    sums = torch.exp(rank_highest - highest + log_sums)  # [rows, ranks]
    sums.masked_fill_(rank_highest == -torch.inf, 0.0)  # a rank that has nothing but padding
    total = sums.cumsum(dim=1)[:, -1:].log()  # [rows, 1], above the highest logit
    drawn = owns.amax(dim=1, keepdim=True)
    higher = collectives.all_gather((logits > drawn).sum(dim=1, keepdim=True))  # [rows, ranks]
    return Logprobs(
        logprob=(drawn - highest - total).squeeze(1),
        rank=higher.sum(dim=1) + 1,
        top_ids=ids.gather(1, top.indices),
        top_logprobs=top.values - highest - total,
    )
