"""What it costs to give a request to a replica, in seconds. Pure functions.

The cost of a placement is the time that it adds to everybody's waiting: the request's own time to its first token,
the delay that it brings to prompts that are computed after it, and what has to be computed again because
its blocks push others out of the cache. No weights and no thresholds: the least cost wins. A hot prefix spreads to a
second replica when waiting for its holder costs more than computing it anew; what every replica holds cancels out.
"""

from __future__ import annotations

from typing import NamedTuple

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
    """
    uncached = num_prompt - num_matched
    parts = added_seconds(load, uncached, num_pending, num_new_blocks, eviction_tokens, now)
    return Estimate(*parts, num_matched, uncached)


def added_seconds(
    load: ReplicaLoad, uncached: int, num_pending: int, num_new_blocks: int, eviction_tokens: float, now: float
) -> tuple[float, float, float]:
    """The first three numbers of an Estimate. Called for every replica in every decision: 0.5 us.

    Replicas compute the shortest rest of a prompt first (engine.scheduling), so only shorter ones are ahead, and those
    behind wait for all of ours. Decoding shows in the time of a step. That it is held up by our chunks is not counted:
    it is, wherever we go, and steering around it makes first tokens wait in queues for the sake of milliseconds spread
    over many later ones.
    """
    per_token, step_s, per_prefill_token, wait, room_blocks, num_empty_blocks, prefills, pending = load.terms
    delay = 0.0
    tokens: float = uncached
    if prefills:
        ahead = 0
        for remaining in prefills:
            if remaining <= uncached:
                ahead += remaining
            else:
                delay += per_token * uncached
        elapsed_s = now - load.reported_s
        if ahead * per_token > elapsed_s:
            tokens += ahead - elapsed_s / per_token
    for remaining in pending:
        if remaining <= uncached:
            tokens += remaining
        else:
            delay += per_token * uncached
    if num_pending and tokens < uncached + num_pending:
        tokens = uncached + num_pending
    seconds = per_token * tokens
    least = step_s + per_prefill_token * tokens  # a step has its base, however small
    if seconds < least:
        seconds = least
    if num_new_blocks > room_blocks and load.blocks_per_s:
        wait = max(wait, (num_new_blocks - room_blocks) / load.blocks_per_s)
    eviction = 0.0
    if num_new_blocks > num_empty_blocks:
        eviction = (num_new_blocks - num_empty_blocks) * eviction_tokens * per_token
    return seconds + wait, delay, eviction
