"""Cost of a step's messages: a plan out to every rank, no work, a result back from the last one.

    python bench/messages.py [--quick]

The same plan and result, encoded the same way, over every path that could carry them, and through Shoal's own executor
with all that it does besides. The goal is a median of at most 500 µs for two ranks of one host.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from multiprocessing.connection import Connection
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from typing import Any

import machine
import ray
import torch
import zmq
from ray.dag import InputNode, MultiOutputNode

from shoal.cluster.config import EMBEDDED_MODEL, locate_model
from shoal.engine.config import EngineConfig, EngineOptions
from shoal.engine.executor import RankInfo
from shoal.engine.group.coordinator import open_group
from shoal.engine.group.messages import Step, Stepped, decode_from_rank, decode_to_rank, encode
from shoal.engine.group.processes import ProcessLauncher
from shoal.engine.group.rank import run_process
from shoal.engine.parallel.collectives import Collectives
from shoal.engine.parallel.pipeline import StageLinks
from shoal.engine.parallel.process_group import ProcessGroup, join_store, open_process_group, open_store
from shoal.engine.parallel.topology import Topology
from shoal.engine.plan import ContinuedRequest, StepPlan, StepResult
from shoal.engine.request import BlockId, RequestId

HOST = "127.0.0.1"
RANK_COUNTS = (1, 2, 4)
REQUEST_COUNTS = (1, 32)
GOAL_US = 500
WARM_UP = 50
ROOM = 1 << 14  # bytes for a message where room must be made before
SPINS = 200  # looks at shared memory before the reader sleeps
NAP_S = 20e-6
BE_RANK = "--be-rank"

RunStep = Callable[[StepPlan], StepResult]
Carry = Callable[[bytes], bytes]  # a plan out, a result back
_spawn = multiprocessing.get_context("spawn")


def a_plan(num_requests: int) -> StepPlan:
    """A decode step; every request begins a block."""
    entries = (
        ContinuedRequest(RequestId(f"request-{i}"), 1000, 1, (i,), (BlockId(i + 1),)) for i in range(num_requests)
    )
    return StepPlan(7, continued=tuple(entries), num_tokens=num_requests)


def answer_to(plan: StepPlan) -> StepResult:
    return StepResult(plan.step, {entry.request_id: (1,) for entry in plan.continued})


def reply(data: bytes) -> bytes:
    """What a rank makes of a message."""
    step = decode_to_rank(data)
    assert isinstance(step, Step)
    return encode(Stepped(answer_to(step.plan)))


def through(carry: Carry) -> RunStep:
    def run(plan: StepPlan) -> StepResult:
        stepped = decode_from_rank(carry(encode(Step(plan))))
        assert isinstance(stepped, Stepped)
        return stepped.result

    return run


@contextmanager
def processes(target: Callable[..., None], arguments: list[tuple[Any, ...]]) -> Iterator[None]:
    """Fresh processes, killed afterwards."""
    started = [_spawn.Process(target=target, args=each, daemon=True) for each in arguments]
    for process in started:
        process.start()
    try:
        yield
    finally:
        for process in started:
            process.kill()
        for process in started:
            process.join()


# -- Shoal ----------------------------------------------------------------------------------------------------


class IdleWorker:
    """A rank that holds nothing and answers at once."""

    def __init__(
        self,
        config: EngineConfig,
        topology: Topology,
        collectives: Collectives,
        links: StageLinks,
        *,
        ranks_on_host: int,
    ) -> None:
        self._topology = topology

    def load(self, progress: Callable[[str, int, int], None]) -> None:
        pass

    def num_blocks_possible(self) -> int:
        return 1000

    def allocate(self, num_blocks: int) -> int:
        return 0

    def info(self, kv_bytes: int, node: str) -> RankInfo:
        return RankInfo(self._topology.stage, self._topology.tensor_rank, HOST, 0, "none", 0, 0, 0, 0)

    def expect(self, plan: StepPlan) -> None:
        pass

    def launch(self, plan: StepPlan) -> _Done:
        return _Done(answer_to(plan))


class _Done:
    def __init__(self, result: StepResult) -> None:
        self._result = result

    def wait(self) -> StepResult:
        return self._result


@contextmanager
def shoal(num_ranks: int) -> Iterator[RunStep]:
    options = EngineOptions(str(locate_model(EMBEDDED_MODEL)), device="cpu", pipeline_parallel=num_ranks, num_threads=1)
    launcher = ProcessLauncher((__file__, BE_RANK))
    with contextlib.closing(open_group(options, launcher, lambda what, done, total: None)[1]) as executor:
        executor.start()

        def run(plan: StepPlan) -> StepResult:
            executor.submit(plan)
            return executor.collect()

        yield run


# -- ZeroMQ ---------------------------------------------------------------------------------------------------


def zeromq_rank(address: str, rank: int, is_last: bool) -> None:
    connection = zmq.Context().socket(zmq.DEALER)
    connection.setsockopt(zmq.ROUTING_ID, b"rank-%d" % rank)
    connection.connect(address)
    connection.send(b"")
    while True:
        answer = reply(connection.recv())
        if is_last:
            connection.send(answer)


@contextmanager
def zeromq(num_ranks: int, bind: str) -> Iterator[RunStep]:
    with zmq.Context() as context, context.socket(zmq.ROUTER) as router:
        router.setsockopt(zmq.LINGER, 0)
        router.bind(bind)
        address = router.getsockopt_string(zmq.LAST_ENDPOINT)
        arguments = [(address, rank, rank == num_ranks - 1) for rank in range(num_ranks)]
        with processes(zeromq_rank, arguments):
            names = [router.recv_multipart()[0] for _ in range(num_ranks)]

            def carry(data: bytes) -> bytes:
                for name in names:
                    router.send_multipart([name, data])
                answer: bytes = router.recv_multipart()[1]
                return answer

            yield through(carry)


@contextmanager
def zeromq_tcp(num_ranks: int) -> Iterator[RunStep]:
    with zeromq(num_ranks, f"tcp://{HOST}:*") as run:
        yield run


@contextmanager
def zeromq_ipc(num_ranks: int) -> Iterator[RunStep]:
    with tempfile.TemporaryDirectory() as folder, zeromq(num_ranks, f"ipc://{folder}/socket") as run:
        yield run


# -- pipes and shared memory ----------------------------------------------------------------------------------


def pipe_rank(connection: Connection, is_last: bool) -> None:
    while True:
        answer = reply(connection.recv_bytes())
        if is_last:
            connection.send_bytes(answer)


@contextmanager
def pipes(num_ranks: int) -> Iterator[RunStep]:
    ends = [_spawn.Pipe() for _ in range(num_ranks)]
    arguments = [(theirs, rank == num_ranks - 1) for rank, (_, theirs) in enumerate(ends)]
    with processes(pipe_rank, arguments):

        def carry(data: bytes) -> bytes:
            for ours, _ in ends:
                ours.send_bytes(data)
            return ends[-1][0].recv_bytes()

        yield through(carry)


class Mailbox:
    """One message in shared memory: its number, its length, its bytes. The number is written last."""

    def __init__(self, name: str | None = None) -> None:
        self._memory = SharedMemory(name, create=name is None, size=ROOM)
        assert self._memory.buf is not None
        self._bytes = self._memory.buf
        self._counters = self._bytes[:16].cast("q")  # number, length
        self._number = 0

    @property
    def name(self) -> str:
        return self._memory.name

    def remove(self) -> None:
        self._counters.release()
        self._bytes.release()
        self._memory.close()
        self._memory.unlink()

    def put(self, data: bytes) -> None:
        self._bytes[16 : 16 + len(data)] = data
        self._counters[1] = len(data)
        self._number += 1
        self._counters[0] = self._number

    def take(self) -> bytes:
        self._number += 1
        looks = 0
        while self._counters[0] != self._number:
            looks += 1
            if looks > SPINS:
                time.sleep(NAP_S)
        return bytes(self._bytes[16 : 16 + self._counters[1]])


def shared_memory_rank(plans_name: str, results_name: str) -> None:
    plans, results = Mailbox(plans_name), Mailbox(results_name)
    while True:
        results.put(reply(plans.take()))


@contextmanager
def shared_memory(num_ranks: int) -> Iterator[RunStep]:
    plans, results = Mailbox(), [Mailbox() for _ in range(num_ranks)]
    with processes(shared_memory_rank, [(plans.name, each.name) for each in results]):

        def carry(data: bytes) -> bytes:
            plans.put(data)
            # All answer, as a plan must not be written over before everyone has read it.
            return [each.take() for each in results][-1]

        yield through(carry)
    for mailbox in (plans, *results):
        mailbox.remove()


# -- gloo -----------------------------------------------------------------------------------------------------


def gloo_member(port: int, member: int, size: int) -> ProcessGroup:
    torch.set_num_threads(1)
    return open_process_group("cpu", join_store(HOST, port), member, size, HOST, 60.0)


def packed(data: bytes) -> torch.Tensor:
    """[ROOM] uint8: the message behind its length."""
    room = torch.zeros(ROOM, dtype=torch.uint8)
    framed = len(data).to_bytes(4, "little") + data
    room[: len(framed)] = torch.frombuffer(bytearray(framed), dtype=torch.uint8)
    return room


def unpacked(room: torch.Tensor) -> bytes:
    framed = room.numpy().tobytes()
    return framed[4 : 4 + int.from_bytes(framed[:4], "little")]


def gloo_rank(port: int, member: int, size: int) -> None:
    group = gloo_member(port, member, size)
    room = torch.zeros(ROOM, dtype=torch.uint8)
    while True:
        group.broadcast(room, 0).wait()
        answer = reply(unpacked(room))
        if member == size - 1:
            group.send([packed(answer)], 0, 0).wait()


@contextmanager
def gloo(num_ranks: int) -> Iterator[RunStep]:
    store = open_store(HOST)
    size = num_ranks + 1
    with processes(gloo_rank, [(store.port, member, size) for member in range(1, size)]):
        group = gloo_member(store.port, 0, size)
        room = torch.zeros(ROOM, dtype=torch.uint8)

        def carry(data: bytes) -> bytes:
            group.broadcast(packed(data), 0).wait()
            group.recv([room], num_ranks, 0).wait()
            return unpacked(room)

        yield through(carry)


# -- Ray ------------------------------------------------------------------------------------------------------


class RayRank:
    def step(self, data: bytes) -> bytes:
        return reply(data)


@contextmanager
def ray_actors(num_ranks: int) -> Iterator[list[Any]]:
    ray.init("local", num_cpus=num_ranks, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    try:
        actors = [ray.remote(RayRank).remote() for _ in range(num_ranks)]
        ray.get([actor.step.remote(encode(Step(a_plan(1)))) for actor in actors])  # they are up
        yield actors
    finally:
        ray.shutdown()


@contextmanager
def ray_calls(num_ranks: int) -> Iterator[RunStep]:
    with ray_actors(num_ranks) as actors:

        def carry(data: bytes) -> bytes:
            answer: bytes = ray.get([actor.step.remote(data) for actor in actors])[-1]
            return answer

        yield through(carry)


@contextmanager
def ray_compiled_graph(num_ranks: int) -> Iterator[RunStep]:
    with ray_actors(num_ranks) as actors:
        with InputNode() as data_in:
            graph = MultiOutputNode([actor.step.bind(data_in) for actor in actors]).experimental_compile()

        def carry(data: bytes) -> bytes:
            answer: bytes = ray.get(graph.execute(data))[-1]
            return answer

        try:
            yield through(carry)
        finally:
            graph.teardown()


# -- measuring ------------------------------------------------------------------------------------------------

PATHS: Mapping[str, Callable[[int], AbstractContextManager[RunStep]]] = {
    "shoal": shoal,
    "zeromq_tcp": zeromq_tcp,
    "zeromq_ipc": zeromq_ipc,
    "shared_memory": shared_memory,
    "pipes": pipes,
    "gloo": gloo,
    "ray_compiled_graph": ray_compiled_graph,
    "ray_calls": ray_calls,
}


def measure(run: RunStep, num_requests: int, repeats: int) -> dict[str, float]:
    """Microseconds of a step: median and 99th percentile."""
    plan = a_plan(num_requests)
    expected = answer_to(plan)
    times_us = []
    for _ in range(WARM_UP + repeats):
        start = time.perf_counter()
        result = run(plan)
        times_us.append((time.perf_counter() - start) * 1e6)
        assert result == expected
    cuts = statistics.quantiles(times_us[WARM_UP:], n=100)
    return {"median_us": round(cuts[49], 1), "p99_us": round(cuts[98], 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few steps, which only show that the script works")
    parser.add_argument("--paths", nargs="+", choices=PATHS, default=list(PATHS), help="default: all")
    parser.add_argument("--results", type=Path, default=machine.RESULTS, help="folder (default: %(default)s)")
    given = parser.parse_args()
    repeats = 100 if given.quick else 1000
    result: dict[str, Any] = {"machine": machine.facts(threads=1), "steps": repeats}
    print(
        f"{'µs: median / 99th percentile':20}" + "".join(f"{n:>9} ranks" for n in RANK_COUNTS for _ in REQUEST_COUNTS)
    )
    for name in given.paths:
        result[name] = {}
        for num_ranks in RANK_COUNTS:
            with PATHS[name](num_ranks) as run:
                result[name][f"ranks_{num_ranks}"] = {
                    f"requests_{count}": measure(run, count, repeats) for count in REQUEST_COUNTS
                }
        cells = [cell for by_count in result[name].values() for cell in by_count.values()]
        print(f"{name:20}" + "".join(f"{c['median_us']:>8.0f}/{c['p99_us']:<6.0f}" for c in cells), flush=True)
        machine.write_result(given.results, "messages", result)


if __name__ == "__main__":
    if BE_RANK in sys.argv:
        run_process(IdleWorker)
    else:
        main()
