"""A smaller model that guesses what requests will say next, over KV of its own in blocks of the same numbers.

It computes nothing until it is asked. Then it catches up with the known tokens that it has no KV of, those of all
requests in one batch, and guesses token by token. It draws with a request's own settings and with the number that the
model will draw with at that position: the nearer its distribution is to the model's, the more often both draw the same
token (Daliri et al. 2024, arXiv:2408.07978). What it guesses never changes what is generated.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from shoal.engine.config import EngineConfig
from shoal.engine.layers.attention import AttentionBatch
from shoal.engine.models.registry import Model
from shoal.engine.parallel.collectives import Collectives
from shoal.engine.parallel.topology import Topology
from shoal.engine.plan import StepPlan
from shoal.engine.request import RequestId
from shoal.engine.runner.batch import Ints, Rows
from shoal.engine.runner.kv_store import KVStore
from shoal.engine.sampling.draw import make_draw
from shoal.engine.sampling.transfer import to_device
from shoal.kernels.dispatch import Operations

Tokens = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class _Guesses:
    """Those of a request that have KV: all but the last of what was guessed."""

    start: int  # position of the first
    token_ids: Tokens

    def num_right(self, known_ids: Tokens) -> int:
        """How many the known tokens have turned out to begin with."""
        came = known_ids[self.start : self.start + len(self.token_ids)]
        return int((came == self.token_ids[: len(came)]).cumprod().sum())


@dataclass(frozen=True, slots=True)
class _Asked:
    """A request to guess for."""

    request_id: RequestId
    known_ids: Tokens
    block_ids: npt.NDArray[np.int32]
    num_guesses: int


class Drafter:
    """The draft model on one rank. Ranks that share it make the same calls."""

    def __init__(
        self,
        config: EngineConfig,
        model: Model,
        kv: KVStore,
        *,
        ops: Operations,
        topology: Topology,
        collectives: Collectives,
    ) -> None:
        """`config` and `topology` are the draft model's own; `kv` has as many blocks as the model's."""
        self._model = model
        self._kv = kv
        self._ops = ops
        self._device = kv.pool.device
        self._block_size = config.block_size
        self._num_positions = config.max_model_len
        self._max_step_tokens = config.max_step_tokens
        self._draw = make_draw(ops, config.model.vocab_size, topology, collectives)
        self._coverage = Coverage(len(kv.pool), config.block_size)
        self._guesses: dict[RequestId, _Guesses] = {}

    def follow(self, plan: StepPlan) -> None:
        """Keep up with who has which blocks, before each step."""
        for request_id in plan.finished:
            self._guesses.pop(request_id, None)
        if copies := self._coverage.follow(plan):
            pairs = torch.tensor(copies, device=self._device)  # [copies, 2] int64
            self._ops.copy_blocks(self._kv.pool, pairs[:, 0].contiguous(), pairs[:, 1].contiguous())

    def draft(
        self, rows: Rows, wanted: Mapping[RequestId, int], sampled: Mapping[RequestId, tuple[int, ...]]
    ) -> dict[RequestId, tuple[int, ...]]:
        """Up to `wanted` guesses for each request, to follow what was `sampled` for it just now; fewer where its blocks
        or the draft model's positions end. Waits for the device.
        """
        asked = [self._asked(rows, each, sampled[each], wanted[each]) for each in wanted if each in sampled]
        asked = [each for each in asked if each.num_guesses > 0]
        if not asked:
            return {}
        asked.sort(key=lambda each: -each.num_guesses)  # who has enough drops out at the end
        ids = [each.request_id for each in asked]
        tables = _padded([each.block_ids for each in asked])
        ends = np.array([len(each.known_ids) for each in asked])
        hidden = self._catch_up(asked, tables)  # [asked, hidden]
        drawn: list[Tensor] = []  # [requests] int64 each
        for done in range(asked[0].num_guesses):
            count = sum(each.num_guesses > done for each in asked)
            if drawn:
                # The last guess of each goes in, and gets KV.
                hidden = self._forward(drawn[-1][:count], tables[:count], ends[:count] + done - 1, ends[:count] + done)
            batch = rows.guess_batch(ids[:count], ends[:count] + done)
            drawn.append(self._draw(self._model.logits(hidden[:count]), batch))
        numbers = torch.cat(drawn).tolist()
        firsts = np.cumsum([0, *map(len, drawn)]).tolist()  # of each round, in `numbers`
        drafts = {}
        for index, each in enumerate(asked):
            draft = tuple([numbers[first + index] for first in firsts[: each.num_guesses]])
            self._guesses[each.request_id] = _Guesses(len(each.known_ids), np.array(draft[:-1], np.int32))
            drafts[each.request_id] = draft
        return drafts

    def _asked(self, rows: Rows, request_id: RequestId, sampled: tuple[int, ...], wanted: int) -> _Asked:
        known_ids = rows.ids_with(request_id, sampled)
        block_ids = rows.block_ids(request_id)
        # All that is computed needs a slot and a position, which the last guess does not.
        num_places = min(len(block_ids) * self._block_size, self._num_positions)
        return _Asked(request_id, known_ids, block_ids, min(wanted, num_places + 1 - len(known_ids)))

    def _catch_up(self, asked: Sequence[_Asked], tables: npt.NDArray[np.int32]) -> Tensor:
        """Compute the known tokens that have no KV: the hidden states [asked, hidden] of the last ones.

        What requests share is computed once, by the first of them; the others find it there, as all write before any
        reads.
        """
        starts = [self._cover(each) for each in asked]
        last: list[Tensor] = []  # [requests, hidden] each
        for chunk in self._chunks(starts, [len(each.known_ids) for each in asked]):
            token_ids = np.concatenate([asked[index].known_ids[start:end] for index, start, end in chunk])
            indices, chunk_starts, chunk_ends = np.array(chunk).T  # [pieces] each
            hidden = self._forward(self._tensor(token_ids).long(), tables[indices], chunk_starts, chunk_ends)
            is_last = chunk_ends == [len(asked[index].known_ids) for index in indices]
            last.append(hidden[self._tensor(np.cumsum(chunk_ends - chunk_starts)[is_last] - 1)])
        return torch.cat(last)

    def _cover(self, asked: _Asked) -> int:
        """The first position to be computed. From here on all known tokens count as computed."""
        num_known = len(asked.known_ids)
        start = self._coverage.num_covered(asked.block_ids)
        guesses = self._guesses.pop(asked.request_id, None)
        if guesses is not None and guesses.start == start:
            start += guesses.num_right(asked.known_ids)
        self._coverage.cover(asked.block_ids, num_known)
        return min(start, num_known - 1)  # the last one's hidden state is wanted

    def _chunks(self, starts: Sequence[int], ends: Sequence[int]) -> Iterator[list[tuple[int, int, int]]]:
        """What is computed at a time, at most max_step_tokens tokens: (request, start, end), in order."""
        chunk: list[tuple[int, int, int]] = []
        budget = self._max_step_tokens
        for index, (start, end) in enumerate(zip(starts, ends, strict=True)):
            while start < end:
                stop = min(end, start + budget)
                chunk.append((index, start, stop))
                budget -= stop - start
                start = stop
                if budget == 0:
                    yield chunk
                    chunk, budget = [], self._max_step_tokens
        if chunk:
            yield chunk

    def _forward(self, input_ids: Tensor, tables: npt.NDArray[np.int32], starts: Ints, ends: Ints) -> Tensor:
        """Hidden states [tokens, hidden] of positions [start, end) of each request; input_ids [tokens] int64 are all of
        them, tables [requests, blocks].
        """
        num_new = ends - starts
        query_starts = np.zeros(len(num_new) + 1, np.int32)
        np.cumsum(num_new, out=query_starts[1:])
        owners = np.repeat(np.arange(len(num_new)), num_new)  # [tokens]
        positions = starts[owners] + np.arange(len(owners)) - query_starts[owners]
        size = self._block_size
        slots = tables[owners, positions // size].astype(np.int64) * size + positions % size
        attention = AttentionBatch(
            slots=self._tensor(slots),
            block_tables=self._tensor(np.ascontiguousarray(tables[:, : -(-int(ends.max()) // size)])),
            query_starts=self._tensor(query_starts),
            context_lens=self._tensor(ends.astype(np.int32)),
            max_query_len=int(num_new.max()),
        )
        return self._model.forward(input_ids, self._tensor(positions), attention, self._kv.layers)

    def _tensor(self, array: npt.NDArray[np.generic]) -> Tensor:
        return to_device(array, self._device)


class Coverage:
    """How many leading slots of each block have KV of the draft model, for the known tokens that the block stands for.

    Requests that share a block share its KV. Guesses are not known tokens, so what is rejected was never counted.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self._block_size = block_size
        self._counts = np.zeros(num_blocks, np.int32)

    def follow(self, plan: StepPlan) -> list[tuple[int, int]]:
        """Blocks that a request gets stand for its own tokens from now on, but those with a prefix that was found. The
        answer is the copies (source, target) that are worth making.
        """
        counts = self._counts
        copies = [(int(source), int(target)) for source, target in plan.copies if counts[source]]
        for source, target in plan.copies:
            counts[target] = counts[source]
        for new in plan.new:
            num_found, rest = divmod(new.num_computed, self._block_size)
            if rest:  # a copy, whose source may have gone on differently
                counts[new.block_ids[num_found]] = min(rest, counts[new.block_ids[num_found]])
                num_found += 1
            counts[list(new.block_ids[num_found:])] = 0
        for request in plan.continued:
            if request.new_block_ids:
                counts[list(request.new_block_ids)] = 0
        return copies

    def num_covered(self, block_ids: npt.NDArray[np.int32]) -> int:
        """Leading tokens of a request that have KV."""
        counts = self._counts[block_ids]
        full = int((counts == self._block_size).cumprod().sum())
        return full * self._block_size + (int(counts[full]) if full < len(counts) else 0)

    def cover(self, block_ids: npt.NDArray[np.int32], num_known: int) -> None:
        """The first `num_known` tokens of a request have KV from now on."""
        full, rest = divmod(num_known, self._block_size)
        self._counts[block_ids[:full]] = self._block_size
        if rest:
            self._counts[block_ids[full]] = rest


def _padded(block_ids: Sequence[npt.NDArray[np.int32]]) -> npt.NDArray[np.int32]:
    """[requests, blocks of the longest], zeros behind the others."""
    tables = np.zeros((len(block_ids), max(map(len, block_ids))), np.int32)
    for table, blocks in zip(tables, block_ids, strict=True):
        table[: len(blocks)] = blocks
    return tables
