"""Suffix decoding: the way that most texts took which ended as this one does."""

from __future__ import annotations

import sys
from array import array

from shoal.engine.request import Request, RequestId
from shoal.engine.speculation.lookup import LENGTH_LEVELS, MAX_MATCH, SLICE_TOKENS, agreement, copied, extend
from shoal.engine.speculation.proposer import NO_DRAFT, Draft

# The most recent ones that are looked at in the request's own text, and as many in the history. Four times as many give
# one draft in fifty more on edited code, for twice the time.
MAX_PLACES = 8
MAX_SALTS = 16  # that have a history at a time

Place = tuple[list[int], int]  # a text, and the number of its tokens before this place


class Places:
    """Places by what stands before them, newest first: chains through a ring, as in an LZ77 coder (zlib). Of more than
    `room` places the oldest are forgotten.

    Numbers are in arrays, and keys are hashes, so that the garbage collector has nothing to go through.
    """

    def __init__(self, room: int = sys.maxsize) -> None:
        self._room = room
        self._count = 0  # places ever; the i-th is in slot i % room
        self._newest: dict[int, int] = {}  # by key: the number of its last place
        self._keys = array("q")  # of each slot, as the rest
        self._before = array("q")  # number of the place before it with this key, -1 for none
        self._texts: list[list[int]] = []
        self._ends = array("q")

    def __len__(self) -> int:
        return len(self._ends)

    def add(self, key: int, text: list[int], end: int) -> None:
        number, newest = self._count, self._newest
        before = newest.get(key, -1)
        if number < self._room:
            self._keys.append(key)
            self._before.append(before)
            self._texts.append(text)
            self._ends.append(end)
        else:
            slot = number % self._room
            forgotten = self._keys[slot]
            if newest[forgotten] == number - self._room:
                del newest[forgotten]
            self._keys[slot], self._before[slot], self._texts[slot], self._ends[slot] = key, before, text, end
        newest[key] = number
        self._count = number + 1

    def find(self, key: int) -> list[Place]:
        """The last MAX_PLACES with this key."""
        found: list[Place] = []
        number = self._newest.get(key, -1)
        if number >= 0:
            before, texts, ends, room = self._before, self._texts, self._ends, self._room
            oldest = max(self._count - room, 0)
            while number >= oldest and len(found) < MAX_PLACES:
                slot = number % room
                found.append((texts[slot], ends[slot]))
                number = before[slot]
        return found


class _Text:
    """What the proposer holds of a request. `said`, the end of the prompt and all that was generated, stays as long as
    the history has a place in it; the rest goes with the request.
    """

    __slots__ = ("history", "ids", "num_before_said", "num_indexed", "num_prompt", "places", "said", "source")

    def __init__(self, request: Request, history: Places | None, context: int) -> None:
        self.ids: list[int] = []
        self.num_indexed = 0
        self.places = Places()
        self.num_prompt = len(request.prompt_ids)
        self.num_before_said = max(self.num_prompt - context, 0)
        self.said: list[int] = []
        self.history = history
        self.source: tuple[Place, int] | None = None  # whence the last draft was, and how many tokens were known then


