"""Beam search as transformers' `generate` does it: which beams go on, which are finished, when it is over.

Every step each running beam comes with its most likely tokens, and the best `width` ways on of all of them run next. A
way that ends, with an end token or because it is as long as it may be, is a hypothesis if it is among the best `width`.
(Lowerre 1976; the length penalty is that of Wu et al. 2016, arXiv:1609.08144, in transformers' form.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from shoal.engine.request import Request, RequestId, SamplingParams, TokenLogprobs
from shoal.engine.spans import Trace


@dataclass(frozen=True, slots=True, eq=False)
class Beam:
    """A way on from the prompt: its last token, and the beam before it, which others may share.

    `score` is the sum of its tokens' log-probabilities (natural logarithm).
    """

    parent: Beam | None = None  # None: the prompt, which has no token
    token_id: int = -1
    logprobs: TokenLogprobs | None = None  # of the token, and those that were more likely
    score: float = 0.0


class Hypothesis(NamedTuple):
    """A beam that has ended. `score`: its log-probability / tokens ** length_penalty."""

    score: float
    beam: Beam

    def tokens(self) -> tuple[tuple[int, ...], tuple[TokenLogprobs, ...]]:
        """Its tokens, and their log-probabilities."""
        token_ids, logprobs, beam = [], [], self.beam
        while beam.parent is not None:
            assert beam.logprobs is not None
            token_ids.append(beam.token_id)
            logprobs.append(beam.logprobs)
            beam = beam.parent
        return tuple(reversed(token_ids)), tuple(reversed(logprobs))


class BeamSearch:
    """The beams of one prompt. `running` go on, the best one first; `finished` are the best hypotheses, the best one
    first, `params.width` at most, and as many when the search is over.
    """

    def __init__(self, params: SamplingParams, end_ids: frozenset[int], max_tokens: int) -> None:
        self._params = params
        self._end_ids = end_ids
        self._max_tokens = max_tokens
        self._num_tokens = 0  # of every running beam
        self.running = [Beam()]
        self.finished: list[Hypothesis] = []
        self.is_over = False

    def advance(self, reports: Sequence[TokenLogprobs]) -> list[int]:
        """One token more. The answer says for each beam that runs now behind which of those before it comes.

        reports[i] has the most likely tokens behind running[i]; `tokens_needed` of them decide as all would.
        """
        self._num_tokens += 1
        ways = [
            (beam.score + logprob, index, rank)
            for index, (beam, report) in enumerate(zip(self.running, reports, strict=True))
            for rank, logprob in enumerate(report.top_logprobs)
        ]
        ways.sort(key=lambda way: -way[0])
        width, is_last = self._params.width, self._num_tokens == self._max_tokens
        running: list[Beam] = []
        indices: list[int] = []
        for place, (score, index, rank) in enumerate(ways):
            token = reports[index].top_ids[rank]
            is_end = is_last or token in self._end_ids
            if place >= width if is_end else len(running) == width:
                continue
            logprobs = _reported(reports[index], rank, self._params.logprobs)
            beam = Beam(self.running[index], token, logprobs, score)
            if is_end:
                self.finished.append(Hypothesis(self._penalized(score, self._num_tokens), beam))
            else:
                running.append(beam)
                indices.append(index)
        self.finished.sort(key=lambda hypothesis: -hypothesis.score)
        del self.finished[width:]
        self.running = running
        self.is_over = is_last or (len(self.finished) == width and not self._can_improve())
        return indices

    def _can_improve(self) -> bool:
        """Whether a running beam may yet be better than a hypothesis, by the rule that was asked for. Where scores rise
        with the length, that of the present length is no bound, and "never" looks at the longest.
        """
        params = self._params
        if params.early_stopping is True:
            return False
        is_bound = params.early_stopping == "never" and params.length_penalty > 0.0
        best = self._penalized(self.running[0].score, self._max_tokens if is_bound else self._num_tokens)
        return best > self.finished[-1].score

    def _penalized(self, score: float, num_tokens: int) -> float:
        penalty: float = float(num_tokens) ** self._params.length_penalty
        return score / penalty


def tokens_needed(width: int, num_end_ids: int) -> int:
    """The most likely tokens of each beam among which all are that may go on or end: `width` go on at most, and only
    end tokens are passed over for them.
    """
    return width + num_end_ids


def _reported(report: TokenLogprobs, index: int, num_top: int | None) -> TokenLogprobs:
    """As if token `index` of a report had been drawn, with as many alternatives as were asked for."""
    logprob, num_top = report.top_logprobs[index], num_top or 0
    rank = 1 + sum(other > logprob for other in report.top_logprobs[:index])
    return TokenLogprobs(logprob, rank, report.top_ids[:num_top], report.top_logprobs[:num_top])


class Offspring(NamedTuple):
    """What becomes of a group's requests with a token more."""

    gone: list[Request]  # nothing goes on from them
    heirs: list[Request]  # have their next token
    forks: list[tuple[Request, Request]]  # new requests, and whose tokens but the last they share


