"""Which steps are captured, and that their inputs reach the model through the same memory every time."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from shoal.engine.layers.attention import AttentionBatch
from shoal.engine.runner import captured_steps
from shoal.engine.runner.batch import StepBatch
from shoal.engine.runner.captured_steps import CapturedSteps
from shoal.kernels.dispatch import NotCapturableError

VOCAB = 11


class SumModel:
    """Logits that show every input of a step."""

    layer_range = range(1)
    weight_bytes = 0

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        attention: AttentionBatch,
        kv: Sequence[Tensor],
        hidden: Tensor | None = None,
    ) -> Tensor:
        per_token = input_ids + 100 * positions + 10_000 * attention.slots  # [tokens]
        lengths = torch.diff(attention.query_starts).long()  # [requests]
        owners = torch.repeat_interleave(torch.arange(len(lengths)), lengths)  # [tokens]
        hidden = per_token + 10**6 * attention.context_lens[owners] + 10**8 * attention.block_tables[owners, 0]
        if attention.wanted is None:
            return hidden
        counts = torch.diff(attention.wanted.query_starts).long()  # [requests]
        assert torch.equal(owners[attention.wanted.tokens], torch.repeat_interleave(torch.arange(len(counts)), counts))
        return hidden[attention.wanted.tokens]

    def logits(self, hidden: Tensor) -> Tensor:
        return hidden[:, None].double() + torch.arange(VOCAB)  # [tokens, VOCAB]


class Recorder:
    """Captures by keeping the function, and counts."""

    def __init__(self) -> None:
        self.num_captured = self.num_replayed = 0

    def __call__(self, run: Callable[[], tuple[Tensor, ...]]) -> tuple[tuple[Tensor, ...], Callable[[], None]]:
        self.num_captured += 1
        results = tuple(result.clone() for result in run())

        def replay() -> None:
            self.num_replayed += 1
            for result, again in zip(results, run(), strict=True):
                result.copy_(again)

        return results, replay


def batch_of(
    lengths: Sequence[int], seed: int, samples: Sequence[int] | None = None, num_pending: int = 0
) -> StepBatch:
    """`lengths` and `samples` of each request; without `samples`, something is sampled after every token."""
    numbers = np.random.default_rng(seed)
    tokens, requests = sum(lengths), len(lengths)
    starts = np.zeros(requests + 1, np.int32)
    np.cumsum(lengths, out=starts[1:])
    ints = lambda high, *shape: numbers.integers(1, high, shape)  # noqa: E731
    counts = lengths if samples is None else samples
    sampled = np.repeat(np.arange(requests), counts)
    sampled_tokens = np.concatenate([np.arange(end - n, end) for end, n in zip(starts[1:], counts, strict=True)])
    return StepBatch(
        request_ids=(),
        rows=np.arange(requests),
        input_ids=ints(90, tokens),
        positions=ints(90, tokens),
        slots=ints(90, tokens),
        block_tables=ints(90, requests, int(numbers.integers(1, 6))).astype(np.int32),
        query_starts=starts,
        context_lens=ints(90, requests).astype(np.int32),
        max_query_len=max(lengths),
        sampled=sampled,
        sampled_tokens=sampled_tokens,
        num_guessed=np.zeros_like(sampled_tokens),
        guesses=np.zeros_like(sampled_tokens),
        pending=np.arange(num_pending),
        pending_rows=np.arange(num_pending),
        last_pending_step=0,
    )


def expected(batch: StepBatch) -> Tensor:
    model, of = SumModel(), torch.from_numpy
    attention = AttentionBatch(
        of(batch.slots), of(batch.block_tables), of(batch.query_starts), of(batch.context_lens), batch.max_query_len
    )
    hidden = model.forward(of(batch.input_ids), of(batch.positions), attention, ())
    return model.logits(hidden[of(batch.sampled_tokens)])


def steps(capture: Callable[..., object]) -> CapturedSteps:
    return CapturedSteps(SumModel(), (), capture, hidden_size=1, vocab_size=VOCAB, max_requests=40, max_blocks=6)  # type: ignore[arg-type]


def test_a_shape_is_captured_when_it_comes_back_and_replayed_from_then_on() -> None:
    recorder = Recorder()
    runner = steps(recorder)
    assert runner.logits(batch_of([1, 1, 1], seed=0)) is None
    for seed in range(1, 6):
        batch = batch_of([1, 1, 1], seed)
        logits = runner.logits(batch)
        assert logits is not None
        assert torch.equal(logits, expected(batch))
    assert (recorder.num_captured, recorder.num_replayed) == (1, 4)


def test_drafts_of_any_lengths_share_a_capture_of_as_many_tokens_and_requests() -> None:
    recorder = Recorder()
    runner = steps(recorder)
    runner.logits(batch_of([3, 1, 2], seed=0))
    for seed, lengths in enumerate([[3, 1, 2], [1, 1, 4], [2, 2, 2]]):
        batch = batch_of(lengths, seed)
        logits = runner.logits(batch)
        assert logits is not None
        assert torch.equal(logits, expected(batch))
    assert recorder.num_captured == 1


@pytest.mark.parametrize("samples", [[1, 0, 1], [2, 0, 1], [0, 0, 0]])
def test_a_capture_of_chunks_gives_the_logits_that_are_wanted(samples: list[int]) -> None:
    recorder = Recorder()
    runner = steps(recorder)
    runner.logits(batch_of([7, 4, 1], seed=0, samples=samples))
    for seed in range(1, 4):
        batch = batch_of([7, 4, 1], seed, samples)
        logits = runner.logits(batch)
        assert logits is not None
        assert torch.equal(logits, expected(batch))
    assert (recorder.num_captured, recorder.num_replayed) == (1, 2)


@pytest.mark.parametrize(
    "batch",
    [
        batch_of([captured_steps.MAX_TOKENS + 1], 0, samples=[1]),
        batch_of([1, 1], 0, num_pending=1),
    ],
)
def test_other_steps_run_operation_by_operation(batch: StepBatch) -> None:
    recorder = Recorder()
    runner = steps(recorder)
    assert [runner.logits(batch) for _ in range(3)] == [None] * 3
    assert recorder.num_captured == 0


def test_steps_of_too_many_logits_run_operation_by_operation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(captured_steps, "MAX_LOGITS", 3 * VOCAB)
    recorder = Recorder()
    runner = steps(recorder)
    for _ in range(2):
        assert runner.logits(batch_of([4], 0)) is None
        runner.logits(batch_of([4], 0, samples=[3]))
    assert recorder.num_captured == 1


def test_a_model_that_cannot_be_captured_is_asked_once() -> None:
    calls = []

    def capture(run: Callable[[], object]) -> None:
        calls.append(run)
        raise NotCapturableError("something")

    runner = steps(capture)
    for seed in range(4):
        assert runner.logits(batch_of([1], seed)) is None
    assert len(calls) == 1


def test_the_shape_that_was_not_used_for_longest_goes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(captured_steps, "MAX_CAPTURES", 2)
    recorder = Recorder()
    runner = steps(recorder)
    for count in (1, 1, 2, 2, 1, 3, 3):  # 2 goes when 3 is captured
        runner.logits(batch_of([1] * count, count))
    assert recorder.num_captured == 3
    runner.logits(batch_of([1], 9))
    assert recorder.num_captured == 3
    runner.logits(batch_of([1, 1], 9))
    assert recorder.num_captured == 4


def test_shapes_that_were_seen_once_are_not_kept_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(captured_steps, "MAX_SEEN", 3)
    recorder = Recorder()
    runner = steps(recorder)
    for tokens in range(1, 6):
        runner.logits(batch_of([tokens], 0))
    runner.logits(batch_of([1], 0))
    assert recorder.num_captured == 0
    runner.logits(batch_of([5], 0))
    assert recorder.num_captured == 1
