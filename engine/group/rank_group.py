"""The ranks of one group as their coordinator sees them: one socket, and who is alive.

Whoever calls `receive` serves the socket; while nobody does, a thread of the group takes a look now and then, so that
heartbeats are answered and a dead rank is noticed in idle times too. No message changes threads on its way out.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn

import msgspec
import zmq

from shoal.engine.config import ConfigError, EngineOptions
from shoal.engine.executor import ExecutorError
from shoal.engine.group.launcher import Launcher, RankHandle, RankStart
from shoal.engine.group.messages import (
    PURPOSES,
    Alive,
    Beat,
    Failed,
    FromRank,
    Hello,
    ToRank,
    Worked,
    decode_from_rank,
    encode,
    socket_name,
)
from shoal.engine.parallel.topology import Topology
from shoal.engine.spans import RankWork

POLL_S = 0.1  # at most so long after a rank has died it is noticed
BLAME_S = 0.2  # ranks that lose a peer complain at once; so long is waited for a peer that has died
END_S = 1.0  # killed processes are gone after this


@dataclass(slots=True, eq=False)
class _Member:
    """One rank, and what was last heard of it."""

    topology: Topology
    handle: RankHandle
    place: str = ""
    heard_s: float | None = None  # time.monotonic(); None before its first beat
    num_steps: int = 0

    def __str__(self) -> str:
        topology = self.topology
        return f"rank {topology.rank} (stage {topology.stage}, tensor rank {topology.tensor_rank}){self.place}"


class RankGroup:
    """Ranks that live and die together. As soon as one has failed, all are killed, and every call raises.

    One thread calls `send`, `receive` and `check`; `close` may be called from any.
    """

    def __init__(self, options: EngineOptions, launcher: Launcher) -> None:
        """Start the ranks' processes. Does not wait for them. Raises what `launcher` raises."""
        self.size = options.num_ranks
        self._heartbeat_timeout_s = options.heartbeat_timeout_s
        self._key = secrets.token_hex(16)
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)  # a message to a rank that has gone is an error
        self._socket.setsockopt(zmq.RCVTIMEO, int(POLL_S * 1e3))
        self._lock = threading.Lock()  # guards the socket and the members
        self._closing = threading.Lock()  # libzmq does not survive two threads that end one context
        self._heard: deque[tuple[int, FromRank]] = deque()
        self._work: dict[int, RankWork] = {}  # by rank
        self.work: tuple[RankWork, ...] = ()  # as far as the ranks have told
        self._error: Exception | None = None
        self._is_closed = threading.Event()
        self._members: list[_Member] = []
        try:
            self._launch(options, launcher)
        except BaseException:
            self._context.destroy(linger=0)
            raise
        self._senders = {
            socket_name(self._key, rank, purpose): rank for rank in range(self.size) for purpose in PURPOSES
        }
        self._watch = threading.Thread(target=self._look_now_and_then, name="rank-group", daemon=True)
        self._watch.start()

    def _launch(self, options: EngineOptions, launcher: Launcher) -> None:
        port = self._socket.bind_to_random_port(f"tcp://{launcher.bind_host}")
        address = f"tcp://{launcher.bind_host}:{port}"
        handles = launcher.launch([RankStart(rank, self.size, address, self._key) for rank in range(self.size)])
        self._members = [_Member(Topology.of_rank(rank, options), handle) for rank, handle in enumerate(handles)]

    def name(self, rank: int) -> str:
        """For messages to people."""
        return str(self._members[rank])

    def send(self, ranks: Sequence[int], message: ToRank) -> None:
        """Raises ExecutorError if a rank has failed."""
        data = encode(message)
        with self._lock:
            self._raise_if_down()
            for rank in ranks:
                try:
                    self._socket.send_multipart([socket_name(self._key, rank, "plans"), data])
                except zmq.ZMQError as error:
                    self._blame(self._members[rank], f"cannot be reached: {error}")
                    self._raise_if_down()

    def send_all(self, message: ToRank) -> None:
        self.send(range(self.size), message)

    def receive(self, timeout_s: float) -> tuple[int, FromRank] | None:
        """The next message and its sender; None if none comes in time. Raises ExecutorError, or ConfigError, if a rank
        has failed.
        """
        deadline_s = time.monotonic() + timeout_s
        while True:
            with self._lock:
                self._raise_if_down()
                if self._heard:
                    return self._heard.popleft()
                if not self._listen():
                    self._check_members()
                    if time.monotonic() >= deadline_s:
                        return None

    def check(self) -> None:
        """Raise ExecutorError if a rank has failed."""
        with self._lock:
            self._look()
            self._raise_if_down()

    def fail(self, error: Exception) -> NoReturn:
        """Kill all ranks and raise `error`, as every later call does, or what has already gone wrong."""
        self._give_up(error)
        self._raise_if_down()
        raise AssertionError("a group that was given up is down")

    def slowest(self) -> list[int]:
        """The ranks that have launched the fewest steps, as far as their heartbeats say."""
        fewest = min(member.num_steps for member in self._members)
        return [rank for rank, member in enumerate(self._members) if member.num_steps == fewest]

    def close(self) -> None:
        """Kill the ranks and free everything, within about a second."""
        self._is_closed.set()
        self._give_up(ExecutorError("the replica group is closed"))
        with self._closing:
            if self._context.closed:
                return
            with self._lock:
                self._socket.close()
            self._watch.join()
            self._context.term()
            deadline_s = time.monotonic() + END_S
            while time.monotonic() < deadline_s and any(m.handle.exit_reason() is None for m in self._members):
                time.sleep(0.005)

    # -- under the lock ----------------------------------------------------------------------------------------

    def _raise_if_down(self) -> None:
        if self._error is not None:
            raise self._error

    def _listen(self, flags: int = 0) -> bool:
        """Take in one message; False if none came."""
        try:
            frames = self._socket.recv_multipart(flags)
        except zmq.Again:
            return False
        rank = self._senders.get(frames[0])
        if rank is None or len(frames) != 2:
            return True  # a stranger
        member = self._members[rank]
        try:
            message = decode_from_rank(frames[1])
        except msgspec.MsgspecError as error:
            self._give_up(ExecutorError(f"{member} sent what cannot be read ({error}): is Shoal the same everywhere?"))
            return True
        if isinstance(message, Hello):
            member.place = f" on host {message.node}, pid {message.pid}"
        else:  # it waits for the others to come up before it beats
            member.heard_s = time.monotonic()
        if isinstance(message, Worked):
            self._work[rank] = RankWork(member.topology.name, message.num_steps, message.compute_s, message.wait_s)
            self.work = tuple(self._work.values())
        elif isinstance(message, Beat):
            member.num_steps = message.num_steps
            self._socket.send_multipart([frames[0], encode(Alive())])
        elif isinstance(message, Failed) and message.field is not None:
            self._give_up(ConfigError(message.error, field=message.field))
        elif isinstance(message, Failed):
            self._blame(member, message.error)
        else:
            self._heard.append((rank, message))
        return True

    def _look(self) -> None:
        """Take in what has come, and see to the ranks."""
        while self._error is None and self._listen(zmq.DONTWAIT):
            pass
        if self._error is None:
            self._check_members()

    def _check_members(self) -> None:
        now_s = time.monotonic()
        for member in self._members:
            reason = member.handle.exit_reason()
            if reason is not None:
                self._give_up(ExecutorError(f"{member} {reason}"))
            elif member.heard_s is not None and now_s - member.heard_s > self._heartbeat_timeout_s:
                self._give_up(ExecutorError(f"{member} has been silent for {now_s - member.heard_s:.1f} s"))

    def _blame(self, member: _Member, error: str) -> None:
        """Give up for what `member` complains of, or for the death of another rank that is behind it."""
        deadline_s = time.monotonic() + BLAME_S
        while self._error is None and time.monotonic() < deadline_s:
            for other in self._members:
                reason = other.handle.exit_reason()
                if reason is not None:
                    self._give_up(ExecutorError(f"{other} {reason}"))
            time.sleep(0.005)
        self._give_up(ExecutorError(f"{member}: {error}"))

    # -- any thread --------------------------------------------------------------------------------------------

    def _give_up(self, error: Exception) -> None:
        self._error = self._error or error
        for member in self._members:
            member.handle.kill()

    def _look_now_and_then(self) -> None:
        while not self._is_closed.wait(min(POLL_S, self._heartbeat_timeout_s / 5)):
            if self._lock.acquire(blocking=False):  # otherwise the thread that has it serves the socket
                try:
                    if not self._socket.closed:
                        self._look()
                finally:
                    self._lock.release()
