"""Prompt lookup decoding: what came after these few tokens the last time comes again."""

from __future__ import annotations

from shoal.engine.request import Request, RequestId
from shoal.engine.speculation.lookup import LENGTH_LEVELS, SLICE_TOKENS, agreement, copied, extend
from shoal.engine.speculation.proposer import NO_DRAFT, Draft


class _Text:
    """Known tokens of a request, and for each n, the shortest first, where the n-grams were last followed by a token.
    They stand there by their hashes: the garbage collector need not go through integers. A collision is seen in the
    tokens.
    """

    __slots__ = ("ids", "num_indexed", "places")

    def __init__(self, lengths: range) -> None:
        self.ids: list[int] = []
        self.num_indexed = 0
        self.places: list[tuple[int, dict[int, int]]] = [(length, {}) for length in lengths]


class NgramProposer:
    """Guesses from the request's own tokens (prompt lookup, Saxena 2023): the longest n from `prompt_lookup_max` down
    to `prompt_lookup_min` for which the last n tokens have occurred before, and what followed them the last time.

    The level of a guess is the number of tokens that agree in front of it, be they more than n, guessed ones included.

    Memory: about 100 bytes for each known token and n, while the request lasts.
    """

    def __init__(self, prompt_lookup_min: int, prompt_lookup_max: int) -> None:
        self._lengths = range(prompt_lookup_min, prompt_lookup_max + 1)
        self._texts: dict[RequestId, _Text] = {}

    def propose(self, request: Request, most: int) -> Draft:
        text = self._texts.get(request.request_id)
        if text is None:
            text = self._texts[request.request_id] = _Text(self._lengths)
        ids = text.ids
        extend(ids, request)
        start, end = text.num_indexed, len(ids)
        if start < end:
            text.num_indexed = min(end, start + SLICE_TOKENS)
            for place in range(start, text.num_indexed):
                for length, places in text.places:
                    if length > place:
                        break
                    places[hash(tuple(ids[place - length : place]))] = place
        best = longest = 0
        for length, places in text.places:  # who has not occurred with n tokens has not with more
            found = places.get(hash(tuple(ids[-length:])))
            if found is None:
                break
            best, longest = found, length
        if most <= 0 or not longest or ids[best - longest : best] != ids[-longest:]:
            return NO_DRAFT
        agreed = agreement(ids, best, ids, longest)
        return Draft(tuple(copied(ids, best, most)), LENGTH_LEVELS[agreed : agreed + most])

    def forget(self, request: Request) -> None:
        self._texts.pop(request.request_id, None)
