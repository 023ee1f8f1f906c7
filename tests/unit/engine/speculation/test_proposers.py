"""Proposers that copy, against the same rules by scanning."""

from __future__ import annotations

import gc
import itertools
import weakref
from collections import defaultdict
from unittest.mock import patch

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.engine.config import MAX_SPECULATIVE_TOKENS
from shoal.engine.request import Request, RequestId, SamplingParams
from shoal.engine.speculation import suffix
from shoal.engine.speculation.lookup import LENGTH_LEVELS, MAX_MATCH, SLICE_TOKENS
from shoal.engine.speculation.ngram import NgramProposer
from shoal.engine.speculation.proposer import NO_DRAFT, NUM_LEVELS, Draft, Proposer
from shoal.engine.speculation.suffix import MAX_PLACES, MAX_SALTS, Places, SuffixProposer

PARAMS = SamplingParams(max_tokens=100)
TOKENS = st.integers(0, 2)


def request_of(prompt: tuple[int, ...], name: str = "r", salt: str = "") -> Request:
    return Request(RequestId(name), prompt, PARAMS, 0, 0.0, cache_salt=salt)


def grow(request: Request, *tokens: int) -> Request:
    request.output_ids.extend(tokens)
    request.num_known += len(tokens)
    return request


def known(request: Request) -> list[int]:
    return [*request.prompt_ids, *request.output_ids]


def agreement(text: list[int], place: int, ids: list[int]) -> int:
    longest = min(place, len(ids), MAX_MATCH)
    return next((n for n in range(longest) if text[place - 1 - n] != ids[-1 - n]), longest)


def copied(text: list[int], place: int, most: int) -> list[int]:
    text = list(text)
    for i in range(most):
        text.append(text[place + i])
    return text[-most:]


def ngram_draft(ids: list[int], shortest: int, longest: int, most: int) -> Draft:
    for n in range(longest, shortest - 1, -1):
        for place in range(len(ids) - 1, n - 1, -1):
            if most and ids[place - n : place] == ids[-n:]:
                agreed = agreement(ids, place, ids)
                return Draft(tuple(copied(ids, place, most)), LENGTH_LEVELS[agreed : agreed + most])
    return NO_DRAFT


@given(
    st.lists(TOKENS, max_size=30),
    st.lists(st.tuples(st.lists(TOKENS, max_size=4), st.integers(0, 8)), max_size=12),
    st.integers(1, 3),
    st.integers(0, 3),
)
def test_ngram_is_the_longest_match_and_its_last_place(
    prompt: list[int], steps: list[tuple[list[int], int]], shortest: int, more: int
) -> None:
    proposer = NgramProposer(shortest, shortest + more)
    request = request_of(tuple(prompt))
    for tokens, most in steps:
        draft = proposer.propose(grow(request, *tokens), most)
        assert draft == ngram_draft(known(request), shortest, shortest + more, most)


