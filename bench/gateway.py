"""The gateway alone: tokens a second that it streams from a replica whose engine answers at once.

    python bench/gateway.py [--repeats 5] [--quick]

The gateway, HAProxy and the token channel are the real ones, before a replica whose ranks draw a token at once, or
every PACE_S. Beside them, on the same Ray and in turn, what Ray Serve has for it: an ingress that passes on what a
generator of another deployment yields, or its own. Counted is the processor time of the process that streams.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import socket
import statistics
import time
from collections import deque
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any, Final, NamedTuple

import machine
import serving

from shoal.cluster.commands.serve import own_environment
from shoal.cluster.config import EMBEDDED_MODEL, ClusterConfig, HttpSettings, ModelSettings, parse_config

# Read by ray.serve when it is imported, here and in every process that Ray starts.
os.environ.update(own_environment(HttpSettings().header_timeout))

import ray
from fastapi import FastAPI
from ray import serve
from ray.serve.handle import DeploymentHandle
from starlette.responses import StreamingResponse

from shoal.cluster.app import build_app
from shoal.cluster.channel import local_ip
from shoal.cluster.commands.processes import adopt_orphans, end_descendants
from shoal.cluster.commands.serve import EXIT_WAIT_S, start_ray
from shoal.cluster.replica.deployment import Replica
from shoal.cluster.replica.placement import Resources
from shoal.engine.config import EngineConfig
from shoal.engine.executor import EngineFactory, ExecutorInfo, Progress, RankInfo
from shoal.engine.plan import StepPlan, StepResult
from shoal.engine.request import RequestId
from shoal.engine.worker import resolve_options

STREAM_COUNTS: Final = (32, 128)
NUM_STREAMED: Final = 256  # tokens of each stream
PACE_S: Final = 0.02  # of a step of 50 Hz, such as a good GPU makes
PACES: Final = {"instant": 0.0, "paced": PACE_S}  # seconds a step, by model
FIRST_TOKEN, NUM_TOKENS = 1000, 1000  # whole words, so that each makes an event


# -- a replica whose ranks have nothing to do --------------------------------------------------------------------


class InstantExecutor:
    """Ranks that draw a token for whoever wants one, `pace_s` after the one before."""

    def __init__(self, config: EngineConfig, pace_s: float) -> None:
        self._config = config
        self._pace_s = pace_s
        self._num_known: dict[RequestId, int] = {}  # tokens
        self._in_flight: deque[StepPlan] = deque()
        self._due_s = 0.0

    def start(self) -> ExecutorInfo:
        num_layers = self._config.model.num_layers
        rank = RankInfo(0, 0, socket.gethostname(), os.getpid(), "none", 0, num_layers, 0, 0)
        assert self._config.num_blocks is not None
        return ExecutorInfo(self._config.num_blocks, (rank,))

    def submit(self, plan: StepPlan) -> None:
        self._in_flight.append(plan)

    def collect(self) -> StepResult:
        plan = self._in_flight.popleft()
        for request_id in plan.finished:
            del self._num_known[request_id]
        drawn: dict[RequestId, tuple[int, ...]] = {}
        for new in plan.new:
            self._num_known[new.request_id] = len(new.token_ids)
            self._draw(new.request_id, new.num_computed + new.num_new, drawn)
        for entry in plan.continued:
            self._num_known[entry.request_id] += len(entry.new_token_ids) + entry.num_pending
            self._draw(entry.request_id, entry.num_computed + entry.num_new, drawn)
        self._due_s = max(self._due_s + self._pace_s, time.monotonic())
        time.sleep(max(0.0, self._due_s - time.monotonic()))
        return StepResult(plan.step, drawn)

    def _draw(self, request_id: RequestId, num_computed: int, drawn: dict[RequestId, tuple[int, ...]]) -> None:
        if num_computed == self._num_known[request_id]:
            drawn[request_id] = (FIRST_TOKEN + num_computed % NUM_TOKENS,)

    def check(self) -> None:
        pass

    def close(self) -> None:
        self._in_flight.clear()


class InstantReplica(Replica):
    """A real replica, but for its ranks."""

    @staticmethod
    def engine_factory(model: ModelSettings, path: str, rank_resources: Resources, label: str) -> EngineFactory:
        def make(progress: Progress) -> tuple[EngineConfig, InstantExecutor]:
            config = dataclasses.replace(resolve_options(model.options(path)), num_blocks=4096)
            return config, InstantExecutor(config, PACES[model.name])

        return make


def instant_config(port: int) -> ClusterConfig:
    engine = {"dtype": "bfloat16", "max_running_requests": 256, "max_step_tokens": 2**15, "num_threads": 1}
    models = [{"name": name, "model": EMBEDDED_MODEL, "engine": engine} for name in PACES]
    http = {"host": serving.HOST, "port": port}
    admin = {"host": serving.HOST, "port": serving.free_port()}
    return parse_config({"models": models, "http": http, "admin": admin}, source="bench")


# -- Ray Serve's own way to stream -------------------------------------------------------------------------------

_plain = FastAPI()


class Source:
    """Yields tokens at once, as chunks of text completions."""

    async def stream(self, count: int) -> AsyncIterator[str]:
        for number in range(count):
            choice = {"index": 0, "text": f" token{number}", "logprobs": None, "finish_reason": None}
            yield json.dumps({"id": "cmpl-1", "object": "text_completion", "model": "plain", "choices": [choice]})


@serve.ingress(_plain)
class PlainGateway:
    def __init__(self, source: DeploymentHandle[Source]) -> None:
        self._source = source.options(stream=True)
        self._own = Source()

    @_plain.post("/replica/{count}")
    async def relay(self, count: int) -> StreamingResponse:
        """What another deployment yields."""
        return StreamingResponse(self._events(self._source.stream.remote(count)), media_type="text/event-stream")

    @_plain.post("/own/{count}")
    async def make(self, count: int) -> StreamingResponse:
        """What this process yields."""
        return StreamingResponse(self._events(self._own.stream(count)), media_type="text/event-stream")

    async def _events(self, chunks: AsyncIterator[str]) -> AsyncIterator[str]:
        async for chunk in chunks:
            yield f"data: {chunk}\n\n"
        yield "data: [DONE]\n\n"


# -- the gateway alone -------------------------------------------------------------------------------------------


class Front(NamedTuple):
    """A way to stream: how it is asked, and whose processor time counts (the title of the process)."""

    request: bytes
    process: str


def fronts(port: int, num_new: int) -> dict[str, Front]:
    shoal = {"prompt": list(range(1000, 1128)), "max_tokens": num_new, "temperature": 0, "ignore_eos": True}

    def completion(model: str) -> Front:
        body = {**shoal, "model": model, "stream": True}
        return Front(serving.request_bytes(port, "/v1/completions", body), "ServeReplica:shoal:gateway")

    def plain(path: str) -> Front:
        return Front(serving.request_bytes(port, f"/plain/{path}/{num_new}", {}), "ServeReplica:plain:PlainGateway")

    return {
        "shoal": completion("instant"),
        "shoal_paced": completion("paced"),
        "ray_serve": plain("replica"),
        "ray_serve_one_process": plain("own"),
    }


@contextlib.contextmanager
def gateways() -> Iterator[int]:
    """Both, on a Ray of this process: the port."""
    config = instant_config(serving.free_port())
    adopt_orphans()
    start_ray(config, is_verbose=False)
    try:
        serve.start(http_options={"host": serving.HOST, "port": config.http.port})
        app = build_app(config, own_ip=local_ip(), replica=InstantReplica)
        serve.run(app, name="shoal", route_prefix="/")
        source = serve.deployment(Source, max_ongoing_requests=1000, ray_actor_options={"num_cpus": 0})
        front = serve.deployment(PlainGateway, max_ongoing_requests=1000, ray_actor_options={"num_cpus": 0})
        serve.run(front.bind(source.bind()), name="plain", route_prefix="/plain")
        yield config.http.port
    finally:
        serve.shutdown()
        ray.shutdown()
        end_descendants(EXIT_WAIT_S)


def measure_gateways(repeats: int, counts: Sequence[int], num_new: int) -> dict[str, Any]:
    """Tokens per second of wall-clock and of processor time, for each way to stream and number of streams."""
    with gateways() as port:
        ways = fronts(port, num_new)
        seen: dict[tuple[str, int], list[tuple[float, float, float]]] = {}
        for repeat in range(-1, repeats):  # the first round warms up
            for count in counts:
                for name, front in ways.items():
                    seconds, cpu_s, haproxy_s = _stream_once(port, front, count, num_new)
                    if repeat >= 0:
                        seen.setdefault((name, count), []).append((seconds, cpu_s, haproxy_s))
            print(f"  gateways, {max(repeat + 1, 0)}/{repeats}", flush=True)
    result: dict[str, Any] = {}
    for (name, count), rounds in seen.items():
        num_tokens = count * num_new
        seconds, cpu_s, haproxy_s = (statistics.median(values) for values in zip(*rounds, strict=True))
        cpu_s = max(cpu_s, 1 / machine.TICKS)  # finer times are not told
        result.setdefault(name, {})[f"streams_{count}"] = {
            "tokens_per_s": num_tokens / seconds,
            "tokens_per_cpu_s": num_tokens / cpu_s,
            "cpu_us_per_token": 1e6 * cpu_s / num_tokens,
            "haproxy_us_per_token": 1e6 * haproxy_s / num_tokens,
            "rounds": [{"seconds": r[0], "cpu_s": r[1], "haproxy_s": r[2]} for r in rounds],
        }
    return result


def _stream_once(port: int, front: Front, count: int, num_new: int) -> tuple[float, float, float]:
    """Wall-clock seconds, and processor seconds of the front and of HAProxy."""
    before = machine.processor_seconds(front.process), machine.processor_seconds("haproxy")
    seconds, answers = serving.run(serving.stream(port, [front.request] * count))
    after = machine.processor_seconds(front.process), machine.processor_seconds("haproxy")
    wrong = [len(answer.events) for answer in answers if len(answer.events) != num_new]
    assert not wrong, f"{len(wrong)} of {count} streams have not {num_new} events but {wrong[:5]}"
    return seconds, after[0] - before[0], after[1] - before[1]


def main() -> None:
    given = machine.options(__doc__)
    counts, num_new = ((4,), 8) if given.quick else (STREAM_COUNTS, NUM_STREAMED)
    result = {
        "machine": machine.facts(given.threads),
        "repeats": given.workload.repeats,
        "num_new": num_new,
        "pace_s": PACE_S,
        **measure_gateways(given.workload.repeats, counts, num_new),
    }
    print(machine.write_result(given.results, "gateway", result))


if __name__ == "__main__":
    main()
