"""From plans to flat arrays: a permanent row for each request, and one gather a step.

A row keeps what a request is (tokens, block table, sampling settings) from its first plan until it is finished, so a
step only writes what changed and gathers the rows that take part.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from shoal.engine.plan import ContinuedRequest, NewRequest, StepPlan
from shoal.engine.request import BlockId, RequestId, SamplingParams
from shoal.engine.sampling.batch import SampleBatch

Ints = npt.NDArray[np.int64]
NO_GUESS = -1
_NONE: Ints = np.zeros(0, np.int64)


@dataclass(frozen=True, slots=True)
class StepBatch:
    """One step as arrays. `tokens` counts all tokens of the step, `requests` the entries of the plan."""

    request_ids: tuple[RequestId, ...]
    rows: Ints  # [requests]
    input_ids: Ints  # [tokens]
    positions: Ints  # [tokens]
    slots: Ints  # [tokens]
    block_tables: npt.NDArray[np.int32]  # [requests, max blocks of this step]
    query_starts: npt.NDArray[np.int32]  # [requests + 1]
    context_lens: npt.NDArray[np.int32]  # [requests]
    max_query_len: int
    # [samples] indices into `requests` of those that reach their last known token, once more for each draft behind it
    sampled: Ints
    sampled_tokens: Ints  # [samples] indices into `tokens` of what is sampled after: last known tokens and drafts
    num_guessed: Ints  # [samples] drafts before the token to be sampled
    guesses: Ints  # [samples] the draft at the place of the token to be sampled, NO_GUESS where there is none
    pending: Ints  # [pending] indices into `tokens` of those that the coordinator did not know: input_ids is 0 there
    pending_rows: Ints  # [pending] the rows whose last sampled tokens they are
    last_pending_step: int  # the last step that sampled one of them

    @property
    def samples_all(self) -> bool:
        """Whether something is sampled after every token."""
        return len(self.sampled_tokens) == len(self.input_ids)

    def sample_starts(self) -> tuple[npt.NDArray[np.int32], int]:
        """[requests + 1]: the samples of request i are [starts[i], starts[i + 1]); and the most of one request."""
        counts = np.bincount(self.sampled, minlength=len(self.rows))  # [requests]
        starts = np.zeros(len(counts) + 1, np.int32)
        np.cumsum(counts, out=starts[1:])
        return starts, int(counts.max())


@dataclass(slots=True)
class Row:
    """What is not an array of a request's row."""

    index: int
    params: SamplingParams
    num_prompt_tokens: int


