"""The life of a call inside a replica: in with a Serve request, out step by step, gone when it is cancelled."""

from __future__ import annotations

import asyncio
import logging
import time

from shoal.cluster.autoscaling.signals import PromptCounter
from shoal.cluster.channel import CallSummary, GenerateCall
from shoal.cluster.metrics import ReplicaMetrics, Snapshot
from shoal.cluster.replica.channel import GatewayChannels
from shoal.engine.request import RequestError, RequestId, RequestOutput
from shoal.engine.streaming import AsyncEngine

log = logging.getLogger(__name__)


class Calls:
    """Runs calls on a started engine. Lives in one event loop."""

    def __init__(self, engine: AsyncEngine, metrics: ReplicaMetrics | None = None) -> None:
        self._engine = engine
        self._metrics = metrics or ReplicaMetrics()
        self._channels = GatewayChannels(self._observe_step)
        self._num_prompt: dict[RequestId, int] = {}  # of calls without a token yet
        self.prompts = PromptCounter()

    def start(self) -> None:
        """Begin to tell gateways which of their calls are open."""
        self._channels.start()

    @property
    def gateways(self) -> tuple[str, ...]:
        """Where those listen that have called. Callable from any thread."""
        return self._channels.addresses

    async def run(self, call: GenerateCall, reply_to: str) -> CallSummary:
        """Generate all samples; their tokens go to the gateway at `reply_to`, a message per step.

        Cancelling aborts: the samples leave the engine before its next step. Raises ExecutorError if the engine is
        down.
        """
        requests = call.requests(arrival_s=time.monotonic())
        sink = self._channels.sink(reply_to)
        open_call = sink.open(requests)
        self._metrics.start(requests)
        self._num_prompt[open_call.request_ids[0]] = len(call.prompt_ids)
        try:
            self._engine.submit(requests, sink)
            summary = await open_call.summary()
            log.debug("call %s is over: %s tokens", call.request_id, summary.num_tokens)
            return summary
        except RequestError as error:
            log.info("call %s is refused: %s", call.request_id, error)
            self._metrics.discard(open_call.request_ids)
            return CallSummary.refused(error)
        except asyncio.CancelledError:
            log.info("call %s is aborted: its client has left", call.request_id)
            self._engine.abort(open_call.request_ids)
            self._metrics.abort(open_call.request_ids)
            raise
        finally:
            self._num_prompt.pop(open_call.request_ids[0], None)
            sink.forget(open_call)

    def snapshot(self) -> Snapshot:
        """Measurements of the calls so far and of the engine now."""
        return self._metrics.snapshot(self._engine.stats(), num_dropped=self._channels.num_dropped)

    def _observe_step(self, outputs: list[RequestOutput]) -> None:
        """In the engine's thread."""
        self._metrics.observe_step(outputs)
        for output in outputs if self._num_prompt else ():
            num_prompt = self._num_prompt.pop(output.request_id, None)
            if num_prompt is not None and (output.token_ids or output.finish_reason is None):
                self.prompts.observe(num_prompt - output.num_cached_tokens)

    def close(self) -> None:
        """After the engine is closed: nothing is sent any more."""
        self._channels.close()
