"""What it costs to give a request to a replica, in seconds. Pure functions.

The cost of a placement is the time that it adds to everybody's waiting: the request's own time to its first token,
the delay that it brings to those who are computed after it or beside it, and what has to be computed again because
its blocks push others out of the cache. No weights and no thresholds: the least cost wins. A hot prefix spreads to a
second replica when waiting for its holder costs more than computing it anew; what every replica holds cancels out.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple, cast

from shoal.cluster.routing.load import ReplicaLoad


class Estimate(NamedTuple):
    """Seconds, and the prompt tokens that will be found there or computed."""

    ttft_s: float  # own time to the first token
    delay_s: float  # of all others together
    eviction_s: float  # to compute evicted blocks again, as far as they are expected back
    num_matched: int
    num_uncached: int

    @property
    def cost_s(self) -> float:
        return self.ttft_s + self.delay_s + self.eviction_s


# A NamedTuple's own constructor is a Python function; this is called for every replica in every decision.
_estimate = cast(Callable[[tuple[float, float, float, int, int]], Estimate], partial(tuple.__new__, Estimate))


def estimate(
    load: ReplicaLoad,
    num_prompt: int,
    num_matched: int,
    num_pending: int,
    num_new_blocks: int,
    eviction_tokens: float,
    now: float,
) -> Estimate:
    """For a prompt of `num_prompt` tokens, `num_matched` of them cached there, that needs `num_new_blocks` KV blocks.

    `num_pending` of the matched tokens are still to be computed, for a request that shares them. `eviction_tokens`:
    what has to be computed again, by expectation, for each block that this one pushes out.

    Replicas compute the shortest rest of a prompt first (engine.scheduling), so only shorter ones are ahead. Those
    behind wait for all of ours; those that decode wait for it too, as their steps carry our chunks.
    """
    uncached = num_prompt - num_matched
    ahead, num_behind = 0.0, 0
    if prefills := load.prefills:
        for remaining in prefills:
            if remaining <= uncached:
                ahead += remaining
            else:
                num_behind += 1
        ahead = max(ahead, num_pending) - (now - load.reported_s) / load.seconds_per_token
        if ahead < 0.0:
            ahead = 0.0
    seconds = load.seconds_per_token * (ahead + uncached)
    least = load.step_s + load.per_prefill_token * (ahead + uncached)  # a step has its base, however small
    ttft = (seconds if seconds > least else least) + load.slot_wait_s
    delay = uncached * (load.seconds_per_token * num_behind + load.decoding_delay)
    evicted = num_new_blocks - load.num_empty_blocks
    eviction = evicted * eviction_tokens * load.seconds_per_token if evicted > 0 else 0.0
    return _estimate((ttft, delay, eviction, num_matched, uncached))