class Rows:
    """All requests that this rank holds. Row numbers are stable while a request lives."""

    def __init__(self, max_requests: int, max_model_len: int, block_size: int) -> None:
        max_blocks = -(-max_model_len // block_size)
        self._block_size = block_size
        # Zeros from the operating system are not touched until written: long rows cost nothing while unused.
        self._token_ids = np.zeros((max_requests, max_model_len + 1), np.int32)
        self._block_tables = np.zeros((max_requests, max_blocks), np.int32)
        self._num_known = np.zeros(max_requests, np.int64)
        self._num_blocks = np.zeros(max_requests, np.int64)
        self._last_sampled = np.zeros(max_requests, np.int64)  # the step that last sampled a token in each row
        self._temperature = np.zeros(max_requests, np.float32)
        self._top_k = np.zeros(max_requests, np.int32)
        self._top_p = np.ones(max_requests, np.float32)
        self._min_p = np.zeros(max_requests, np.float32)
        self._seed = np.zeros(max_requests, np.uint64)
        self._stream = np.zeros(max_requests, np.uint32)
        self._rows: dict[RequestId, Row] = {}
        self._free = list(range(max_requests - 1, -1, -1))

    def __len__(self) -> int:
        return len(self._rows)

    def forget(self, request_id: RequestId) -> None:
        row = self._rows.pop(request_id, None)
        if row is not None:
            self._free.append(row.index)

    def num_known(self, request_id: RequestId) -> int:
        return int(self._num_known[self._rows[request_id].index])

    def ids_with(self, request_id: RequestId, sampled: tuple[int, ...]) -> npt.NDArray[np.int32]:
        """A view of a request's known tokens and those `sampled` just now, which a later plan makes known."""
        index = self._rows[request_id].index
        self._put_behind(index, sampled)
        return self._token_ids[index, : self._num_known[index] + len(sampled)]

    def block_ids(self, request_id: RequestId) -> npt.NDArray[np.int32]:
        """A view of a request's block table."""
        index = self._rows[request_id].index
        return self._block_tables[index, : self._num_blocks[index]]

    def add(self, new: NewRequest) -> None:
        index = self._free.pop()
        params = new.params
        self._rows[new.request_id] = Row(index, params, new.num_prompt_tokens)
        self._num_known[index] = self._num_blocks[index] = 0
        self._append(index, new.token_ids, new.block_ids)
        self._temperature[index] = 0.0 if params.is_greedy else params.temperature
        self._top_k[index] = max(params.top_k, 0)
        self._top_p[index] = params.top_p
        self._min_p[index] = params.min_p
        self._seed[index] = new.seed & (2**64 - 1)
        self._stream[index] = new.stream

    def _append(self, index: int, token_ids: tuple[int, ...], block_ids: tuple[BlockId, ...]) -> None:
        start = int(self._num_known[index])
        self._token_ids[index, start : start + len(token_ids)] = token_ids
        self._num_known[index] = start + len(token_ids)
        if block_ids:
            start = int(self._num_blocks[index])
            self._block_tables[index, start : start + len(block_ids)] = block_ids
            self._num_blocks[index] = start + len(block_ids)

    def _put_behind(self, index: int, token_ids: tuple[int, ...]) -> None:
        """Behind the known tokens, which they do not become."""
        start = int(self._num_known[index])
        self._token_ids[index, start : start + len(token_ids)] = token_ids

    def gather(self, plan: StepPlan) -> StepBatch:
        """Bring the rows up to date with a plan (whose new requests were added) and flatten it."""
        is_pending = has_drafts = False
        for request in plan.continued:
            index = self._rows[request.request_id].index
            self._append(index, request.new_token_ids, request.new_block_ids)
            if request.num_pending:
                is_pending = True
                self._append(index, (0,) * request.num_pending, ())
            elif request.draft_ids:
                has_drafts = True
                self._put_behind(index, request.draft_ids)
        entries: tuple[NewRequest | ContinuedRequest, ...] = (*plan.new, *plan.continued)
        ids = tuple(entry.request_id for entry in entries)
        count = len(entries)
        rows = np.fromiter((self._rows[i].index for i in ids), np.int64, count)
        starts = np.fromiter((entry.num_computed for entry in entries), np.int64, count)
        num_new = np.fromiter((entry.num_new for entry in entries), np.int64, count)
        ends = starts + num_new
        query_starts = np.zeros(count + 1, np.int32)
        np.cumsum(num_new, out=query_starts[1:])
        max_query_len = int(num_new.max())
        if max_query_len == 1:
            owners, positions = rows, starts
        else:
            entry_of_token = np.repeat(np.arange(count), num_new)
            owners = rows[entry_of_token]
            positions = starts[entry_of_token] + np.arange(query_starts[-1]) - query_starts[entry_of_token]
        size = self._block_size
        slots = self._block_tables[owners, positions // size].astype(np.int64) * size + positions % size
        known = self._num_known[rows]
        sampled = np.flatnonzero(ends >= known)
        sampled_tokens = query_starts[1:][sampled].astype(np.int64) - 1
        num_guessed, guesses = np.zeros_like(sampled), np.full_like(sampled, NO_GUESS)
        if has_drafts:
            num_drafts = (ends - known)[sampled]
            num_samples = num_drafts + 1  # of each request
            sampled = np.repeat(sampled, num_samples)
            num_guessed = np.arange(len(sampled)) - np.repeat(np.cumsum(num_samples) - num_samples, num_samples)
            num_to_come = np.repeat(num_drafts, num_samples) - num_guessed
            sampled_tokens = np.repeat(sampled_tokens, num_samples) - num_to_come
            guesses = self._token_ids[rows[sampled], known[sampled] + num_guessed].astype(np.int64)
            guesses[num_to_come == 0] = NO_GUESS
        pending = _NONE
        if is_pending:
            first = len(plan.new)
            pending = first + np.flatnonzero([entry.num_pending for entry in plan.continued])
        last_pending_step = int(self._last_sampled[rows[pending]].max()) if is_pending else 0
        self._last_sampled[rows[sampled]] = plan.step
        return StepBatch(
            request_ids=ids,
            rows=rows,
            input_ids=self._token_ids[owners, positions].astype(np.int64),
            positions=positions,
            slots=slots,
            block_tables=self._block_tables[rows, : -(-int(ends.max()) // size)],
            query_starts=query_starts,
            context_lens=ends.astype(np.int32),
            max_query_len=max_query_len,
            sampled=sampled,
            sampled_tokens=sampled_tokens,
            num_guessed=num_guessed,
            guesses=guesses,
            pending=query_starts[1:][pending].astype(np.int64) - 1,
            pending_rows=rows[pending],
            last_pending_step=last_pending_step,
        )

    def sample_batch(self, batch: StepBatch) -> SampleBatch:
        """The settings of the requests that draw a token in this step, once for each that they draw."""
        indices = batch.rows[batch.sampled]
        request_ids = [batch.request_ids[i] for i in batch.sampled]
        positions = self._num_known[indices] + batch.num_guessed
        return self._sample_batch(request_ids, indices, positions, batch.num_guessed, batch.guesses)

    def guess_batch(self, request_ids: Sequence[RequestId], positions: Ints) -> SampleBatch:
        """The settings of requests that each draw one token, at any position."""
        indices = np.fromiter((self._rows[i].index for i in request_ids), np.int64, len(request_ids))
        zeros = np.zeros_like(positions)
        return self._sample_batch(request_ids, indices, positions, zeros, zeros + NO_GUESS)

    def _sample_batch(
        self, request_ids: Sequence[RequestId], indices: Ints, positions: Ints, num_guessed: Ints, guesses: Ints
    ) -> SampleBatch:
        rows = [self._rows[request_id] for request_id in request_ids]
        return SampleBatch(
            request_ids=list(request_ids),
            params=[row.params for row in rows],
            num_outputs=[known - row.num_prompt_tokens for known, row in zip(positions.tolist(), rows, strict=True)],
            seeds=self._seed[indices],
            streams=self._stream[indices],
            positions=positions,
            num_guessed=num_guessed,
            guesses=guesses,
            temperature=self._temperature[indices],
            top_k=self._top_k[indices],
            top_p=self._top_p[indices],
            min_p=self._min_p[indices],
        )