class Scanned:
    """The rules of SuffixProposer with every place looked at."""

    def __init__(self, min_match: int, history_tokens: int) -> None:
        self.min_match = min_match
        self.history_tokens = history_tokens
        self.said: dict[str, list[tuple[Request, int]]] = defaultdict(list)  # by salt, in the order of arrival
        self.num_seen: dict[Request, int] = {}

    def take_in(self, request: Request) -> None:
        first = max(self.num_seen.get(request, 0), len(request.prompt_ids), self.min_match)
        self.said[request.cache_salt] += [(request, place) for place in range(first, request.num_known)]
        self.num_seen[request] = request.num_known

    def propose(self, request: Request, most: int) -> Draft:
        self.take_in(request)
        ids = known(request)
        history = self.said[request.cache_salt]
        history = history[max(len(history) - self.history_tokens, 0) :]
        places = [(ids, place) for place in range(len(ids) - 1, self.min_match - 1, -1)]
        places += [(known(other), place) for other, place in reversed(history) if other is not request]
        agreed = max((agreement(*place, ids) for place in places), default=0)
        if agreed < self.min_match:
            return NO_DRAFT
        paths = [
            copied(text, place, most) if text is ids else text[place : place + most]
            for text, place in places
            if agreement(text, place, ids) == agreed
        ]
        draft: list[int] = []
        levels: list[int] = []
        while votes := [path[len(draft)] for path in paths if len(path) > len(draft)]:
            token = max(votes, key=votes.count)
            levels.append(LENGTH_LEVELS[agreed + len(draft)] * votes.count(token) // len(votes))
            draft.append(token)
            paths = [path for path in paths if path[: len(draft)] == draft]
        return Draft(tuple(draft), tuple(levels))


@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.lists(TOKENS, max_size=5), st.integers(0, 6)), max_size=30),
    st.lists(st.lists(TOKENS, max_size=8), min_size=1, max_size=5),
    st.integers(1, 3),
    st.sampled_from([0, 1, 7, 30, 1000]),
)
def test_suffix_goes_where_most_of_the_farthest_go(
    steps: list[tuple[str, list[int], int]], prompts: list[list[int]], min_match: int, history_tokens: int
) -> None:
    """Requests "a" and "b" share a salt; most = 0 ends the one that is asked for, and its name is used again."""
    proposer, scanned = SuffixProposer(min_match, history_tokens), Scanned(min_match, history_tokens)
    prompt = itertools.cycle(prompts)
    requests: dict[str, Request] = {}
    with patch.object(suffix, "MAX_PLACES", 10**6):
        for name, tokens, most in steps:
            if name not in requests:
                requests[name] = request_of(tuple(next(prompt)), name, "other" if name == "c" else "")
                scanned.num_seen[requests[name]] = 0
                proposer.propose(requests[name], 0)
            request = grow(requests[name], *tokens)
            if most:
                assert proposer.propose(request, most) == scanned.propose(request, most)
            else:
                proposer.forget(requests.pop(name))
                scanned.take_in(request)


PROPOSERS = pytest.mark.parametrize(
    "proposer", [NgramProposer(2, 5), SuffixProposer(2, 0), SuffixProposer(2, 1000)], ids=["ngram", "suffix", "history"]
)


@PROPOSERS
@pytest.mark.parametrize("prompt", [(), (1,), (1, 2), (1, 2, 3)])
def test_a_short_prompt_has_nothing_to_copy(proposer: Proposer, prompt: tuple[int, ...]) -> None:
    request = request_of(prompt)
    assert proposer.propose(request, 8) == NO_DRAFT
    proposer.forget(request)
    proposer.forget(request)  # and one that it does not know is nothing to it


@PROPOSERS
def test_a_periodic_text_goes_on(proposer: Proposer) -> None:
    request = request_of((9, 1, 2, 3, 1, 2, 3, 1))
    assert proposer.propose(request, 0) == NO_DRAFT
    draft = proposer.propose(request, MAX_SPECULATIVE_TOKENS)
    assert draft.token_ids == tuple(itertools.islice(itertools.cycle((2, 3, 1)), MAX_SPECULATIVE_TOKENS))
    assert len(draft.levels) == MAX_SPECULATIVE_TOKENS
    assert list(draft.levels) == sorted(draft.levels)
    assert draft.levels[-1] == NUM_LEVELS - 1
    proposer.forget(request)


@PROPOSERS
def test_a_name_is_used_again(proposer: Proposer) -> None:
    first, second = request_of((1, 2, 3, 1, 2)), request_of((4, 5, 6, 1, 2))
    proposer.propose(first, 1)
    proposer.forget(first)
    assert proposer.propose(second, 1) == NO_DRAFT
    proposer.forget(second)


@PROPOSERS
def test_a_long_prompt_is_indexed_by_and_by(proposer: Proposer) -> None:
    prompt = tuple(range(3 * SLICE_TOKENS))
    request = request_of((*prompt, *prompt[-10:-5]))
    drafts = [proposer.propose(request, 2).token_ids for _ in range(4)]
    assert drafts == [(), (), prompt[-5:-3], prompt[-5:-3]]
    proposer.forget(request)


@pytest.mark.parametrize("length", [MAX_MATCH, 3 * MAX_MATCH])
def test_a_match_may_have_to_be_long(length: int) -> None:
    text = tuple(range(length + 1))
    for proposer in (NgramProposer(length, length), SuffixProposer(length, 1000)):
        draft = proposer.propose(request_of((*text, 500, *text[:-1])), 3)
        assert draft == Draft((length, 500, 0), (NUM_LEVELS - 1,) * 3)
        assert proposer.propose(request_of((*text[1:], 500, *text[1:-1]), "short"), 3) == NO_DRAFT


