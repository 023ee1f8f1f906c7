"""One rank's share of a step: rows up to date, tokens through the model, samples out."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from shoal.engine.config import EngineConfig
from shoal.engine.layers.attention import AttentionBatch
from shoal.engine.models.registry import Model
from shoal.engine.plan import StepPlan, StepResult
from shoal.engine.request import RequestId
from shoal.engine.runner.batch import Rows, StepBatch
from shoal.engine.runner.kv_store import KVStore
from shoal.engine.sampling.sampler import Sampler
from shoal.kernels.dispatch import Operations


class ModelRunner:
    """Holds the rows, the KV store and the sampler of one rank. `execute` is one step."""

    def __init__(
        self,
        config: EngineConfig,
        max_model_len: int,
        model: Model,
        kv: KVStore,
        ops: Operations,
        device: torch.device,
    ) -> None:
        self._model = model
        self._kv = kv
        self._ops = ops
        self._device = device
        self._rows = Rows(config.max_running_requests, max_model_len, config.block_size)
        self._sampler = Sampler(ops, config.model.eos_token_ids, config.model.vocab_size)

    @torch.inference_mode()
    def execute(self, plan: StepPlan) -> StepResult:
        self._forget(plan.finished)
        if plan.copies:
            self._copy_blocks(plan)
        for new in plan.new:
            self._rows.add(new)
            self._sampler.add(new.request_id, new.params, new.token_ids, new.num_prompt_tokens, self._device)
        batch = self._rows.gather(plan)
        hidden = self._forward(batch)
        if len(batch.sampled) == 0:
            return StepResult(plan.step)
        last = hidden[self._tensor(batch.sampled_tokens)]  # [samples, hidden]
        logits = self._model.logits(last)  # [samples, vocab]
        samples = self._rows.sample_batch(batch)
        tokens, logprobs = self._sampler.sample(logits, samples)
        return StepResult(
            plan.step,
            {request_id: (token,) for request_id, token in zip(samples.request_ids, tokens, strict=True)},
            {request_id: (logprob,) for request_id, logprob in logprobs.items()},
        )

    def _forward(self, batch: StepBatch) -> Tensor:
        attention = AttentionBatch(
            slots=self._tensor(batch.slots),
            block_tables=self._tensor(batch.block_tables),
            query_starts=self._tensor(batch.query_starts),
            context_lens=self._tensor(batch.context_lens),
            max_query_len=batch.max_query_len,
        )
        return self._model.forward(
            self._tensor(batch.input_ids), self._tensor(batch.positions), attention, self._kv.layers
        )

    def _tensor(self, array: np.ndarray[tuple[int, ...], np.dtype[np.generic]]) -> Tensor:
        return torch.from_numpy(array).to(self._device, non_blocking=True)

    def _forget(self, request_ids: tuple[RequestId, ...]) -> None:
        for request_id in request_ids:
            self._rows.forget(request_id)
            self._sampler.forget(request_id)

    def _copy_blocks(self, plan: StepPlan) -> None:
        pairs = torch.tensor(plan.copies, dtype=torch.int64, device=self._device)  # [copies, 2]
        self._ops.copy_blocks(self._kv.pool, pairs[:, 0].contiguous(), pairs[:, 1].contiguous())
