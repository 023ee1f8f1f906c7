"""How a starting replica tells the command that started it how far it is, and why it cannot start."""

from __future__ import annotations

import contextlib
from types import TracebackType

import zmq

from shoal.cluster.channel import Progress, decode_progress, encode_progress


class ProgressSender:
    """A replica's end. Sends nothing without an address, and never blocks or fails for want of a listener."""

    def __init__(self, address: str | None, model: str) -> None:
        self._model = model
        self._address = address
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = self._context.socket(zmq.PUSH)
        self._socket.linger = 1000  # ms; the last message says why the replica cannot start

    def __enter__(self) -> ProgressSender:
        if self._address is not None:
            self._socket.connect(self._address)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._socket.close()
        self._context.term()

    def send(self, phase: str, done: int, total: int) -> None:
        """`phase` is at `done` of `total`; units are the phase's own. One thread at a time."""
        self._push(Progress(self._model, phase, done, total))

    def fail(self, message: str) -> None:
        """The replica cannot start; `message` says the way out."""
        self._push(Progress(self._model, "failed", error=message))

    def _push(self, progress: Progress) -> None:
        if self._address is None:
            return
        with contextlib.suppress(zmq.Again):  # nobody listens any more: a replica that Serve started again later
            self._socket.send(encode_progress(progress), zmq.NOBLOCK)


class ProgressReceiver:
    """The starting command's end."""

    def __init__(self, ip: str) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = self._context.socket(zmq.PULL)
        self._socket.linger = 0
        self.address = f"tcp://{ip}:{self._socket.bind_to_random_port(f'tcp://{ip}')}"

    def __enter__(self) -> ProgressReceiver:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._socket.close()
        self._context.term()

    def receive(self, timeout_s: float) -> Progress | None:
        """The next message, or None if there is none for `timeout_s`."""
        if not self._socket.poll(int(timeout_s * 1000)):
            return None
        return decode_progress(self._socket.recv())
