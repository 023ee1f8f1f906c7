"""The distribution that `sample` draws from, against one computed from its description alone."""

from __future__ import annotations

import math
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from shoal.kernels.dispatch import Operations, operations, reference

TABLES = {"reference": reference, "cpu": lambda: operations("cpu")}
LOGITS = (1.2, -0.7, 0.3, 2.5, 2.5, -3.0, 0.0, 1.9, -1.1, 0.3)
DRAWS = 20_000


class Settings(NamedTuple):
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0


def draw(ops: Operations, settings: Settings, logits: tuple[float, ...], uniform: Tensor) -> Tensor:
    rows = len(uniform)
    return ops.sample(
        torch.tensor(logits).repeat(rows, 1),
        torch.full((rows,), settings.temperature),
        torch.full((rows,), settings.top_k, dtype=torch.int32),
        torch.full((rows,), settings.top_p),
        torch.full((rows,), settings.min_p),
        uniform,
    )


def exact(settings: Settings, logits: tuple[float, ...]) -> list[float]:
    """Probabilities by sorting a list, none of it shared with the operation."""
    weights = [math.exp(x / settings.temperature) for x in logits]
    order = sorted(range(len(logits)), key=lambda token: -logits[token])
    kept = [token for token in order if weights[token] >= settings.min_p * max(weights)]
    if settings.top_k:
        kept = [token for token in kept if logits[token] >= logits[order[settings.top_k - 1]]]
    total, running, last = sum(weights[token] for token in kept), 0.0, kept[-1]
    for token in kept:
        running += weights[token]
        if running >= settings.top_p * total:
            last = token
            break
    kept = [token for token in kept if logits[token] >= logits[last]]
    total = sum(weights[token] for token in kept)
    return [weights[token] / total if token in kept else 0.0 for token in range(len(logits))]


def chi_square_z(tokens: Tensor, probabilities: list[float]) -> float:
    """Standard deviations by which the chi-square statistic exceeds its mean (Wilson and Hilferty); inf for a draw of
    probability 0."""
    counts = torch.bincount(tokens, minlength=len(probabilities)).tolist()
    if any(count and not p for count, p in zip(counts, probabilities, strict=True)):
        return math.inf
    expected = [(count, p * len(tokens)) for count, p in zip(counts, probabilities, strict=True) if p]
    freedom = len(expected) - 1
    if freedom == 0:
        return 0.0
    statistic = sum((count - mean) ** 2 / mean for count, mean in expected)
    spread = 2 / (9 * freedom)
    return float(((statistic / freedom) ** (1 / 3) - (1 - spread)) / math.sqrt(spread))


ALL_SETTINGS = [
    Settings(), Settings(0.7), Settings(1.5), Settings(top_k=3), Settings(top_k=1), Settings(top_p=0.8),
    Settings(0.6, top_p=0.3), Settings(min_p=0.15), Settings(0.8, top_k=6, top_p=0.9, min_p=0.05),
]  # fmt: skip


@pytest.mark.parametrize("table_name", TABLES)
@pytest.mark.parametrize("settings", ALL_SETTINGS, ids=str)
def test_draws_follow_the_exact_distribution(table_name: str, settings: Settings) -> None:
    uniform = torch.rand(DRAWS, generator=torch.Generator().manual_seed(7))
    tokens = draw(TABLES[table_name](), settings, LOGITS, uniform)
    assert chi_square_z(tokens, exact(settings, LOGITS)) < 4


@pytest.mark.parametrize(
    ("drawn", "claimed"),
    [(Settings(1.1), Settings()), (Settings(top_k=4), Settings(top_k=5)), (Settings(top_p=0.8), Settings(top_p=0.95)),
     (Settings(min_p=0.1), Settings(min_p=0.2))],
    ids=str,
)  # fmt: skip
def test_the_same_count_of_draws_tells_slightly_wrong_settings_apart(drawn: Settings, claimed: Settings) -> None:
    uniform = torch.rand(DRAWS, generator=torch.Generator().manual_seed(7))
    assert chi_square_z(draw(reference(), drawn, LOGITS, uniform), exact(claimed, LOGITS)) > 4


@pytest.mark.parametrize("table_name", TABLES)
def test_draw_walks_the_running_sum_in_order_of_token_id(table_name: str) -> None:
    logits = tuple(math.log(p) for p in (0.25, 0.5, 0.25))
    uniform = torch.tensor([0.0, 0.2499, 0.2501, 0.7499, 0.7501, 1 - 2**-24])
    assert draw(TABLES[table_name](), Settings(), logits, uniform).tolist() == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize("table_name", TABLES)
def test_greedy_takes_the_lowest_id_among_equals_and_never_a_forbidden_token(table_name: str) -> None:
    ops, forbidden = TABLES[table_name](), -math.inf
    logits = (forbidden, 1.0, 3.0, 3.0, forbidden)
    assert draw(ops, Settings(0.0), logits, torch.zeros(1)).tolist() == [2]
    ends = draw(ops, Settings(5.0), logits, torch.tensor([0.0, 1 - 2**-24]))
    assert ends.tolist() == [1, 3]


def test_cpu_and_twin_draw_the_same_tokens_from_a_real_vocabulary() -> None:
    g = torch.Generator().manual_seed(3)
    rows, vocab = 12, 49_152
    logits = torch.randn(rows, vocab, generator=g) * torch.linspace(0.01, 6, rows).unsqueeze(1)
    logits[3, 5] = -1e30
    arguments = (
        logits, torch.rand(rows, generator=g) + 0.05, (torch.arange(rows) % 3 * 40).int(),
        torch.where(torch.arange(rows) % 2 == 0, 0.9, 1.0), (torch.arange(rows) % 5 == 0) * 0.02,
        torch.rand(rows, generator=g),
    )  # fmt: skip
    assert operations("cpu").sample(*arguments).tolist() == reference().sample(*arguments).tolist()


def test_twin_names_a_parameter_that_does_not_fit_the_rows() -> None:
    with pytest.raises(ValueError, match="top_p"):
        reference().sample(
            torch.zeros(2, 4),
            torch.ones(2),
            torch.zeros(2, dtype=torch.int32),
            torch.ones(1),
            torch.zeros(2),
            torch.rand(2),
        )
