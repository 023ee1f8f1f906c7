"""What no router can beat by much: the hit rate of one cache that every replica shares."""

from __future__ import annotations

import math
from collections import OrderedDict

from shoal.cluster.simulation.trace import Trace


def pooled_hit_rate(trace: Trace, capacity_tokens: float = math.inf) -> float:
    """Share of prompt tokens that one LRU cache of so many tokens would hold when they come, computed exactly.

    As in the engine, only whole blocks are kept, a prompt's last token is always computed, and of one prompt the end
    goes before the beginning. A prompt is in the cache as soon as it has come, which is earlier than any engine has it.
    """
    block_tokens = trace.block_tokens
    capacity = capacity_tokens // block_tokens
    cache: OrderedDict[int, None] = OrderedDict()  # the least recently used first
    num_hit = 0
    for request in trace.requests:
        blocks = request.block_ids[: request.num_prompt // block_tokens]
        usable = blocks[: (request.num_prompt - 1) // block_tokens]
        num_hit += next((index for index, block in enumerate(usable) if block not in cache), len(usable))
        for block in reversed(blocks):
            cache[block] = None
            cache.move_to_end(block)
        while len(cache) > capacity:
            cache.popitem(last=False)
    return num_hit * block_tokens / trace.num_prompt_tokens
