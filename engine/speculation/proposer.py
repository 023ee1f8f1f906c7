"""The protocol of those who guess what a request will say next. Standard library only."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from shoal.engine.request import Request

NUM_LEVELS = 16


class Draft(NamedTuple):
    """Guesses in order. levels[i], 0 to NUM_LEVELS - 1, says how sure the proposer is that token_ids[i] is right if all
    before it are: higher is surer. What a level is worth is measured (`acceptance.py`).
    """

    token_ids: tuple[int, ...]
    levels: tuple[int, ...]


NO_DRAFT = Draft((), ())


class Proposer(Protocol):
    """Guesses the next tokens of requests. A guess may be wrong or absent, never expensive: `propose` is called for all
    decoding requests in every step that speculates, and takes microseconds.

    A request that was proposed for is in the proposer's memory until `forget`. Its known tokens only grow, by any
    number between two calls; with the first call all of them are new.
    """

    def propose(self, request: Request, most: int) -> Draft:
        """Up to `most` tokens to follow the known ones of `request`."""
        ...

    def forget(self, request: Request) -> None:
        """The request is over (or was never proposed for)."""
        ...