class SuffixProposer:
    """SuffixDecoding (Oliaro et al. 2024, arXiv 2411.04975): of all places that follow the last `min_match` tokens, in
    the request and in what the replica generated lately, those that agree farthest back with it; from there on the most
    frequent next token, again and again, among those places that still go along. That is the most travelled path of a
    suffix tree; the tree itself is not built: an n-gram's recent places are its subtree, cut to MAX_PLACES. The place
    that the last draft came from stays among them, however often the n-gram has occurred since.

    The level of a guess is the number of tokens that agree in front of it, guessed ones included, scaled down by its
    share of the votes.

    The history is of `history_tokens` generated tokens for each cache salt apart, taken in as they come: nobody is told
    what another tenant's requests said. Prompts do not enter it, but for the last MAX_MATCH tokens in front of an
    answer, which tell where it belongs and are never guessed from it. A salt's is forgotten
    when MAX_SALTS others have had a request since its last one began.

    Memory: about 160 bytes for each known token while its request lasts, and 300 for each token of a history.
    """

    def __init__(self, min_match: int, history_tokens: int) -> None:
        self._min_match = min_match
        self._history_tokens = history_tokens
        self._context = max(MAX_MATCH, min_match)
        self._texts: dict[RequestId, _Text] = {}
        self._histories: dict[str, Places] = {}  # by salt, the one whose last request began first in front

    def propose(self, request: Request, most: int) -> Draft:
        text = self._texts.get(request.request_id)
        if text is None:
            text = _Text(request, self._history_of(request.cache_salt), self._context)
            self._texts[request.request_id] = text
        self._take_in(text, request)
        if most <= 0:
            return NO_DRAFT
        places, agreed = self._farthest(text.ids, self._places(text))
        return self._vote(text, places, agreed, most) if places else NO_DRAFT

    def forget(self, request: Request) -> None:
        text = self._texts.pop(request.request_id, None)
        if text is not None:
            self._take_in(text, request)

    def _history_of(self, salt: str) -> Places | None:
        if not self._history_tokens:
            return None
        history = self._histories.pop(salt, None)
        if history is None:
            history = Places(self._history_tokens)
        self._histories[salt] = history
        if len(self._histories) > MAX_SALTS:
            del self._histories[next(iter(self._histories))]
        return history

    def _take_in(self, text: _Text, request: Request) -> None:
        ids, said = text.ids, text.said
        extend(ids, request)
        said.extend(ids[text.num_before_said + len(said) :])
        history, length, start = text.history, self._min_match, text.num_indexed
        end = text.num_indexed = min(len(ids), start + SLICE_TOKENS)
        for place in range(max(start, length), end):
            key = hash(tuple(ids[place - length : place]))
            text.places.add(key, ids, place)
            if history is not None and place >= text.num_prompt:
                history.add(key, said, place - text.num_before_said)

    def _places(self, text: _Text) -> list[Place]:
        """Where to look: in the request, in the history, and behind the source of the last draft."""
        ids, said = text.ids, text.said
        key = hash(tuple(ids[-self._min_match :]))
        places = own = text.places.find(key)
        past: list[Place] = []
        if text.history is not None:
            past = text.history.find(key)
            places = own + [place for place in past if place[0] is not said]
        if text.source is not None and MAX_PLACES in (len(own), len(past)):  # otherwise it is there already
            (source, end), num_known = text.source
            end += len(ids) - num_known
            if end < len(source) and not any(one is source and at == end for one, at in places):
                places.append((source, end))
        return places

    def _farthest(self, ids: list[int], places: list[Place]) -> tuple[list[Place], int]:
        """Those that agree with the end of `ids` in the most tokens, and in how many, MAX_MATCH at most."""
        best: list[Place] = []
        longest = self._min_match
        tail = ids[-longest:]
        for place in places:
            source, end = place
            if end < longest or source[end - longest : end] != tail:
                continue
            if longest < MAX_MATCH and (agreed := agreement(source, end, ids, longest)) > longest:
                longest, tail = agreed, ids[-agreed:]
                best.clear()
            best.append(place)
        return best, min(longest, MAX_MATCH)

    def _vote(self, text: _Text, places: list[Place], agreed: int, most: int) -> Draft:
        """The path that most of `places` take, token by token. In a tie, the one whose first place comes first."""
        ids = text.ids
        counts: dict[tuple[int, ...], int] = {}
        sources: dict[tuple[int, ...], Place] = {}
        for place in places:
            source, end = place
            path = tuple(copied(ids, end, most) if source is ids else source[end : end + most])
            counts[path] = counts.get(path, 0) + 1
            sources[path] = place
        levels: list[int] = []
        while len(counts) > 1:
            depth = len(levels)
            votes: dict[int, int] = {}
            for path, count in counts.items():
                if depth < len(path):
                    votes[path[depth]] = votes.get(path[depth], 0) + count
            token = max(votes, key=votes.__getitem__)
            levels.append(LENGTH_LEVELS[agreed + depth] * votes[token] // sum(votes.values()))
            counts = {path: count for path, count in counts.items() if path[depth : depth + 1] == (token,)}
        path = next(iter(counts))
        text.source = sources[path], len(ids)
        return Draft(path, (*levels, *LENGTH_LEVELS[agreed + len(levels) : agreed + len(path)]))
