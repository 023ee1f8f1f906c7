"""One rank's share of a step: rows up to date, tokens through its layers, samples out."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from shoal.engine.config import EngineConfig
from shoal.engine.layers.attention import AttentionBatch, LastTokens
from shoal.engine.models.registry import Model
from shoal.engine.parallel.collectives import Collectives
from shoal.engine.parallel.pipeline import StageLinks
from shoal.engine.parallel.topology import Topology
from shoal.engine.plan import StepPlan, StepResult
from shoal.engine.request import RequestId
from shoal.engine.runner.batch import Ints, Rows, StepBatch
from shoal.engine.runner.captured_steps import CapturedSteps
from shoal.engine.runner.cuda_graphs import DecodeGraphs, GraphCapture
from shoal.engine.runner.drafter import Drafter
from shoal.engine.runner.kv_store import KVStore
from shoal.engine.sampling.sampler import Sampler, Samples
from shoal.engine.sampling.transfer import to_device
from shoal.kernels.dispatch import Operations


@dataclass(frozen=True, slots=True)
class PendingStep:
    """A step that was launched. `wait` gives its result; it has tokens on the last stage only."""

    step: int
    samples: Samples | None = None
    draft_ids: dict[RequestId, tuple[int, ...]] = field(default_factory=dict)

    def wait(self) -> StepResult:
        if self.samples is None:
            return StepResult(self.step)
        token_ids, logprobs = self.samples.wait()
        return StepResult(self.step, token_ids, logprobs, self.draft_ids)


class ModelRunner:
    """Holds the rows, the KV store and the sampler of one rank. `launch` is one step."""

    def __init__(
        self,
        config: EngineConfig,
        max_model_len: int,
        model: Model,
        kv: KVStore,
        *,
        ops: Operations,
        topology: Topology,
        collectives: Collectives,
        links: StageLinks,
        drafter: Drafter | None = None,
        capture: GraphCapture | None = None,
    ) -> None:
        """With `capture`, of a rank that is alone, steps that only decode run as graphs."""
        self._model = model
        self._kv = kv
        self._block_size = config.block_size
        self._ops = ops
        self._topology = topology
        self._links = links
        self._drafter = drafter
        self._device = kv.pool.device
        self._rows = Rows(config.max_running_requests, max_model_len, config.block_size)
        self._sampler = Sampler(ops, config.model.eos_token_ids, config.model.vocab_size, topology, collectives)
        # The token that was sampled last in each row: the next step may want it before the coordinator knows it, unless
        # there were drafts. The last place belongs to no row.
        self._sampled = torch.zeros(config.max_running_requests + 1, dtype=torch.int64, device=self._device)
        max_requests, max_blocks = config.max_running_requests, -(-max_model_len // config.block_size)
        self._captured: CapturedSteps | None = None
        self._graphs: DecodeGraphs | None = None
        if capture is not None and model.is_capturable:
            self._graphs = DecodeGraphs(
                model, kv, ops, self._sampled, most=max_requests, max_blocks=max_blocks, capture=capture
            )
        elif self._device.type == "cpu" and topology.tensor_size == topology.num_stages == 1:
            self._captured = CapturedSteps(
                model, kv.layers, ops.new_capture(), hidden_size=config.model.hidden_size,
                vocab_size=config.model.vocab_size, max_requests=max_requests, max_blocks=max_blocks,
            )  # fmt: skip
        self._feeds_tokens = config.async_scheduling and topology.num_stages > 1
        self._max_steps_in_flight = config.max_steps_in_flight
        self._awaited: deque[tuple[int, Ints]] = deque()  # steps whose tokens come from the last stage, and their rows

    @torch.inference_mode()
    def launch(self, plan: StepPlan) -> PendingStep:
        """Carry out a plan. Where the device works by itself, this returns when all is queued, or when the drafts that
        the plan asks for are made.
        """
        self._forget(plan.finished)
        if plan.copies:
            self._copy_blocks(plan)
        is_last = self._topology.is_last_stage
        for new in plan.new:
            self._rows.add(new)
            if is_last:
                self._sampler.add(new.request_id, new.params, new.token_ids, new.num_prompt_tokens, self._device)
        if is_last and self._sampler.has_processors:
            for request in plan.continued:
                num_known = self._rows.num_known(request.request_id)
                self._sampler.learn(request.request_id, num_known, request.new_token_ids)
        if self._drafter is not None:
            self._drafter.follow(plan)
        batch = self._rows.gather(plan)
        # What is no longer in flight has left the last stage, so this never waits; it must be taken, wanted or not.
        self._receive_tokens(plan.step - self._max_steps_in_flight)
        with self._kv.in_use(int(batch.slots.max()) // self._block_size):
            samples = self._run(batch)
        if self._feeds_tokens and self._topology.is_first_stage and len(batch.sampled):
            self._awaited.append((plan.step, batch.rows[batch.sampled]))
        draft_ids = self._draft(plan, batch, samples) if self._drafter is not None and samples is not None else {}
        return PendingStep(plan.step, samples, draft_ids)

    def _run(self, batch: StepBatch) -> Samples | None:
        """This rank's layers, and the draw where the last of them are."""
        if self._captured is not None and (logits := self._captured.logits(batch)) is not None:
            return self._sample(batch, logits) if len(logits) else None
        if self._graphs is not None and self._graphs.can_run(batch):
            return self._run_graphs(batch, self._graphs)
        hidden = self._forward(batch)
        if not self._topology.is_last_stage or not len(batch.sampled):
            return None
        return self._sample(batch, self._model.logits(hidden))

    def _run_graphs(self, batch: StepBatch, graphs: DecodeGraphs) -> Samples | None:
        hidden = graphs.forward(batch)  # [tokens, hidden]
        settings = self._rows.sample_batch(batch)
        if batch.samples_all and self._sampler.is_plain(settings):
            return Samples(settings, graphs.draw(settings), [], None)
        if not len(batch.sampled):
            return None
        return self._sample(batch, self._model.logits(hidden[self._tensor(batch.sampled_tokens)]))

    def _forward(self, batch: StepBatch) -> Tensor:
        """[tokens, hidden], of the last stage [samples, hidden]."""
        attention = AttentionBatch(
            slots=self._tensor(batch.slots),
            block_tables=self._tensor(batch.block_tables),
            query_starts=self._tensor(batch.query_starts),
            context_lens=self._tensor(batch.context_lens),
            max_query_len=batch.max_query_len,
            wanted=self._wanted(batch) if self._topology.is_last_stage else None,
        )
        hidden = self._links.receive_hidden()  # [tokens, hidden]
        hidden = self._model.forward(
            self._input_ids(batch), self._tensor(batch.positions), attention, self._kv.layers, hidden
        )
        self._links.send_hidden(hidden)
        return hidden

    def _wanted(self, batch: StepBatch) -> LastTokens | None:
        if batch.samples_all:
            return None
        starts, longest = batch.sample_starts()
        return LastTokens(self._tensor(batch.sampled_tokens), self._tensor(starts), longest)

    def _input_ids(self, batch: StepBatch) -> Tensor:
        """[tokens] int64, sampled tokens that the coordinator does not know yet put in."""
        input_ids = self._tensor(batch.input_ids)
        if len(batch.pending) and self._topology.is_first_stage:
            self._receive_tokens(batch.last_pending_step)
            input_ids[self._tensor(batch.pending)] = self._sampled[self._tensor(batch.pending_rows)]
        return input_ids

    def _receive_tokens(self, last_step: int) -> None:
        """From the last stage, those of steps up to `last_step`."""
        while self._awaited and self._awaited[0][0] <= last_step:
            _, rows = self._awaited.popleft()
            self._sampled[self._tensor(rows)] = self._links.receive_tokens(len(rows))

    def _sample(self, batch: StepBatch, logits: Tensor) -> Samples:
        """logits: [samples, columns of this rank]."""
        samples = self._sampler.sample(logits, self._rows.sample_batch(batch))
        self._sampled[self._tensor(batch.rows[batch.sampled])] = samples.tokens
        if self._feeds_tokens:
            self._links.send_tokens(samples.tokens)
        return samples

    def _draft(self, plan: StepPlan, batch: StepBatch, samples: Samples) -> dict[RequestId, tuple[int, ...]]:
        """Guesses behind what was sampled, where the plan asks for them."""
        assert self._drafter is not None
        assert len(batch.pending) == 0, "the draft model has to know all tokens"
        wanted = {entry.request_id: entry.num_to_draft for entry in plan.continued if entry.num_to_draft}
        if not wanted:
            return {}
        sampled, _ = samples.wait()
        return self._drafter.draft(self._rows, wanted, sampled)

    def _tensor(self, array: np.ndarray[tuple[int, ...], np.dtype[np.generic]]) -> Tensor:
        return to_device(array, self._device)

    def _forget(self, request_ids: tuple[RequestId, ...]) -> None:
        for request_id in request_ids:
            self._rows.forget(request_id)
            self._sampler.forget(request_id)

    def _copy_blocks(self, plan: StepPlan) -> None:
        pairs = self._tensor(np.array(plan.copies, np.int64))  # [copies, 2]
        self._ops.copy_blocks(self._kv.pool, pairs[:, 0].contiguous(), pairs[:, 1].contiguous())
