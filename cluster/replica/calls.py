"""The life of a call inside a replica: in with a Serve request, out step by step, gone when it is cancelled."""

from __future__ import annotations

import asyncio
import time

from shoal.cluster.channel import CallSummary, GenerateCall
from shoal.cluster.metrics import ReplicaMetrics, Snapshot
from shoal.cluster.replica.channel import GatewayChannels
from shoal.engine.request import RequestError
from shoal.engine.streaming import AsyncEngine


class Calls:
    """Runs calls on a started engine. Lives in one event loop."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine
        self._metrics = ReplicaMetrics()
        self._channels = GatewayChannels(self._metrics.observe_step)

    def start(self) -> None:
        """Begin to tell gateways which of their calls are open."""
        self._channels.start()

    async def run(self, call: GenerateCall, reply_to: str) -> CallSummary:
        """Generate all samples; their tokens go to the gateway at `reply_to`, a message per step.

        Cancelling aborts: the samples leave the engine before its next step. Raises ExecutorError if the engine is
        down.
        """
        requests = call.requests(arrival_s=time.monotonic())
        sink = self._channels.sink(reply_to)
        open_call = sink.open(requests)
        self._metrics.start(requests)
        try:
            self._engine.submit(requests, sink)
            return await open_call.summary()
        except RequestError as error:
            self._metrics.discard(open_call.request_ids)
            return CallSummary.refused(error)
        except asyncio.CancelledError:
            self._engine.abort(open_call.request_ids)
            self._metrics.abort(open_call.request_ids)
            raise
        finally:
            sink.forget(open_call)

    def snapshot(self) -> Snapshot:
        """Measurements of the calls so far and of the engine now."""
        return self._metrics.snapshot(self._engine.stats(), num_dropped=self._channels.num_dropped)

    def close(self) -> None:
        """After the engine is closed: nothing is sent any more."""
        self._channels.close()
