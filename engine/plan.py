"""The only message between the host half of the engine and its ranks: a plan out, a result back.

Requests travel in full once (`NewRequest`) and as deltas afterwards (`ContinuedRequest`). There is no prefill phase
and no decode phase: each entry says how many more of the known tokens get their KV in this step. A token is sampled
for every request whose computed tokens reach its known tokens at the end of the step.

Speculative decoding adds guesses behind the known tokens, `draft_ids`: they are computed as if they were known, and a
token is sampled after each. The result has those sampled tokens up to and including the first that is not what was
guessed; the KV of guesses from there on is written over by later steps.

Standard library only, plain data only: a plan must cross a process border as it is.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from shoal.engine.request import BlockId, RequestId, SamplingParams, TokenLogprobs
from shoal.engine.spans import RankWork


class NewRequest(NamedTuple):
    """A request that the ranks do not hold: first admitted, or come back after preemption."""

    request_id: RequestId
    token_ids: tuple[int, ...]  # all known tokens
    num_prompt_tokens: int
    num_computed: int  # tokens whose KV is in `block_ids` already
    num_new: int  # tokens to compute in this step
    block_ids: tuple[BlockId, ...]
    params: SamplingParams
    seed: int
    stream: int


class ContinuedRequest(NamedTuple):
    """A request that the ranks hold: what changed since its last step."""

    request_id: RequestId
    num_computed: int
    num_new: int
    new_token_ids: tuple[int, ...]  # known tokens that the ranks have not seen
    new_block_ids: tuple[BlockId, ...]  # appended to the block table
    # 1: behind `new_token_ids` comes the token that the ranks sampled for it in its last step; it is still on its way
    # to the coordinator, so the ranks take it from their own memory. Otherwise 0.
    num_pending: int = 0
    # Guesses behind the last known token: `num_new` is one more than they are. There is nothing pending then.
    draft_ids: tuple[int, ...] = ()
    num_to_draft: int = 0  # tokens that the ranks' draft model shall guess to follow what this step samples


@dataclass(frozen=True, slots=True)
class StepPlan:
    """What one step does. `copies` are whole-block copies (source, target), done before anything is computed."""

    step: int
    new: tuple[NewRequest, ...] = ()
    continued: tuple[ContinuedRequest, ...] = ()
    finished: tuple[RequestId, ...] = ()  # the ranks forget these first
    copies: tuple[tuple[BlockId, BlockId], ...] = ()
    num_tokens: int = 0  # sum of num_new

    @property
    def is_empty(self) -> bool:
        return self.num_tokens == 0


@dataclass(frozen=True, slots=True)
class StepResult:
    """What one step sampled. A request that did not reach its last known token has no entry."""

    step: int
    token_ids: dict[RequestId, tuple[int, ...]] = field(default_factory=dict)
    logprobs: dict[RequestId, tuple[TokenLogprobs, ...]] = field(default_factory=dict)
    draft_ids: dict[RequestId, tuple[int, ...]] = field(default_factory=dict)  # of the draft model, where asked
    # What each rank that tells has done since it began, as far as is known: put in by the executor.
    ranks: tuple[RankWork, ...] = field(default=(), compare=False)
