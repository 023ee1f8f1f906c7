"""What proposers that copy have in common: the tokens seen so far, how far two places in them agree, what comes next.

A place in a text is the number of tokens before it: the last one before place p is text[p - 1], the one that follows
there text[p].
"""

from __future__ import annotations

import math

from shoal.engine.config import MAX_SPECULATIVE_TOKENS
from shoal.engine.request import Request
from shoal.engine.speculation.proposer import NUM_LEVELS

MAX_MATCH = 32  # tokens of agreement that are counted: a longer one is no surer
# Tokens of a prompt that are looked at in one call, a millisecond or two: a long one is indexed over several steps.
SLICE_TOKENS = 2048
_WIDTHS = (16, 8, 4, 2, 1)

# The level of a guess by the tokens that agree in front of it: three levels for each doubling. A draft takes a slice.
LENGTH_LEVELS = (
    0,
    *(min(int(3 * math.log2(n)), NUM_LEVELS - 1) for n in range(1, MAX_MATCH + MAX_SPECULATIVE_TOKENS)),
)


def extend(ids: list[int], request: Request) -> None:
    """Bring `ids`, leading known tokens of the request, up to all of them."""
    start, known = len(ids), request.num_known
    if start + 1 == known and request.output_ids:
        ids.append(request.output_ids[-1])
    elif start < known:
        ids.extend(request.known_ids(start, known))


def agreement(text: list[int], place: int, ids: list[int], length: int) -> int:
    """How many tokens before `place` in `text` are the last ones of `ids`, MAX_MATCH at most, where `length` are known
    to be. Slices of halving width are compared, which costs less than comparing tokens.
    """
    end = len(ids)
    longest = min(place, end, MAX_MATCH)
    for width in _WIDTHS:
        longer = length + width
        if longer <= longest and text[place - longer : place - length] == ids[end - longer : end - length]:
            length = longer
    return min(length, MAX_MATCH)


def copied(ids: list[int], place: int, most: int) -> list[int]:
    """The `most` tokens from `place` on. Where they run over the end of `ids` the copy goes on with itself: periodic
    text continues.
    """
    tokens = ids[place : place + most]
    if len(tokens) < most:
        tokens = (tokens * -(-most // len(tokens)))[:most]
    return tokens
