"""The coordinator of one replica: plan, execute, commit. The host half; imports no torch."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence

from shoal.engine.config import EngineConfig
from shoal.engine.executor import Executor, ExecutorInfo
from shoal.engine.load import RATE_MEMORY_S, EngineLoad, RateMeter
from shoal.engine.memory.kv_events import KVEvent
from shoal.engine.memory.kv_layout import check_pool
from shoal.engine.memory.kv_manager import KVManager
from shoal.engine.plan import StepPlan
from shoal.engine.request import (
    MAX_LOGPROBS,
    EngineStats,
    Request,
    RequestError,
    RequestId,
    RequestOutput,
    SamplingParams,
)
from shoal.engine.scheduling.beam_search import tokens_needed
from shoal.engine.scheduling.scheduler import Scheduler
from shoal.engine.scheduling.waiting_queue import WaitingQueue
from shoal.engine.speculation.proposer import Proposer
from shoal.engine.speculation.proposers import make_proposer
from shoal.engine.speculation.speculator import Speculator
from shoal.engine.step_time import StepTimeFit, work_of


class EngineCore:
    """Owns the scheduler and the logical KV pool, drives an executor. One thread calls it.

    `start()` may take minutes (the ranks load); `close()` may be called at any time. With `record_kv_events` somebody
    has to call `take_kv_events`. `proposer` guesses instead of the one that config.speculative names.
    """

    def __init__(
        self,
        config: EngineConfig,
        executor: Executor,
        *,
        record_kv_events: bool = False,
        proposer: Proposer | None = None,
    ) -> None:
        self.config = config
        self._proposer = proposer
        self._executor = executor
        self._record_kv_events = record_kv_events
        self._info: ExecutorInfo | None = None
        self._in_flight: deque[StepPlan] = deque()
        self._steps = 0
        self._step_seconds = 0.0
        self._step_ended_s = 0.0
        self._step_time = StepTimeFit()
        self._finished = RateMeter(RATE_MEMORY_S)

    def start(self) -> None:
        """Bring the ranks up. Raises ConfigError if the checkpoint or the memory cannot work."""
        config, model = self.config, self.config.model
        info = self._executor.start()
        self.max_model_len = check_pool(config, info.num_blocks)
        # A draft model may want the KV of any known token: it computes what it lacks when it is asked.
        windows = [window for window in model.layer_windows if window is not None and config.draft_model is None]
        self._kv = KVManager(
            info.num_blocks,
            config.block_size,
            enable_prefix_caching=config.enable_prefix_caching,
            watermark=config.watermark,
            window=max(windows) if windows and len(windows) == model.num_layers else None,
            record_events=self._record_kv_events,
        )
        self._scheduler = Scheduler(
            self._kv,
            WaitingQueue(config.scheduling_policy, config.ageing_s),
            max_step_tokens=config.max_step_tokens,
            max_running_requests=config.max_running_requests,
            max_model_len=self.max_model_len,
            eos_token_ids=model.eos_token_ids,
            spacing=config.pipeline_parallel,
            speculator=self._make_speculator(),
        )
        self._info = info

    def _make_speculator(self) -> Speculator | None:
        options = self.config.speculative
        if options is None:
            return None
        model, draft = self.config.model, self.config.draft
        return Speculator(
            options,
            self._proposer or make_proposer(options),
            self._step_time,
            draft_round_cost=draft.model.num_parameters / model.num_parameters if draft is not None else 0.0,
        )

    def close(self) -> None:
        self._in_flight.clear()
        self._executor.close()

    @property
    def info(self) -> ExecutorInfo:
        assert self._info is not None, "not started"
        return self._info

    @property
    def has_work(self) -> bool:
        return self._scheduler.has_work or bool(self._in_flight)

    def add(self, request: Request) -> None:
        """Queue a request that `check_request` has let through."""
        self._scheduler.add(request)

    def check_request(self, request: Request) -> None:
        """Raise RequestError for a request that can never run here. Callable from any thread."""
        vocab_size = self.config.model.vocab_size
        check_prompt(request.prompt_ids, vocab_size, self.max_model_len, request.params.max_tokens)
        request.params.check_vocab(vocab_size)
        if request.params.use_beam_search:
            self._check_beams(request.params, len(request.prompt_ids))

    def _check_beams(self, params: SamplingParams, num_prompt: int) -> None:
        width, model = params.width, self.config.model
        num_end_ids = len({*params.stop_token_ids, *(() if params.ignore_eos else model.eos_token_ids)})
        num_reported = min(MAX_LOGPROBS, model.vocab_size)
        if tokens_needed(width, num_end_ids) > num_reported:
            raise RequestError(
                f"{width} beams that {num_end_ids} tokens can end take the {tokens_needed(width, num_end_ids)} most "
                f"likely tokens of each; there are {num_reported}: ask for fewer beams, or name fewer stop_token_ids",
                param="stop_token_ids" if params.stop_token_ids else params.width_field,
            )
        if width > self.config.max_running_requests:
            raise RequestError(
                f"{width} beams are more than the {self.config.max_running_requests} requests that run here at once",
                param=params.width_field,
            )
        num_blocks = num_prompt // self.config.block_size + width
        if num_blocks > self._kv.num_usable_blocks:
            raise RequestError(
                f"{width} beams behind {num_prompt} tokens take {num_blocks} KV blocks; this model has "
                f"{self._kv.num_usable_blocks}: shorten the prompt, or ask for fewer beams",
                param=params.width_field,
            )

    def abort(self, request_id: RequestId) -> Request | None:
        """Forget a request; None if it is not here (any more)."""
        return self._scheduler.abort(request_id)

    def step(self) -> list[RequestOutput]:
        """Give the ranks as many plans as they may have, then wait for the oldest: what it gave each request that got a
        token. Raises ExecutorError if a rank fails.
        """
        start = time.perf_counter()
        # With steps in flight, one ends every so often: its own time goes back to the end of the one before.
        began = self._step_ended_s if self._in_flight else start
        while len(self._in_flight) < self.config.max_steps_in_flight:
            plan = self._scheduler.plan()
            if plan.is_empty:
                break
            self._executor.submit(plan)
            self._in_flight.append(plan)
        if not self._in_flight:
            return []
        result = self._executor.collect()
        plan = self._in_flight.popleft()
        outputs = self._scheduler.commit(plan, result)
        self._steps += 1
        self._step_ended_s = end = time.perf_counter()
        self._step_seconds += end - start
        self._step_time.add(work_of(plan), end - began)
        return outputs

    def check_ranks(self) -> None:
        """Raise ExecutorError if a rank has died or fallen silent: for idle moments, when no step would tell."""
        self._executor.check()

    def check(self) -> None:
        """Assert the invariants of memory and queues: a self-audit for idle moments."""
        self._scheduler.check()

    def reset_prefix_cache(self) -> None:
        self._kv.reset_cache()

    def take_kv_events(self) -> list[KVEvent]:
        """What became cached and what was evicted since the last call, in order."""
        return self._kv.take_events()

    def load(self) -> EngineLoad:
        """For a router, some times a second: O(requests)."""
        finished_per_s = self._finished.read(self._scheduler.counters.finished, time.monotonic())
        return self._scheduler.load(self._step_time.estimate(), finished_per_s)

    def stats(self) -> EngineStats:
        scheduler, counters = self._scheduler, self._scheduler.counters
        return EngineStats(
            num_running=scheduler.num_running,
            num_waiting=scheduler.num_waiting,
            num_blocks=self._kv.num_usable_blocks,
            num_free_blocks=self._kv.num_free_blocks,
            block_size=self.config.block_size,
            max_model_len=self.max_model_len,
            steps_total=self._steps,
            step_seconds_total=self._step_seconds,
            prompt_tokens_total=counters.prompt_tokens,
            cached_tokens_total=counters.cached_tokens,
            generation_tokens_total=counters.generation_tokens,
            preemptions_total=counters.preemptions,
            requests_finished_total=counters.finished,
            drafts=counters.drafts,
            num_deferred=scheduler.num_forks,
            held_seconds_total=scheduler.held_s,
        )


def check_prompt(prompt_ids: Sequence[int], vocab_size: int, max_model_len: int, max_tokens: int | None) -> None:
    """Raise RequestError for a prompt that this model can never complete."""
    if not prompt_ids:
        raise RequestError("the prompt is empty: give at least one token", param="prompt")
    if min(prompt_ids) < 0 or max(prompt_ids) >= vocab_size:
        wrong = next(token for token in prompt_ids if not 0 <= token < vocab_size)
        raise RequestError(
            f"the prompt holds token {wrong}; this model has tokens 0 to {vocab_size - 1}", param="prompt"
        )
    wanted = max_tokens if max_tokens is not None else 1
    if len(prompt_ids) + wanted > max_model_len:
        raise RequestError(
            f"This model's maximum context length is {max_model_len} tokens. However, you requested "
            f"{len(prompt_ids) + wanted} tokens ({len(prompt_ids)} in the prompt, {wanted} in the completion): "
            f"shorten the prompt or lower max_tokens",
            param="max_tokens" if len(prompt_ids) < max_model_len else "prompt",
            code="context_length_exceeded",
        )
