"""The gateway's end of the token channel: one socket, and the outputs of each open call in order."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Final

import msgspec
import zmq

from shoal.cluster.channel import (
    KEEPALIVE_PERIOD_S,
    MAX_QUEUED_MESSAGES,
    SILENCE_TIMEOUT_S,
    PeerMessage,
    decode_gateway_message,
)
from shoal.cluster.gateway.backend import ReplicaFailedError
from shoal.engine.request import FinishReason, RequestId, RequestOutput

log = logging.getLogger(__name__)

# Messages handled before the event loop gets its turn again.
_MAX_BURST: Final = 64
_MAX_SILENT_PERIODS: Final = round(SILENCE_TIMEOUT_S / KEEPALIVE_PERIOD_S)


class TokensLostError(ReplicaFailedError):
    """Tokens of a call did not arrive."""


class CallInbox:
    """One call's outputs, in order. Who reads slower than they come gets those of several steps at once."""

    def __init__(self, sample_ids: Sequence[RequestId]) -> None:
        self._loop = asyncio.get_running_loop()
        self._num_tokens = dict.fromkeys(sample_ids, 0)  # of the samples that are still open
        self._is_closed = False
        self._has_begun = False
        self._num_silent_periods: int | None = None  # None: no replica has the call, as far as is known
        self._outputs: list[RequestOutput] = []  # that nobody has taken yet
        self._error: Exception | None = None  # that comes after them
        self._waiting: asyncio.Future[None] | None = None  # of the reader, while there is neither
        self._deadline: asyncio.TimerHandle | None = None

    @property
    def is_finished(self) -> bool:
        """Whether the last output of every sample was taken."""
        return not self._num_tokens

    async def next(self) -> list[RequestOutput]:
        """What has come since the last time, at least one step's. For one reader.

        Raises what `fail` was given, ReplicaFailedError for an output that says so, and TokensLostError for a gap.
        """
        while not self._outputs:
            if self._error is not None:
                raise self._error
            self._waiting = self._loop.create_future()
            await self._waiting
        outputs, self._outputs = self._outputs, []
        for number, output in enumerate(outputs):
            try:
                self._count(output)
            except ReplicaFailedError as error:
                self._error = error
                if number == 0:
                    raise
                return outputs[:number]
        return outputs

    def put(self, outputs: list[RequestOutput]) -> bool:
        """Take outputs in; who waits for them has to be woken. True if that cannot wait: the first ones, and ends."""
        self.hear()
        is_first, self._has_begun = not self._has_begun, True
        self._outputs += outputs
        return is_first or any(output.finish_reason is not None for output in outputs)

    def hear(self) -> None:
        """The replica still has the call."""
        self._num_silent_periods = 0

    def pass_period(self) -> None:
        """Called every KEEPALIVE_PERIOD_S. Fails the call when its replica has been silent for SILENCE_TIMEOUT_S.

        Silence is counted, not timed, so that an event loop that was held up for long does not blame its replicas.
        """
        if self._num_silent_periods is None:
            return
        self._num_silent_periods += 1
        if self._num_silent_periods == _MAX_SILENT_PERIODS:
            self.fail(ReplicaFailedError(f"the replica has not been heard of for {SILENCE_TIMEOUT_S:g} s"))

    def fail(self, error: Exception) -> None:
        """End the call with this error, after the outputs that have come."""
        self._error = self._error or error
        self.wake()

    def fail_after(self, seconds: float, error: Exception) -> None:
        if not self._is_closed:
            self._deadline = self._loop.call_later(seconds, self.fail, error)

    def close(self) -> None:
        self._is_closed = True
        if self._deadline is not None:
            self._deadline.cancel()

    def wake(self) -> None:
        """Let the reader have what has come."""
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(None)

    def _count(self, output: RequestOutput) -> None:
        if output.finish_reason is FinishReason.ERROR:
            raise ReplicaFailedError(output.error or "the replica gave no reason")
        self._num_tokens[output.request_id] += len(output.token_ids)
        if output.finish_reason is None:
            return
        received = self._num_tokens[output.request_id]
        if output.times is not None and output.times.num_output_tokens != received:
            sent = output.times.num_output_tokens
            raise TokensLostError(f"{sent - received} of {sent} tokens of {output.request_id} were lost")
        del self._num_tokens[output.request_id]


