"""How often guesses are right, learned from what came instead of them. Standard library only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from shoal.engine.request import RequestId
from shoal.engine.speculation.proposer import NUM_LEVELS, Draft

PRIOR_CHANCE = 0.5
PRIOR_TRIALS = 4.0
MEMORY = 256.0  # trials of a level, over all requests
OWN_MEMORY = 12.0  # trials of a level in one request
TRUST = 4.0  # trials of its own that outweigh what is known of all requests


@dataclass(slots=True)
class Rate:
    """Successes over trials, of which the latest count most."""

    num_right: float = 0.0
    num_trials: float = 0.0

    def add(self, is_right: bool, memory: float) -> None:
        fading = 1.0 - 1.0 / memory
        self.num_right = self.num_right * fading + is_right
        self.num_trials = self.num_trials * fading + 1.0

    def estimate(self, prior: float, weight: float) -> float:
        return (self.num_right + prior * weight) / (self.num_trials + weight)


class Acceptance:
    """The chance that a guess of some level is right if all before it are: of the request, as far as it has shown, and
    of all requests of late beyond that.
    """

    def __init__(self) -> None:
        self._all = [Rate() for _ in range(NUM_LEVELS)]
        self._own: dict[RequestId, dict[int, Rate]] = {}

    def chances(self, request_id: RequestId, levels: Sequence[int]) -> list[float]:
        own = self._own.get(request_id, {})
        chances = []
        for level in levels:
            chance = self._all[level].estimate(PRIOR_CHANCE, PRIOR_TRIALS)
            chances.append(own[level].estimate(chance, TRUST) if level in own else chance)
        return chances

    def observe(self, request_id: RequestId, draft: Draft, token_ids: Sequence[int]) -> None:
        """`token_ids` are what the request said where `draft` was guessed. Beyond the first wrong guess nothing is
        learned: the others were made for another text.
        """
        own = self._own.setdefault(request_id, {})
        for guess, level, token in zip(draft.token_ids, draft.levels, token_ids, strict=False):
            self._all[level].add(guess == token, MEMORY)
            own.setdefault(level, Rate()).add(guess == token, OWN_MEMORY)
            if guess != token:
                break

    def forget(self, request_id: RequestId) -> None:
        self._own.pop(request_id, None)
