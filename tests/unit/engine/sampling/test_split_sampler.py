"""Ranks that share the vocabulary draw what one rank with all of it draws, and never send a row of it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from shoal.engine.parallel.collectives import Collectives, SingleRank
from shoal.engine.parallel.topology import SINGLE, Topology
from shoal.engine.request import RequestId, SamplingParams, TokenLogprobs
from shoal.engine.sampling.batch import SampleBatch
from shoal.engine.sampling.sampler import Sampler
from shoal.engine.sampling.split_draw import SplitVocabularyDraw
from shoal.kernels.dispatch import reference

Answer = tuple[dict[RequestId, tuple[int, ...]], dict[RequestId, tuple[TokenLogprobs, ...]]]


class RecordingRanks:
    """Collectives of ranks that run as threads of this process; counts the numbers that each of them sends."""

    def __init__(self, size: int) -> None:
        self._barrier = threading.Barrier(size, timeout=20)
        self._parts: list[Tensor] = [torch.empty(0)] * size
        self.sent = [0] * size

    def of_rank(self, rank: int) -> RecordingRank:
        return RecordingRank(self, rank)

    def exchange(self, rank: int, x: Tensor) -> list[Tensor]:
        self.sent[rank] += x.numel()
        self._parts[rank] = x.clone()
        self._barrier.wait()
        parts = list(self._parts)
        self._barrier.wait()
        assert len({(part.shape, part.dtype) for part in parts}) == 1
        return parts


class RecordingRank:
    def __init__(self, ranks: RecordingRanks, rank: int) -> None:
        self._ranks = ranks
        self._rank = rank

    def all_reduce(self, x: Tensor) -> Tensor:
        return torch.stack(self._ranks.exchange(self._rank, x)).sum(0)

    def all_gather(self, x: Tensor) -> Tensor:
        return torch.cat(self._ranks.exchange(self._rank, x), dim=-1)


def _batch(params: Sequence[SamplingParams], step: int) -> SampleBatch:
    def array(name: str, dtype: type[np.generic]) -> np.ndarray[tuple[int, ...], np.dtype[np.generic]]:
        return np.array([getattr(p, name) for p in params], dtype)

    return SampleBatch(
        request_ids=[RequestId(f"r{i}") for i in range(len(params))],
        params=list(params),
        num_outputs=[step] * len(params),
        seeds=np.arange(len(params), dtype=np.uint64) + 7,
        streams=np.zeros(len(params), np.uint32),
        positions=np.full(len(params), 10 + step, np.int64),
        num_guessed=np.zeros(len(params), np.int64),
        guesses=np.full(len(params), -1, np.int64),
        temperature=array("temperature", np.float32),
        top_k=array("top_k", np.int32),
        top_p=array("top_p", np.float32),
        min_p=array("min_p", np.float32),
    )


def _run_rank(
    steps: Sequence[Tensor], params: Sequence[SamplingParams], topology: Topology, collectives: Collectives
) -> list[Answer]:
    """Sample every step's logits [rows, vocab], of which the rank sees its columns; one answer a step."""
    vocab_size = steps[0].shape[1]
    vocab = topology.vocab_shard(vocab_size)
    sampler = Sampler(reference(), (1,), vocab_size, topology, collectives)
    for i, p in enumerate(params):
        known = [token % vocab_size for token in (1, 2, 3, 5, 5)]
        sampler.add(RequestId(f"r{i}"), p, known, 2, torch.device("cpu"))
    answers = []
    for step, logits in enumerate(steps):
        own = torch.full((len(logits), len(vocab)), -torch.inf)
        columns = logits[:, vocab.start : vocab.stop]
        own[:, : columns.shape[1]] = columns
        answers.append(sampler.sample(own, _batch(params, step)).wait())
    return answers


def _run_ranks(
    steps: Sequence[Tensor], params: Sequence[SamplingParams], ranks: RecordingRanks, size: int
) -> list[list[Answer]]:
    with ThreadPoolExecutor(size) as pool:
        futures = [
            pool.submit(_run_rank, steps, params, Topology(rank, size, 0, 1), ranks.of_rank(rank))
            for rank in range(size)
        ]
        return [future.result(timeout=60) for future in futures]


@st.composite
def _params(draw: Callable[..., object], vocab_size: int) -> SamplingParams:
    def pick(*values: object) -> object:
        return draw(st.sampled_from(values))

    token = st.integers(0, vocab_size - 1)
    fields = {
        "temperature": pick(0, 0, 0.3, 1.0, 2.5),
        "top_k": pick(0, 0, 1, 2, 5, vocab_size, vocab_size + 3),
        "top_p": pick(1.0, 1.0, 0.01, 0.43, 0.87),
        "min_p": pick(0.0, 0.0, 0.07, 0.6, 1.0),
        "presence_penalty": pick(0.0, 0.7),
        "frequency_penalty": pick(0.0, 1.3),
        "repetition_penalty": pick(1.0, 1.6),
        "logit_bias": draw(st.dictionaries(token, st.sampled_from([-100.0, -1.5, 2.5]), max_size=2)),
        "min_tokens": pick(0, 0, 2),
        "stop_token_ids": draw(st.lists(token, max_size=2)),
        "logprobs": pick(None, 0, 3),
    }
    return SamplingParams(**fields)  # type: ignore[arg-type]