class StepInbox:
    """Receives the step messages of all replicas and hands each call its part, and `on_peer_message` what other
    gateways say. Lives in one event loop.

    Passing on a token costs little, waking all that a stream goes through costs much: those of several steps, as many
    as come within `interval_s`, go together. A call's first ones go at once, and so does its end.
    """

    def __init__(
        self,
        ip: str,
        on_peer_message: Callable[[PeerMessage], None] = lambda message: None,
        *,
        interval_s: float = 0.0,
    ) -> None:
        self._on_peer_message = on_peer_message
        self._interval_s = interval_s
        self._unwoken: dict[CallInbox, None] = {}  # that have outputs, until the interval is over
        self._wake_timer: asyncio.TimerHandle | None = None
        self._woken_s = 0.0  # when it was over last
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = self._context.socket(zmq.PULL)
        self._socket.set_hwm(MAX_QUEUED_MESSAGES)
        self._socket.linger = 0
        self.address = f"tcp://{ip}:{self._socket.bind_to_random_port(f'tcp://{ip}')}"
        self._calls: dict[RequestId, CallInbox] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._period: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """Begin to receive, in the running event loop."""
        self._loop = asyncio.get_running_loop()
        # The descriptor only tells that something changed: it must be drained until nothing is left, each time.
        self._loop.add_reader(self._socket.fileno(), self._drain)
        self._drain()
        self._period = self._loop.call_later(KEEPALIVE_PERIOD_S, self._pass_period)

    def close(self) -> None:
        for timer in (self._period, self._wake_timer):
            if timer is not None:
                timer.cancel()
        if self._loop is not None:
            self._loop.remove_reader(self._socket.fileno())
            self._loop = None
        self._socket.close()
        self._context.term()

    @contextmanager
    def open(self, sample_ids: Sequence[RequestId]) -> Iterator[CallInbox]:
        """Expect outputs for these samples while the context lasts; later ones are dropped."""
        taken = [sample_id for sample_id in sample_ids if sample_id in self._calls]
        assert not taken, f"request ids must be unique, already open: {taken}"
        call = CallInbox(sample_ids)
        self._calls.update(dict.fromkeys(sample_ids, call))
        try:
            yield call
        finally:
            call.close()
            for sample_id in sample_ids:
                del self._calls[sample_id]

    def _drain(self) -> None:
        for _ in range(_MAX_BURST):
            try:
                message = self._socket.recv(zmq.NOBLOCK)
            except zmq.Again:
                return
            try:
                content = decode_gateway_message(message)
            except msgspec.DecodeError:
                log.exception("dropped a message of %d bytes that is none for a gateway", len(message))
                continue
            if isinstance(content, list):
                self._deliver(content)
            else:
                self._on_peer_message(content)
        if self._loop is not None:
            self._loop.call_soon(self._drain)

    def _pass_period(self) -> None:
        for call in set(self._calls.values()):
            call.pass_period()
        if self._loop is not None:
            self._period = self._loop.call_later(KEEPALIVE_PERIOD_S, self._pass_period)

    def _deliver(self, items: list[RequestOutput | RequestId]) -> None:
        parts: dict[CallInbox, list[RequestOutput]] = {}
        for item in items:
            call = self._calls.get(item.request_id if isinstance(item, RequestOutput) else item)
            if call is None:
                continue
            if isinstance(item, RequestOutput):
                parts.setdefault(call, []).append(item)
            else:
                call.hear()
        for call, part in parts.items():
            if call.put(part) or not self._interval_s:
                self._unwoken.pop(call, None)
                call.wake()
            else:
                self._unwoken[call] = None
        if self._unwoken and self._wake_timer is None and self._loop is not None:
            self._wake_timer = self._loop.call_at(self._woken_s + self._interval_s, self._wake_all)

    def _wake_all(self) -> None:
        assert self._loop is not None
        self._wake_timer = None
        self._woken_s = self._loop.time()
        for call in self._unwoken:
            call.wake()
        self._unwoken.clear()