class BeamGroup:
    """A beam search and its requests: one for each running beam.

    A beam computes its last token, reports what may follow, and then waits for the others, on its blocks or, if it was
    preempted, without any. Its `max_known` is one token away, so it is never planned on the token that it drew.
    """

    def __init__(self, root: Request) -> None:
        """`root`, whose `max_known` and `end_ids` are decided, is the first beam. It stands for all of them outside."""
        assert len(root.result_ids) == root.params.n, root.result_ids
        self.root = root
        self.search = BeamSearch(root.params, root.end_ids, root.max_known - len(root.prompt_ids))
        self.requests = [root]
        self._reports: dict[RequestId, TokenLogprobs] = {}
        self._num_forks = 0
        root.max_known = root.num_known + 1

    @property
    def is_started(self) -> bool:
        return self.root.admitted_s is not None

    @property
    def request_ids(self) -> list[RequestId]:
        return [request.request_id for request in self.requests]

    @property
    def is_complete(self) -> bool:
        """Whether every beam has reported."""
        return len(self._reports) == len(self.requests)

    @property
    def num_preemptions(self) -> int:
        """Of the beam that was preempted most, and those before it."""
        return max([self.root.num_preemptions] + [request.num_preemptions for request in self.requests])

    def report(self, request_id: RequestId, logprobs: TokenLogprobs) -> None:
        self._reports[request_id] = logprobs

    def has_reported(self, request_id: RequestId) -> bool:
        return request_id in self._reports

    def advance(self) -> Offspring:
        """One token more for a group that is complete. The first way on from a beam keeps its request, others get new
        ones.
        """
        before = self.requests
        indices = self.search.advance([self._reports[request.request_id] for request in before])
        self._reports.clear()
        going_on = set(indices)
        offspring = Offspring([each for i, each in enumerate(before) if i not in going_on], [], [])
        next_tokens = []
        self.requests = []
        for index, beam in zip(indices, self.search.running, strict=True):
            request = before[index]
            if index in going_on:
                going_on.remove(index)
                offspring.heirs.append(request)
                next_tokens.append(beam.token_id)
            else:
                fork = self._fork(request, beam.token_id)
                offspring.forks.append((fork, request))
                request = fork
            self.requests.append(request)
        for heir, token in zip(offspring.heirs, next_tokens, strict=True):
            heir.output_ids.append(token)
            heir.num_known = heir.num_expected = heir.num_known + 1
            heir.max_known = heir.num_known + 1
        return offspring

    def _fork(self, parent: Request, token: int) -> Request:
        """A request with the tokens of `parent` and one more. It has no blocks yet, and the ranks do not know it."""
        self._num_forks += 1
        fork = replace(
            parent,
            request_id=RequestId(f"{self.root.request_id}/{self._num_forks}"),
            hypothesis_ids=(),
            output_ids=[*parent.output_ids, token],
            block_hashes=parent.block_hashes.copy(),
            num_sent=0,
            num_slots=0,
            mark=None,
            trace=Trace(),
        )
        fork.max_known = fork.num_known + 1
        return fork
