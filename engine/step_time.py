"""How long a step takes: a linear model of what is in it, learned while the engine runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from shoal.engine.plan import StepPlan

NUM_INPUTS = 4  # those of StepWork
MIN_STEPS = 16  # before anything is said, and between two answers
MEMORY = 512  # steps; older ones have faded to less than 1/e
CLIP = 3.0  # a step counts as at most so many times what was expected of it
MIN_VARIANCE = 1e-3  # of an input's mean square
RIDGE = 1e-5  # of an input's mean square: variance below that explains nothing


class StepWork(NamedTuple):
    """What is in a step. A request with one token to compute decodes, and so do its drafts; context tokens are those of
    all its requests that already have KV, which attention reads. Draft rounds are what the most hopeful request has the
    draft model guess.
    """

    num_prefill: int
    num_decode: int
    num_context: int
    num_draft_rounds: int = 0


def work_of(plan: StepPlan) -> StepWork:
    counts = [entry.num_new for entry in plan.continued] + [new.num_new for new in plan.new]
    num_decode = counts.count(1) + sum([entry.num_new for entry in plan.continued if entry.draft_ids])
    num_context = sum([entry.num_computed for entry in plan.continued]) + sum([new.num_computed for new in plan.new])
    num_draft_rounds = max([entry.num_to_draft for entry in plan.continued], default=0)
    return StepWork(plan.num_tokens - num_decode, num_decode, num_context, num_draft_rounds)


@dataclass(frozen=True, slots=True)
class StepTime:
    """Seconds of a step, and of each token in it (`StepWork`)."""

    base: float
    per_prefill_token: float
    per_decode_token: float
    per_context_token: float
    per_draft_round: float = 0.0

    def seconds(self, num_prefill: int, num_decode: int, num_context: int, num_draft_rounds: int = 0) -> float:
        return (
            self.base
            + self.per_prefill_token * num_prefill
            + self.per_decode_token * num_decode
            + self.per_context_token * num_context
            + self.per_draft_round * num_draft_rounds
        )


class StepTimeFit:
    """Least squares over the last few hundred steps, with no coefficient below zero.

    Each step weighs 1 / expected seconds squared, so that it is relative errors that are small, of short steps as of
    long ones; before anything is expected its own seconds stand for that. A step that took far longer (the machine was
    busy with something else) counts as CLIP times what was expected: one hardly shows, a lasting change moves the
    answer by and by. Inputs that do not vary get nothing and are part of `base`.
    """

    def __init__(self) -> None:
        size = NUM_INPUTS + 2  # 1, the inputs, seconds
        self._sums = [[0.0] * size for _ in range(size)]  # weighted sums of products; the lower triangle stays 0
        self._num_seen = 0
        self._estimate: StepTime | None = None

    def add(self, work: StepWork, seconds: float) -> None:
        """Take in a step that is over. Microseconds, but for every MIN_STEPS-th."""
        expected = seconds
        if self._estimate is not None:
            expected = self._estimate.seconds(*work)
            seconds = min(seconds, CLIP * expected)
        weight = 1.0 / max(expected, 1e-6) ** 2
        row = (1.0, *work, seconds)
        for i, sums in enumerate(self._sums):
            for j in range(i, len(row)):
                sums[j] += (weight * row[i] * row[j] - sums[j]) / MEMORY
        self._num_seen += 1
        if self._num_seen % MIN_STEPS == 0:
            self._estimate = self._fit()

    def estimate(self) -> StepTime | None:
        """None until MIN_STEPS steps were seen."""
        return self._estimate

    def has_varied(self, index: int) -> bool:
        """Whether steps have shown what an input of StepWork costs: it was not always the same."""
        total = self._sums[0][0]
        if total == 0.0:
            return False
        mean, mean_square = self._sums[0][index + 1] / total, self._sums[index + 1][index + 1] / total
        return mean_square - mean**2 > MIN_VARIANCE * mean_square

    def _fit(self) -> StepTime:
        means = [value / self._sums[0][0] for value in self._sums[0]]
        slopes = self._slopes(means)
        base = means[-1] - sum(slope * mean for slope, mean in zip(slopes, means[1:], strict=False))
        if base < 0.0:
            base, slopes = 0.0, self._slopes([0.0] * len(means))
        return StepTime(base, *slopes)

    def _slopes(self, means: list[float]) -> list[float]:
        """Coefficients of the inputs around `means`, none below zero: the lowest is left out until none is."""
        total = self._sums[0][0]

        def covariance(i: int, j: int) -> float:
            return self._sums[i][j] / total - means[i] * means[j]

        slopes = [0.0] * NUM_INPUTS
        inputs = [i for i in range(1, NUM_INPUTS + 1) if self._sums[i][i] > 0.0]
        while inputs:
            matrix = [[covariance(min(i, j), max(i, j)) for j in inputs] for i in inputs]
            for k, i in enumerate(inputs):
                matrix[k][k] += RIDGE * self._sums[i][i] / total
            found = solve(matrix, [covariance(i, NUM_INPUTS + 1) for i in inputs])
            lowest = min(found)
            if lowest >= 0.0:
                for i, slope in zip(inputs, found, strict=True):
                    slopes[i - 1] = slope
                break
            del inputs[found.index(lowest)]
        return slopes


def solve(matrix: list[list[float]], right: list[float]) -> list[float]:
    """x in matrix x = right, for a symmetric positive definite matrix: Gaussian elimination without pivots."""
    size = len(right)
    rows = [[*row, value] for row, value in zip(matrix, right, strict=True)]
    for k in range(size):
        for below in rows[k + 1 :]:
            factor = below[k] / rows[k][k]
            for j in range(k, size + 1):
                below[j] -= factor * rows[k][j]
    found = [0.0] * size
    for k in reversed(range(size)):
        rest = sum(rows[k][j] * found[j] for j in range(k + 1, size))
        found[k] = (rows[k][size] - rest) / rows[k][k]
    return found
