"""Guesses of a smaller model, which runs on the ranks: what it guessed, and how far it shall guess next. Standard
library only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from shoal.engine.request import Request, RequestId
from shoal.engine.speculation.acceptance import Acceptance
from shoal.engine.speculation.proposer import NO_DRAFT, NUM_LEVELS, Draft

PROBE_ROUNDS = 2
FIRST_PROBE_STEPS, LAST_PROBE_STEPS = 16, 1024


class DraftModelProposer:
    """Hands on what came with the results of steps. A guess's level is its place in the draft."""

    def __init__(self) -> None:
        self._guessed: dict[RequestId, tuple[int, tuple[int, ...]]] = {}  # behind how many known tokens, and what

    def take(self, request: Request, draft_ids: tuple[int, ...]) -> None:
        """What the draft model guessed in a step, to follow the known tokens of `request`."""
        self._guessed[request.request_id] = request.num_known, draft_ids

    def propose(self, request: Request, most: int) -> Draft:
        num_known, token_ids = self._guessed.pop(request.request_id, (0, ()))
        token_ids = token_ids[: max(most, 0)]
        if num_known != request.num_known or not token_ids:
            return NO_DRAFT
        return Draft(token_ids, tuple([min(index, NUM_LEVELS - 1) for index in range(len(token_ids))]))

    def forget(self, request: Request) -> None:
        self._guessed.pop(request.request_id, None)


class DraftRounds:
    """How many tokens the draft model shall guess for each request, each round of which costs the batch a step of the
    draft model.

    Unlike other proposals these cost time before it is known what they are worth. While they do not pay, one request is
    guessed for now and then, to see whether they would; rarer each time they would not.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._num_idle = 0
        self._probe_after = FIRST_PROBE_STEPS

    def choose(
        self,
        requests: Sequence[Request],
        acceptance: Acceptance,
        seconds: float,
        token_cost: float,
        round_cost: float,
    ) -> dict[RequestId, int]:
        """Rounds for each of `requests`, all that decode in this step; those without any are left out.

        `seconds` of a step without drafts, and of a token and of a round more.
        """
        survivals = {}  # of the first, second, ... guess
        for request in requests:
            limit = min(self._most, request.max_known - request.num_known - 2)
            levels = [min(index, NUM_LEVELS - 1) for index in range(limit)]
            survival, chain = 1.0, []
            for chance in acceptance.chances(request.request_id, levels):
                survival *= chance
                chain.append(survival)
            survivals[request.request_id] = chain
        chosen = _best(survivals, seconds, token_cost, round_cost)
        if chosen:
            self._num_idle, self._probe_after = 0, FIRST_PROBE_STEPS
            return chosen
        self._num_idle += 1
        if self._num_idle >= self._probe_after and (able := [key for key, chain in survivals.items() if chain]):
            self._num_idle, self._probe_after = 0, min(2 * self._probe_after, LAST_PROBE_STEPS)
            return {able[0]: min(PROBE_ROUNDS, len(survivals[able[0]]))}
        return {}


def _best(
    survivals: Mapping[RequestId, Sequence[float]], seconds: float, token_cost: float, round_cost: float
) -> dict[RequestId, int]:
    """Rounds with the most expected tokens a second: one more brings its surviving guesses, each of which has to be
    verified too.
    """
    tokens = float(len(survivals))
    best_rate, best_rounds = tokens / seconds, 0
    for rounds in range(1, max(map(len, survivals.values())) + 1):
        alive = [chain[rounds - 1] for chain in survivals.values() if len(chain) >= rounds]
        tokens += sum(alive)
        seconds += round_cost + token_cost * len(alive)
        if tokens / seconds > best_rate:
            best_rate, best_rounds = tokens / seconds, rounds
    least = token_cost * best_rate  # what a guess must be worth to be verified
    counts = {
        request_id: sum([survival >= least for survival in chain[:best_rounds]])
        for request_id, chain in survivals.items()
    }
    return {request_id: count for request_id, count in counts.items() if count}
