"""What a replica says of its load, for a router that predicts when it would get to a request."""

from __future__ import annotations

import math
from dataclasses import dataclass

from shoal.engine.request import RequestId
from shoal.engine.step_time import StepTime

MAX_PREFILLS = 256
RATE_MEMORY_S = 10.0


@dataclass(frozen=True, slots=True)
class EngineLoad:
    """A replica at one moment.

    prefills: requests whose prompt is not computed yet, waiting and running, with the tokens they have still to
        compute, in the order in which that will happen; at most MAX_PREFILLS. more_prefill_tokens: of the rest.
    num_waiting_tokens: tokens that waiting requests have still to compute, for which they have no KV blocks yet.
    num_context_tokens: tokens of the running requests that have KV.
    num_free_blocks: empty ones (num_empty_blocks) and cached ones that may be evicted.
    step_time: None until enough steps were seen.
    finished_per_s: requests that ended per second, of late (over about RATE_MEMORY_S).
    """

    prefills: tuple[tuple[RequestId, int], ...]
    more_prefill_tokens: int
    num_running: int
    max_running_requests: int
    num_waiting: int
    num_waiting_tokens: int
    num_decoding: int
    num_context_tokens: int
    num_free_blocks: int
    num_empty_blocks: int
    num_blocks: int
    block_size: int
    max_step_tokens: int
    step_time: StepTime | None
    finished_per_s: float

    def decode_s(self, time: StepTime) -> float:
        """Seconds of a step beside the prompt tokens in it."""
        return time.seconds(0, self.num_decoding, self.num_context_tokens)

    def prompt_token_s(self, time: StepTime) -> float:
        """Seconds for each prompt token while so many requests decode, whose part of every step prompts share."""
        return time.per_prefill_token + self.decode_s(time) / max(1, self.max_step_tokens - self.num_decoding)

    def slot_wait_s(self, num_more: int = 0) -> float:
        """Until one of max_running_requests is free for a request that comes behind `num_more`; 0.0 if unknown."""
        excess = self.num_running + self.num_waiting + num_more + 1 - self.max_running_requests
        return max(0, excess) / self.finished_per_s if self.finished_per_s > 0 else 0.0


class RateMeter:
    """Growth of a counter per second, older growth fading exponentially over `memory_s`."""

    def __init__(self, memory_s: float) -> None:
        self._memory_s = memory_s
        self._per_s = 0.0
        self._last: tuple[float, int] | None = None

    def read(self, count: int, now_s: float) -> float:
        if self._last is None:
            self._last = (now_s, count)
        then_s, before = self._last
        if now_s > then_s:
            growth = (count - before) / (now_s - then_s)
            self._per_s += (growth - self._per_s) * -math.expm1((then_s - now_s) / self._memory_s)
            self._last = (now_s, count)
        return self._per_s
