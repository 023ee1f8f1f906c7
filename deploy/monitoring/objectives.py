"""How fast and how often users are to be answered: what alerts hold a deployment to."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Objectives:
    """ttft_s, itl_s: to the first token, from one to the next; bounds of those metrics' buckets.

    share: of first tokens, and of gaps between tokens, that are to be within them.
    """

    ttft_s: float = 2.5
    itl_s: float = 0.1
    share: float = 0.99