@st.composite
def _cases(draw: Callable[..., object]) -> tuple[int, list[Tensor], list[SamplingParams]]:
    """Ranks, logits of two steps, settings of each row."""
    size, vocab_size, seed = draw(st.integers(1, 4)), draw(st.integers(4, 41)), draw(st.integers(0, 2**32))
    params = draw(st.lists(_params(vocab_size), min_size=1, max_size=5))
    levels = draw(st.sampled_from([None, 2, 5]))  # of tied logits
    generator = torch.Generator().manual_seed(seed)
    shape = (len(params), vocab_size)
    steps = [
        torch.randn(shape, generator=generator) * 3
        if levels is None
        else torch.randint(levels, shape, generator=generator).float()
        for _ in range(2)
    ]
    return size, steps, params


@settings(max_examples=100, deadline=None)
@given(case=_cases())
def test_every_rank_draws_what_one_rank_draws(case: tuple[int, list[Tensor], list[SamplingParams]]) -> None:
    size, steps, params = case
    expected = _run_rank(steps, params, SINGLE, SingleRank())
    for answers in _run_ranks(steps, params, RecordingRanks(size), size):
        for logits, (found, found_logprobs), (tokens, logprobs) in zip(steps, answers, expected, strict=True):
            assert found == tokens
            assert found_logprobs.keys() == logprobs.keys()
            for request_id, (entry,) in found_logprobs.items():
                row = torch.log_softmax(logits[int(request_id[1:])], dim=0)
                _check_logprobs(entry, logprobs[request_id][0], row)


def _check_logprobs(found: TokenLogprobs, expected: TokenLogprobs, row: Tensor) -> None:
    """`row` [vocab]: the log-probabilities of all tokens. Among tied ones, any may be named."""
    assert found.rank == expected.rank
    assert found.logprob == pytest.approx(expected.logprob, abs=1e-5)
    assert found.top_logprobs == pytest.approx(expected.top_logprobs, abs=1e-5)
    assert len(set(found.top_ids)) == len(expected.top_ids)
    assert row[list(found.top_ids)].tolist() == pytest.approx(list(found.top_logprobs), abs=1e-5)


@pytest.mark.parametrize(
    ("params", "count"),
    [
        (SamplingParams(temperature=0), 2),
        (SamplingParams(temperature=0.8), 4),
        (SamplingParams(temperature=0.8, top_k=50), 4 + 50),
        (SamplingParams(temperature=0.8, top_k=50, top_p=0.9, min_p=0.01), 4 + 50 + 1025),
        (SamplingParams(temperature=0, logprobs=20), 2 + 43),
    ],
)
@pytest.mark.parametrize("size", [2, 4])
def test_a_rank_sends_a_few_numbers_and_never_its_row(params: SamplingParams, count: int, size: int) -> None:
    vocab_size = 49_152
    logits = torch.randn(1, vocab_size, generator=torch.Generator().manual_seed(1)) * 3
    ranks = RecordingRanks(size)
    assert len({str(answers) for answers in _run_ranks([logits], [params], ranks, size)}) == 1
    assert all(sent == count for sent in ranks.sent)


def test_a_token_tied_with_the_last_one_kept_stays_on_whichever_rank_it_is() -> None:
    logits = torch.full((400, 40), -5.0)
    logits[:, [3, 17, 39]] = 2.0  # one of each of three ranks
    params = [SamplingParams(temperature=1.0, top_k=1)] * 400
    (tokens, _), *_ = _run_ranks([logits], params, RecordingRanks(3), 3)[0]
    assert {token for (token,) in tokens.values()} == {3, 17, 39}


def test_rows_draw_the_same_alone_and_among_others() -> None:
    params = [
        SamplingParams(temperature=t, top_p=p, top_k=k, logprobs=n)
        for t, p, k, n in ((0, 1, 0, None), (1, 0.9, 0, 2), (0.7, 1, 5, None), (2, 0.5, 9, 4))
    ]
    logits = torch.randn(4, 50, generator=torch.Generator().manual_seed(2)) * 3
    (together, _), *_ = _run_ranks([logits], params, RecordingRanks(2), 2)[0]
    expected, _ = _run_rank([logits], params, SINGLE, SingleRank())[0]
    assert together == expected


@pytest.mark.parametrize(("uniform", "token"), [(0.0, 2), (0.25, 3), (0.75, 7), (1 - 2**-24, 7)])
def test_the_token_drawn_is_the_first_whose_sum_exceeds_the_number(uniform: float, token: int) -> None:
    weights = torch.tensor([[0, 0, 1, 1, 0, 0, 1, 1, 0, 0]], dtype=torch.float64)
    ranks = RecordingRanks(5)

    def invert(rank: int) -> list[int]:
        draw = SplitVocabularyDraw(10, Topology(rank, 5, 0, 1), ranks.of_rank(rank))
        tokens: list[int] = draw._invert(
            weights[:, 2 * rank : 2 * rank + 2], torch.tensor([[uniform]]).double()
        ).tolist()
        return tokens

    with ThreadPoolExecutor(5) as pool:
        assert list(pool.map(invert, range(5))) == [[token]] * 5


@pytest.mark.parametrize("values", [(0.0, -0.0), (-1e-38, 0.0), (-3.5, -3.25), (3.25, 3.5), (-torch.inf, -1e38)])
def test_the_threshold_is_right_for_logits_of_any_sign(values: tuple[float, float]) -> None:
    logits = torch.full((64, 6), -torch.inf)
    logits[:, 1], logits[:, 4] = values
    params = [SamplingParams(temperature=100.0, top_p=0.1)] * 64
    expected, _ = _run_rank([logits], params, SINGLE, SingleRank())[0]
    for answers in _run_ranks([logits], params, RecordingRanks(2), 2):
        assert answers[0][0] == expected
