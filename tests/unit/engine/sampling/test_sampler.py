"""Penalties, bias, minimum lengths and log-probabilities, against formulas written out."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shoal.engine.parallel.collectives import SingleRank
from shoal.engine.parallel.topology import SINGLE
from shoal.engine.request import RequestId, SamplingParams, TokenLogprobs
from shoal.engine.sampling.batch import SampleBatch
from shoal.engine.sampling.logits import BadWords
from shoal.engine.sampling.sampler import Sampler
from shoal.kernels import dispatch

VOCAB = 50
EOS = 7


def batch(params: list[SamplingParams], num_outputs: int = 0, position: int = 10, seed: int = 3) -> SampleBatch:
    count = len(params)

    def array(name, dtype):
        return np.array([getattr(p, name) for p in params], dtype)

    return SampleBatch(
        request_ids=[RequestId(f"r{i}") for i in range(count)],
        params=params,
        num_outputs=[num_outputs] * count,
        seeds=np.full(count, seed, np.uint64),
        streams=np.zeros(count, np.uint32),
        positions=np.full(count, position, np.int64),
        num_guessed=np.zeros(count, np.int64),
        guesses=np.full(count, -1, np.int64),
        temperature=array("temperature", np.float32),
        top_k=array("top_k", np.int32),
        top_p=array("top_p", np.float32),
        min_p=array("min_p", np.float32),
    )


def make(
    params: list[SamplingParams], prompt: tuple[int, ...] = (1, 2), output: tuple[int, ...] = (3, 3, 4)
) -> Sampler:
    sampler = Sampler(dispatch.reference(), (EOS,), VOCAB, SINGLE, SingleRank())
    for i, p in enumerate(params):
        sampler.add(RequestId(f"r{i}"), p, prompt + output, len(prompt), torch.device("cpu"))
    return sampler


def draw(
    sampler: Sampler, logits: torch.Tensor, settings: SampleBatch
) -> tuple[list[int], dict[RequestId, TokenLogprobs]]:
    tokens, logprobs = sampler.sample(logits, settings).wait()
    assert list(tokens) == settings.request_ids
    return [token for (token,) in tokens.values()], {key: logprob for key, (logprob,) in logprobs.items()}


@pytest.fixture
def logits() -> torch.Tensor:
    return torch.randn(1, VOCAB, generator=torch.Generator().manual_seed(0)) * 3


def test_penalties_follow_the_formulas(logits):
    params = SamplingParams(
        temperature=0, presence_penalty=0.5, frequency_penalty=0.25, repetition_penalty=1.5, logprobs=0
    )
    expected = logits[0].clone()
    for token in (1, 2, 3, 4):  # prompt and output
        expected[token] = expected[token] / 1.5 if expected[token] > 0 else expected[token] * 1.5
    for token, count in ((3, 2), (4, 1)):  # output only
        expected[token] -= 0.25 * count + 0.5
    seen = logits.clone()
    sampler = make([params])
    sampler._processors[RequestId("r0")].apply(seen[0], 3)
    assert torch.allclose(seen[0], expected)


def test_counts_follow_the_drawn_tokens(logits):
    params = SamplingParams(temperature=0, frequency_penalty=2.0)
    sampler, drawn = make([params], output=()), []
    for step in range(6):
        tokens, _ = draw(sampler, logits.clone(), batch([params], num_outputs=step))
        drawn += tokens
    counts = torch.zeros(VOCAB)
    for token in drawn:  # greedy on logits minus twice what was drawn so far
        assert token == int((logits[0] - 2.0 * counts).argmax())
        counts[token] += 1
    assert len(set(drawn)) > 1


def test_bias_forces_and_forbids(logits):
    best = int(logits.argmax())
    forced = SamplingParams(temperature=0, logit_bias={11: 100.0})
    forbidden = SamplingParams(temperature=0, logit_bias={best: -100.0})
    tokens, _ = draw(make([forced, forbidden]), logits.repeat(2, 1), batch([forced, forbidden]))
    assert tokens[0] == 11
    assert tokens[1] != best


def test_end_of_text_waits_for_min_tokens(logits):
    logits[0, EOS] = 100.0
    logits[0, 9] = 50.0
    params = SamplingParams(temperature=0, min_tokens=4, stop_token_ids=(9,))
    sampler = make([params])
    early, _ = draw(sampler, logits.clone(), batch([params], num_outputs=3))
    late, _ = draw(sampler, logits.clone(), batch([params], num_outputs=4))
    assert early[0] not in (EOS, 9)
    assert late[0] == EOS


def test_logprobs_are_of_the_model_itself(logits):
    plain = torch.log_softmax(logits[0], -1)
    params = SamplingParams(temperature=0.5, logprobs=5, logit_bias={11: 100.0}, presence_penalty=1.0)
    tokens, logprobs = draw(make([params]), logits.clone(), batch([params]))
    answer = logprobs[RequestId("r0")]
    assert tokens == [11]
    assert answer.logprob == pytest.approx(float(plain[11]))
    assert answer.rank == int((plain > plain[11]).sum()) + 1
    assert list(answer.top_ids) == plain.topk(5).indices.tolist()
    assert list(answer.top_logprobs) == pytest.approx(plain.topk(5).values.tolist())


def test_a_row_does_not_depend_on_its_neighbours(logits):
    params = [
        SamplingParams(temperature=t, top_p=p, top_k=k)
        for t, p, k in ((0, 1, 0), (1, 0.9, 0), (0.7, 1, 5), (2, 0.5, 9))
    ]
    together, _ = draw(make(params), logits.repeat(4, 1), batch(params))
    for i, p in enumerate(params):
        alone, _ = draw(make([p]), logits.clone(), batch([p]))
        assert alone == [together[i]]


def test_a_bad_word_is_banned_where_the_rest_of_it_was_said(logits):
    best, *_ = logits[0].argsort(descending=True).tolist()
    words = {
        "alone": [(best,)],
        "after 3 4": [(3, 4, best)],
        "after 4": [(4, best)],
        "after 3": [(3, best)],
        "two": [(9, best), (4, best)],
    }
    said = {
        name: draw(make([params]), logits.clone(), batch([params]))[0][0] == best
        for name, params in ((n, SamplingParams(temperature=0, bad_words_token_ids=w)) for n, w in words.items())
    }
    assert said == {"alone": False, "after 3 4": False, "after 4": False, "after 3": True, "two": False}


@pytest.mark.parametrize("words", [[(3, 4, 5)], [(5,)], [(5,), (4, 30)], [(3, 4, 30), (4, 5)]])
def test_each_part_of_a_vocabulary_bans_its_own(logits, words):
    """A part may have none of the words."""
    whole, parts = logits[0].clone(), logits[0].clone()
    BadWords(words, (3, 3, 4), range(VOCAB), torch.device("cpu")).apply(whole)
    for part in (range(20), range(20, 40), range(40, 60)):  # the last one ends past the vocabulary
        padded = torch.cat((parts, torch.zeros(10)))[part.start : part.stop]
        BadWords(words, (3, 3, 4), part, torch.device("cpu")).apply(padded)
        parts[part.start : part.stop] = padded[: len(parts[part.start : part.stop])]
    assert torch.equal(parts, whole)
    assert torch.isinf(whole).sum() == len(words)


def test_a_bad_word_of_the_prompt_only_is_none(logits):
    best = int(logits.argmax())
    params = SamplingParams(temperature=0, bad_words_token_ids=[(1, 2, best)])
    assert draw(make([params], output=()), logits.clone(), batch([params]))[0] == [best]


def guessing(params: SamplingParams, guesses: tuple[int, ...], num_outputs: int) -> SampleBatch:
    """One request with drafts: a row behind each of them, and one before."""
    rows = len(guesses) + 1
    return replace(
        batch([params] * rows),
        request_ids=[RequestId("r0")] * rows,
        num_outputs=[num_outputs + i for i in range(rows)],
        positions=np.arange(10, 10 + rows),
        num_guessed=np.arange(rows),
        guesses=np.array([*guesses, -1]),
    )


@given(
    st.lists(st.integers(0, 5), min_size=1, max_size=12),
    st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=4), max_size=4),
    st.sampled_from([0.0, 0.9]),
    st.randoms(use_true_random=False),
)
def test_drafts_change_nothing_that_processors_keep(said, bad_words, temperature, numbers):
    """Whatever is guessed: the tokens are those that are drawn one by one."""
    params = SamplingParams(
        temperature=temperature, seed=1, repetition_penalty=1.2, frequency_penalty=0.4, presence_penalty=0.3,
        min_tokens=4, logit_bias={3: 1.0}, bad_words_token_ids=bad_words,
    )  # fmt: skip
    rows = torch.randn(20, VOCAB, generator=torch.Generator().manual_seed(len(said))) * 2
    rows[:, 6:] -= 4.0
    plain, expected = make([params], output=()), []
    for step in range(10):
        tokens, _ = draw(plain, rows[step : step + 1].clone(), batch([params], num_outputs=step, position=10 + step))
        expected += tokens
    sampler, known = make([params], output=()), []
    while len(known) < 10:
        done = len(known)
        guesses = tuple(
            token if numbers.random() < 0.7 else numbers.choice(said)
            for token in expected[done : done + numbers.randrange(4)]
        )
        settings = replace(guessing(params, guesses, done), positions=np.arange(10 + done, 11 + done + len(guesses)))
        samples = sampler.sample(rows[done : done + len(guesses) + 1].clone(), settings)
        tokens = samples.wait()[0][RequestId("r0")]
        sampler.learn(RequestId("r0"), 2 + done, tokens)
        known += tokens
    assert known[:10] == expected
