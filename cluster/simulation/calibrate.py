"""The designed experiment behind a calibrated profile: which steps to time, and the rates that explain them.

A scene is a handful of requests that are added at once and run to their end. The scheduler makes the same steps of it
every time, so a scene that is run again times the same steps again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from operator import mul
from statistics import fmean, median
from typing import Final, NamedTuple

from shoal.engine.config import ConfigError
from shoal.engine.step_time import StepTime, StepWork, solve

REPEATS: Final = 3
NUM_DECODE_STEPS: Final = 4  # of a scene, behind its prompts
_KV_SHARE: Final = 0.9  # of the pool, at most, in use by one scene
_RIDGE: Final = 1e-9  # what columns that go together share evenly
_ROUNDS: Final = 10  # of weighing
_FAR: Final = 3.0  # times the median error
_LEAST_ERROR: Final = 1e-9


@dataclass(frozen=True, slots=True)
class Limits:
    """What the engine at hand takes."""

    kv_tokens: int
    max_model_len: int
    max_step_tokens: int
    max_running_requests: int


class Scene(NamedTuple):
    """`num_requests` prompts of `num_prompt` tokens each, completed with `num_new` tokens."""

    num_requests: int
    num_prompt: int
    num_new: int


class Timing(NamedTuple):
    work: StepWork
    seconds: float


def scenes(limits: Limits) -> list[Scene]:
    """Chunks of many sizes, prompts of several steps, batches from one to the most that may run, contexts short and
    long, and prompts beside requests that decode, as far as the engine's limits let each of them be.
    """
    step, most = limits.max_step_tokens, limits.max_running_requests
    short = max(16, step // 64)
    wanted = [(1, size) for size in (short, step // 16, step // 4, step // 2, step, 2 * step)]
    wanted += [(batch, short) for batch in _powers(4, most)]
    wanted += [(4, step // 2), (4, step)]  # one prompt after the other, while those before decode
    fitting = (_fitting(limits, *one) for one in wanted)
    return list(dict.fromkeys(scene for scene in fitting if scene is not None))


def _powers(factor: int, most: int) -> Iterator[int]:
    power = factor
    while power < most:
        yield power
        power *= factor
    yield most


def _fitting(limits: Limits, num_requests: int, num_prompt: int) -> Scene | None:
    """The scene, with fewer or shorter requests where the engine has no room; None if it has none at all."""
    # The first of several prompts has to decode until the last one is computed.
    num_new = 1 + NUM_DECODE_STEPS + num_requests * num_prompt // limits.max_step_tokens
    room = int(limits.kv_tokens * _KV_SHARE)
    num_prompt = min(num_prompt, min(limits.max_model_len, room) - num_new)
    if num_prompt < 1:
        return None
    return Scene(min(num_requests, limits.max_running_requests, room // (num_prompt + num_new)), num_prompt, num_new)


def merged(repeats: Sequence[Sequence[Timing]]) -> list[Timing]:
    """One scene's steps, each with the median of its times over the repeats: no hiccup of the machine counts."""
    steps = list(zip(*repeats, strict=True))
    assert all(len({timing.work for timing in same}) == 1 for same in steps), "the scheduler made other steps of it"
    return [Timing(same[0].work, median(timing.seconds for timing in same)) for same in steps]


@dataclass(frozen=True, slots=True)
class Fit:
    """Rates, and how far they are from what was timed. Errors are shares of the time of a step."""

    step_time: StepTime
    num_steps: int
    median_error: float
    p90_error: float
    r2: float  # of the seconds


def fit(timings: Sequence[Timing]) -> Fit:
    """The four rates, none below zero, with the least squares of relative errors: a short step counts as much as a long
    one. One that is far off the rest counts in proportion to its error, not to the square (Huber 1964).

    Raises ValueError for no timings.
    """
    if not timings:
        raise ValueError("no step was timed")
    rows = [[value / timing.seconds for value in (1, *timing.work)] for timing in timings]
    weights = [1.0] * len(rows)
    for _ in range(_ROUNDS):
        rates = non_negative_least_squares(rows, [1.0] * len(rows), weights)
        errors = [abs(sum(map(mul, row, rates)) - 1) for row in rows]
        usual = max(_FAR * median(errors), _LEAST_ERROR)
        weights = [min(1.0, usual / max(error, _LEAST_ERROR)) for error in errors]
    ordered = sorted(errors)
    step_time = StepTime(*rates)
    return Fit(
        step_time,
        len(timings),
        median(errors),
        ordered[min(len(ordered) - 1, len(ordered) * 9 // 10)],
        _r2(step_time, timings),
    )


def _r2(step_time: StepTime, timings: Sequence[Timing]) -> float:
    mean = fmean(timing.seconds for timing in timings)
    residual = sum((step_time.seconds(*timing.work) - timing.seconds) ** 2 for timing in timings)
    total = sum((timing.seconds - mean) ** 2 for timing in timings)
    return 1 - residual / total if total else 1.0


Run = Callable[[Scene, int], list[Timing]]  # runs a scene with prompts of that seed; answers its steps in order


def calibrate(limits: Limits, run: Run, *, on_progress: Callable[[int, int], None]) -> Fit:
    """Time every scene REPEATS times and fit. Repeats are rounds over all scenes, so that a slow minute of the machine
    meets one repeat of each. Raises ConfigError for an engine that has no room for any scene.
    """
    listed = scenes(limits)
    if not listed:
        raise ConfigError(
            f"a model with {limits.max_model_len} positions and a pool of {limits.kv_tokens} tokens is too small to be "
            f"calibrated: raise max_model_len or kv_memory",
            field="max_model_len",
        )
    total = REPEATS * len(listed)
    run(listed[0], -1)  # what is made ready on first use is not timed
    timed: list[list[list[Timing]]] = [[] for _ in listed]
    for repeat in range(REPEATS):
        for index, scene in enumerate(listed):
            timed[index].append(run(scene, repeat * len(listed) + index))
            on_progress(repeat * len(listed) + index + 1, total)
    return fit([timing for repeats in timed for timing in merged(repeats)])


def non_negative_least_squares(
    rows: Sequence[Sequence[float]], wanted: Sequence[float], weights: Sequence[float]
) -> list[float]:
    """The x, none below zero, with the least weighted squares of rows x - wanted: of the solutions with some x at zero,
    the best that has none below. Exact, and quick for a few columns.
    """
    columns = range(len(rows[0]))
    weighted = list(zip(rows, wanted, weights, strict=True))
    gram = [[sum(weight * row[i] * row[j] for row, _, weight in weighted) for j in columns] for i in columns]
    right = [sum(weight * row[i] * value for row, value, weight in weighted) for i in columns]
    varying = [i for i in columns if gram[i][i] > 0]
    best, most_explained = [0.0 for _ in columns], 0.0
    for size in range(1, len(varying) + 1):
        for used in combinations(varying, size):
            matrix = [[gram[i][j] * (1 + _RIDGE * (i == j)) for j in used] for i in used]
            solution = solve(matrix, [right[i] for i in used])
            explained = sum(x * right[i] for i, x in zip(used, solution, strict=True))  # of the squares of `wanted`
            if min(solution) >= 0 and explained > most_explained:
                found = dict(zip(used, solution, strict=True))
                best, most_explained = [found.get(i, 0.0) for i in columns], explained
    return best
