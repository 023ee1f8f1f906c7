"""The replica's end of the token channel: one engine sink per gateway, one message per step."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import TypeAlias

import zmq

from shoal.cluster.channel import (
    KEEPALIVE_PERIOD_S,
    MAX_QUEUED_MESSAGES,
    CallSummary,
    encode_keepalive,
    encode_step,
)
from shoal.engine.request import Request, RequestId, RequestOutput

Context: TypeAlias = "zmq.Context[zmq.Socket[bytes]]"
Observe: TypeAlias = Callable[[list[RequestOutput]], None]


class OpenCall:
    """One call whose samples are still running. Written by the engine thread, awaited in the event loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop, request_ids: Sequence[RequestId]) -> None:
        self.request_ids = tuple(request_ids)
        self._loop = loop
        self._num_tokens = dict.fromkeys(request_ids, 0)
        self._num_open = len(request_ids)
        self._finished = asyncio.Event()

    def count(self, output: RequestOutput) -> None:
        self._num_tokens[output.request_id] += len(output.token_ids)
        if output.finish_reason is None:
            return
        self._num_open -= 1
        if self._num_open == 0:
            self._loop.call_soon_threadsafe(self._finished.set)

    async def summary(self) -> CallSummary:
        """Wait until every sample is finished."""
        await self._finished.wait()
        return CallSummary(tuple(self._num_tokens.values()))


class GatewaySink:
    """The engine's sink for all calls of one gateway."""

    def __init__(self, context: Context, address: str, observe: Observe) -> None:
        self._socket = context.socket(zmq.PUSH)
        self._socket.set_hwm(MAX_QUEUED_MESSAGES)
        self._socket.linger = 0
        self._socket.connect(address)
        self._lock = threading.Lock()  # the engine's and the keepalive thread send, the event loop closes
        self._calls: dict[RequestId, OpenCall] = {}
        self._observe = observe
        self.num_dropped = 0

    @property
    def num_open(self) -> int:
        """Samples still running for this gateway."""
        return len(self._calls)

    def open(self, requests: Sequence[Request]) -> OpenCall:
        """Expect outputs for these requests. Call before the engine sees them."""
        sample_ids = [sample_id for request in requests for sample_id in request.result_ids]
        call = OpenCall(asyncio.get_running_loop(), sample_ids)
        for request_id in call.request_ids:
            self._calls[request_id] = call
        return call

    def forget(self, call: OpenCall) -> None:
        for request_id in call.request_ids:
            self._calls.pop(request_id, None)

    def deliver(self, outputs: list[RequestOutput]) -> None:
        """Send one step's outputs. Called in the engine thread; never blocks."""
        self._observe(outputs)
        self._send(encode_step(outputs))
        # After the send, so that the summary never overtakes the tokens by more than the network does.
        for output in outputs:
            call = self._calls.get(output.request_id)
            if call is not None:
                call.count(output)

    def keep_alive(self) -> None:
        """Tell the gateway which of its calls are still here. Never blocks."""
        first_ids = {call.request_ids[0] for call in self._calls.copy().values()}  # the event loop changes _calls
        if first_ids:
            self._send(encode_keepalive(list(first_ids)))

    def close(self) -> None:
        with self._lock:
            self._socket.close()

    def _send(self, message: bytes) -> None:
        with self._lock:
            if self._socket.closed:
                return
            try:
                self._socket.send(message, zmq.NOBLOCK)
            except zmq.Again:
                self.num_dropped += 1


class GatewayChannels:
    """The sinks of all gateways that have open calls. From `start` on, a thread tells them which calls are open:
    however long the engine's step takes, the gateways hear of the replica.
    """

    def __init__(self, observe: Observe) -> None:
        self._context: Context = zmq.Context()
        self._observe = observe
        self._sinks: dict[str, GatewaySink] = {}
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._keep_alive, name="keepalive", daemon=True)

    def __enter__(self) -> GatewayChannels:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def num_dropped(self) -> int:
        """Messages that were not sent because their gateway had stopped reading."""
        return sum(sink.num_dropped for sink in self._sinks.values())

    @property
    def addresses(self) -> tuple[str, ...]:
        """Where the gateways listen. Callable from any thread."""
        return tuple(self._sinks)

    def sink(self, address: str) -> GatewaySink:
        """The sink for the gateway that listens at `address` ("tcp://ip:port")."""
        sink = self._sinks.get(address)
        if sink is None:
            self._close_idle()  # gateways come back under new addresses
            sink = self._sinks[address] = GatewaySink(self._context, address, self._observe)
        return sink

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        self._closing.set()
        if self._thread.is_alive():
            self._thread.join()
        for sink in self._sinks.values():
            sink.close()
        self._sinks.clear()
        self._context.term()

    def _keep_alive(self) -> None:
        while not self._closing.wait(KEEPALIVE_PERIOD_S):
            for sink in list(self._sinks.values()):
                sink.keep_alive()

    def _close_idle(self) -> None:
        for address in [address for address, sink in self._sinks.items() if sink.num_open == 0]:
            self._sinks.pop(address).close()
