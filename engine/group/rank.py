"""What a rank's process runs: say hello, load, carry out plans, until the coordinator ends it or is gone.

Three threads, each with a socket of its own. The first receives plans and launches them. The second waits for what the
device makes of them and answers, so that on CUDA the next step is queued while one runs. The third exchanges
heartbeats: a long step does not make a rank look dead, as neither kernels nor waiting hold Python's lock.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Protocol, TypeVar
from urllib.parse import urlsplit

import msgspec
import zmq

from shoal.engine.config import ConfigError, EngineConfig
from shoal.engine.executor import RankInfo
from shoal.engine.group.launcher import RankStart
from shoal.engine.group.messages import (
    Allocate,
    Beat,
    Configure,
    Failed,
    Found,
    FromRank,
    Hello,
    Loaded,
    Loading,
    Purpose,
    Ready,
    Step,
    Stepped,
    ToRank,
    Welcome,
    Worked,
    decode_to_rank,
    encode,
    socket_name,
)
from shoal.engine.parallel.collectives import Collectives
from shoal.engine.parallel.pipeline import StageLinks, TimedLinks
from shoal.engine.parallel.process_group import connect, join_store, open_store
from shoal.engine.parallel.topology import Topology
from shoal.engine.plan import StepPlan, StepResult
from shoal.engine.worker import Worker, detect_machine

log = logging.getLogger(__name__)

_Answer = TypeVar("_Answer", bound=ToRank)

POLL_S = 0.2
BEATS_PER_TIMEOUT = 5
WORK_PERIOD_S = 0.05  # a rank tells what it has done at most this often


class Pending(Protocol):
    """A step under way."""

    def wait(self) -> StepResult: ...


class RankWorker(Protocol):
    """What carries the plans out, as engine.worker.Worker does."""

    def load(self, progress: Callable[[str, int, int], None]) -> None: ...

    def num_blocks_possible(self) -> int: ...

    def allocate(self, num_blocks: int) -> int: ...

    def info(self, kv_bytes: int, node: str) -> RankInfo: ...

    def expect(self, plan: StepPlan) -> None: ...

    def launch(self, plan: StepPlan) -> Pending: ...


class MakeWorker(Protocol):
    """Signature of Worker."""

    def __call__(
        self,
        config: EngineConfig,
        topology: Topology,
        collectives: Collectives,
        links: StageLinks,
        *,
        ranks_on_host: int,
    ) -> RankWorker: ...


class StoppedError(Exception):
    """The rank has been told to stop, or its coordinator is gone."""


def rank_main(start: RankStart) -> None:
    """Be a rank. Does not return: the coordinator kills this process, or it ends itself when that one is gone."""
    Rank(start, on_lost=_exit).run()


class WorkMeter:
    """Counts what a rank does. One thread uses it."""

    def __init__(self) -> None:
        self._num_steps = 0
        self._compute_s = 0.0
        self._wait_s = 0.0
        self._told_s = 0.0

    def add(self, compute_s: float, wait_s: float) -> None:
        """A step more."""
        self._num_steps += 1
        self._compute_s += compute_s
        self._wait_s += wait_s

    def due(self) -> Worked | None:
        """What to tell the coordinator now, at most every WORK_PERIOD_S."""
        now = time.monotonic()
        if now - self._told_s < WORK_PERIOD_S:
            return None
        self._told_s = now
        return Worked(self._num_steps, self._compute_s, self._wait_s)


class Rank:
    """One rank of a group, from hello to its end."""

    def __init__(self, start: RankStart, on_lost: Callable[[str], None], make_worker: MakeWorker = Worker) -> None:
        """`on_lost` is called, from a thread, when the coordinator has been silent for too long."""
        self._start = start
        self._on_lost = on_lost
        self._make_worker = make_worker
        self._context = zmq.Context()
        self._is_stopped = threading.Event()
        self._launched: queue.SimpleQueue[tuple[Pending, float] | None] = queue.SimpleQueue()
        self._num_steps = 0
        self._work = WorkMeter()
        self._host = _address_towards(start.address)
        # Hosts of a cluster may share a name; an address is their own.
        self._node = socket.gethostname() if self._host == "127.0.0.1" else self._host

    def run(self) -> None:
        """Returns after `stop`."""
        with self._connect("plans") as plans:
            self._plans = plans
            threads: list[threading.Thread] = []
            try:
                self._say(Hello(self._node, os.getpid()))
                welcome = self._hear(Welcome)
                threads.append(_thread(self._beat, welcome.heartbeat_timeout_s))
                worker = self._set_up(welcome)
                threads.append(_thread(self._answer))
                self._carry_out_plans(worker)
            except StoppedError:
                pass
            except Exception as error:
                self._report(plans, error)
            self._is_stopped.wait()  # a rank that failed stays, so that its peers do not fail for that: all are killed
            self._launched.put(None)
            for thread in threads:
                thread.join()
        self._context.term()

    def stop(self) -> None:
        """End `run` soon. Callable from any thread."""
        self._is_stopped.set()

    def _set_up(self, welcome: Welcome) -> RankWorker:
        # Rank 0 opens the place where all meet; it must outlive the meeting.
        self._store = open_store(self._host) if self._start.rank == 0 else None
        self._say(Found(detect_machine(welcome.device), self._host, self._store.port if self._store else 0))
        configure = self._hear(Configure)
        config = configure.config
        topology = Topology.of_rank(self._start.rank, config)
        self._is_answering = topology.is_last_stage and topology.tensor_rank == 0
        self._is_device_async = config.device == "cuda"
        store = join_store(configure.store_host, configure.store_port)
        # The coordinator's own deadline comes first: it says who is late.
        collectives, links = connect(topology, config, store, self._host, 2 * config.step_timeout_s)
        self._links = TimedLinks(links)
        worker = self._make_worker(config, topology, collectives, self._links, ranks_on_host=configure.ranks_on_host)
        worker.load(lambda what, done, total: self._say(Loading(done, total)))
        self._say(Loaded(worker.num_blocks_possible()))
        kv_bytes = worker.allocate(self._hear(Allocate).num_blocks)
        self._say(Ready(worker.info(kv_bytes, self._node)))
        return worker

    def _carry_out_plans(self, worker: RankWorker) -> None:
        known: deque[StepPlan] = deque()
        while True:
            while not known or self._plans.poll(0):
                known.append(self._hear(Step).plan)
                worker.expect(known[-1])
            start, waited_s = time.perf_counter(), self._links.waited_s
            pending = worker.launch(known.popleft())
            self._num_steps += 1
            if not self._is_device_async:
                waited_s = self._links.waited_s - waited_s
                self._work.add(time.perf_counter() - start - waited_s, waited_s)
                self._tell_work(self._plans)
            if self._is_answering:
                self._launched.put((pending, start))

    def _answer(self) -> None:
        with self._connect("results") as results:
            try:
                ended = 0.0
                while (launched := self._launched.get()) is not None:
                    pending, start = launched
                    results.send(encode(Stepped(pending.wait())))
                    if self._is_device_async:  # of the ranks of such devices, only this one learns when a step is over
                        start, ended = max(start, ended), time.perf_counter()
                        self._work.add(ended - start, 0.0)
                        self._tell_work(results)
            except Exception as error:
                self._report(results, error)
                self._is_stopped.wait()  # a socket that closes takes what it has not sent with it

    def _tell_work(self, connection: zmq.Socket[bytes]) -> None:
        if (message := self._work.due()) is not None:
            connection.send(encode(message))

    def _beat(self, timeout_s: float) -> None:
        with self._connect("beats") as beats:
            heard_s = time.monotonic()
            while not self._is_stopped.is_set():
                with contextlib.suppress(zmq.Again):
                    beats.send(encode(Beat(self._num_steps)), zmq.DONTWAIT)
                self._is_stopped.wait(timeout_s / BEATS_PER_TIMEOUT)
                while beats.poll(0):
                    beats.recv()
                    heard_s = time.monotonic()
                if time.monotonic() - heard_s > timeout_s:
                    self._is_stopped.set()
                    self._on_lost(f"rank {self._start.rank}: the coordinator has been silent for {timeout_s:g} s")

    # -- messages ----------------------------------------------------------------------------------------------

    def _connect(self, purpose: Purpose) -> zmq.Socket[bytes]:
        connection: zmq.Socket[bytes] = self._context.socket(zmq.DEALER)
        connection.setsockopt(zmq.ROUTING_ID, socket_name(self._start.key, self._start.rank, purpose))
        connection.setsockopt(zmq.LINGER, 0)
        connection.setsockopt(zmq.RCVTIMEO, int(POLL_S * 1e3))
        connection.connect(self._start.address)
        return connection

    def _say(self, message: FromRank) -> None:
        self._plans.send(encode(message))

    def _hear(self, kind: type[_Answer]) -> _Answer:
        while not self._is_stopped.is_set():
            try:
                message = decode_to_rank(self._plans.recv())
            except zmq.Again:
                continue
            if self._is_stopped.is_set():
                break
            assert isinstance(message, kind), f"{message} instead of {kind.__name__}"
            return message
        raise StoppedError

    def _report(self, connection: zmq.Socket[bytes], error: Exception) -> None:
        if self._is_stopped.is_set():
            return
        if isinstance(error, ConfigError):
            connection.send(encode(Failed(str(error), error.field)))
        else:
            log.error("rank %d failed", self._start.rank, exc_info=error)
            connection.send(encode(Failed(f"{type(error).__name__}: {error}")))


def _thread(run: Callable[..., None], *arguments: float) -> threading.Thread:
    thread = threading.Thread(target=run, args=arguments, daemon=True)
    thread.start()
    return thread


def _address_towards(address: str) -> str:
    """This host's own address on the way to "tcp://host:port"."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((urlsplit(address).hostname, 1))  # sends nothing: a UDP connect only picks the route
        return str(probe.getsockname()[0])


def _exit(reason: str) -> None:
    """End this process now: nothing of it is worth waiting for."""
    with contextlib.suppress(OSError):  # who read this may be gone too
        print(reason, file=sys.stderr, flush=True)
    os._exit(1)


def _follow(parent: int) -> None:
    """End with the process that holds the other end of this pipe, whatever ended it."""
    while os.read(parent, 1):
        pass
    _exit("the coordinator's process has ended")


def run_process(make_worker: MakeWorker = Worker) -> None:
    """What a process that engine/group/processes.py started does: be the rank that standard input describes."""
    line = sys.stdin.readline()
    threading.Thread(target=_follow, args=(sys.stdin.fileno(),), daemon=True).start()
    Rank(msgspec.json.decode(line, type=RankStart), on_lost=_exit, make_worker=make_worker).run()


if __name__ == "__main__":
    run_process()