def test_colliding_hashes_are_seen_in_the_tokens() -> None:
    with patch("builtins.hash", lambda _: 0):
        for proposer in (NgramProposer(2, 3), SuffixProposer(2, 1000)):
            assert proposer.propose(request_of((1, 2, 3, 4, 5)), 3) == NO_DRAFT
        assert SuffixProposer(2, 1000).propose(request_of((1, 2, 3, 4, 1, 2)), 1).token_ids == (3,)


def test_what_a_sibling_says_is_guessed_as_it_comes() -> None:
    proposer = SuffixProposer(2, 1000)
    first, second = request_of((1, 2, 3), "first"), request_of((1, 2, 3), "second")
    proposer.propose(grow(first, 4, 5, 6), 8)
    assert proposer.propose(grow(second, 4), 8).token_ids == (5, 6)
    proposer.propose(grow(first, 7), 8)
    assert proposer.propose(second, 8).token_ids == (5, 6, 7)


def test_what_was_said_last_enters_the_history_when_a_request_is_over() -> None:
    proposer = SuffixProposer(2, 1000)
    proposer.propose(first := request_of((1, 2, 3), "first"), 8)
    proposer.forget(grow(first, 4, 5, 6))
    assert proposer.propose(request_of((8, 2, 3), "second"), 8).token_ids == (4, 5, 6)


def test_a_prompt_is_never_guessed_for_another_request() -> None:
    proposer = SuffixProposer(2, 1000)
    proposer.propose(grow(request_of((1, 2, 3, 4), "first"), 5), 8)
    assert proposer.propose(request_of((1, 2), "second"), 8) == NO_DRAFT
    assert proposer.propose(request_of((3, 4), "third"), 8).token_ids == (5,)


def test_salts_do_not_hear_each_other() -> None:
    proposer = SuffixProposer(2, 1000)
    proposer.propose(grow(request_of((1, 2), "first", "tenant"), 3, 4), 8)
    assert proposer.propose(request_of((1, 2), "second", "other"), 8) == NO_DRAFT
    assert proposer.propose(request_of((1, 2), "third"), 8) == NO_DRAFT
    assert proposer.propose(request_of((1, 2), "fourth", "tenant"), 8).token_ids == (3, 4)


def test_the_salt_unused_for_longest_is_forgotten() -> None:
    proposer = SuffixProposer(2, 1000)
    for i in range(MAX_SALTS):
        proposer.propose(grow(request_of((1, 2), f"r{i}", f"salt {i}"), 3), 8)
    proposer.propose(request_of((7,), "touch", "salt 0"), 8)
    proposer.propose(request_of((7,), "new", "new"), 8)
    drafts = [proposer.propose(request_of((1, 2), f"again {i}", f"salt {i}"), 8) for i in (0, 1)]
    assert [draft.token_ids for draft in drafts] == [(3,), ()]


def test_the_history_keeps_so_many_tokens() -> None:
    places = Places(room=10)
    for i in range(100):
        places.add(i % 30, [i], i)
        assert len(places) == min(i + 1, 10)
    assert len(places._newest) == 10
    assert [places.find(i % 30) for i in range(90, 100)] == [[([i], i)] for i in range(90, 100)]
    assert places.find(29) == []


def test_a_requests_text_goes_with_it() -> None:
    class Text(list[int]):
        pass

    for proposer in (NgramProposer(2, 5), SuffixProposer(2, 1000)):
        request = grow(request_of(tuple(range(100))), 1, 2)
        proposer.propose(request, 8)
        state = proposer._texts[request.request_id]
        state.ids = Text(state.ids)
        gone = weakref.ref(state.ids)
        proposer.forget(request)
        del state
        gc.collect()
        assert gone() is None
        assert not proposer._texts


def test_the_place_copied_from_is_not_lost_among_many() -> None:
    """Every second token is a comma: soon more recent places hide the one that agrees, but it goes on."""
    comma = 0
    quoted = [token for i in range(1, 9) for token in (100 + i, comma, comma)]
    noise = [token for i in range(1, 2 * MAX_PLACES) for token in (200 + i, comma, comma)]
    request = request_of((*quoted, *noise, 101))
    proposer = SuffixProposer(1, 0)
    for token in quoted[1:]:
        assert proposer.propose(request, 2).token_ids[0] == token
        grow(request, token)
