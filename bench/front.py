"""What stands in front of the engine: what it costs, in throughput, in time to the first token, and in start-up.

    python bench/front.py [--repeats 5] [--threads N] [--quick]

1. `shoal serve`, several times: seconds from the command to "ready", and where they go.
2. In the last of these: streams over HTTP against the offline engine at the same work, in turn (as serving.py); and the
   time to the first token of one request at the idle server against that of the offline engine.
3. The gateway alone: the same gateway, HAProxy and token channel before a replica whose ranks answer at once, or every
   PACE_S, against Ray Serve's own way to stream: an ingress that passes on what a generator of another deployment, or
   its own, yields. All in one Ray, in turn. Counted is the processor time of the process that streams.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import socket
import statistics
import time
from collections import deque
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import machine
import serving

from shoal.cluster.commands.serve import own_environment
from shoal.cluster.config import EMBEDDED_MODEL, ClusterConfig, HttpSettings, ModelSettings, locate_model, parse_config

# Read by ray.serve when it is imported.
os.environ.update(own_environment(HttpSettings().header_timeout))

from fastapi import FastAPI
from machine import Workload
from ray import serve
from ray.serve.handle import DeploymentHandle
from starlette.responses import StreamingResponse

from shoal.cluster.replica.deployment import Replica
from shoal.cluster.replica.placement import Resources
from shoal.engine import LLM, SamplingParams
from shoal.engine.config import EngineConfig
from shoal.engine.executor import EngineFactory, ExecutorInfo, Progress, RankInfo
from shoal.engine.plan import StepPlan, StepResult
from shoal.engine.request import RequestId

STREAM_COUNTS: Final = (32, 128)
NUM_STREAMED: Final = 256  # tokens of each stream of the gateway's
NUM_FIRST: Final = 25  # requests, of which the time to the first token is measured
NUM_STARTS: Final = 3
PACE_S: Final = 0.02  # of a step of 50 Hz, such as a good GPU makes
PACES: Final = {"instant": 0.0, "paced": PACE_S}  # seconds a step, by model
FIRST_TOKEN, NUM_TOKENS = 1000, 1000  # whole words, so that each makes an event
TICKS: Final = os.sysconf("SC_CLK_TCK")


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
        from shoal.engine.worker import resolve_options

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
    import ray

    from shoal.cluster.app import build_app
    from shoal.cluster.channel import local_ip
    from shoal.cluster.commands.processes import adopt_orphans, end_descendants
    from shoal.cluster.commands.serve import EXIT_WAIT_S, start_ray

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
    result: dict[str, Any] = {"num_streamed": num_new, "pace_s": PACE_S}
    for (name, count), rounds in seen.items():
        num_tokens = count * num_new
        seconds, cpu_s, haproxy_s = (statistics.median(values) for values in zip(*rounds, strict=True))
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
    before = processor_seconds(front.process), processor_seconds("haproxy")
    seconds, answers = serving.run(serving.stream(port, [front.request] * count))
    after = processor_seconds(front.process), processor_seconds("haproxy")
    wrong = [len(answer.events) for answer in answers if len(answer.events) != num_new]
    assert not wrong, f"{len(wrong)} of {count} streams have not {num_new} events but {wrong[:5]}"
    return seconds, after[0] - before[0], after[1] - before[1]


def processor_seconds(title: str) -> float:
    """User and system time of all processes of this name, or that Ray has given this title."""
    found: list[int] = []  # ticks
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # gone meanwhile
            name, _, rest = (folder / "stat").read_text().partition("(")[2].rpartition(")")
            if name == title or title in (folder / "cmdline").read_bytes().decode(errors="replace").split("\0")[0]:
                found += [int(ticks) for ticks in rest.split()[11:13]]
    assert found, f"no process is called {title}"
    return sum(found) / TICKS


# -- the whole server --------------------------------------------------------------------------------------------


def phases(served: serving.Served) -> dict[str, float]:
    """Where the seconds of a start went, of what `shoal serve` says while it starts."""
    told = [(float(s), what) for s, what in re.findall(r"^ +([\d.]+) s  (.*)$", served.output, re.MULTILINE)]
    ray_s, deploy_s = told[0][0], told[1][0]
    loading = [seconds for seconds, what in told if "loading weights" in what]
    (inside,) = re.findall(r"ready after ([\d.]+) s", served.output)
    own_s = served.ready_s - float(inside)
    return {
        "command": own_s + ray_s,  # Python, imports, checks
        "ray": deploy_s - ray_s,
        "processes": loading[0] - deploy_s,  # Serve, and a replica with its imports
        "weights": loading[-1] - loading[0],
        "gateway": float(inside) - loading[-1],
        "ready": served.ready_s,
    }


def time_to_first(llm: LLM, port: int, num_prompt: int, count: int) -> dict[str, Any]:
    """One request at a time, over HTTP and offline in turn. Seconds."""
    params = SamplingParams(max_tokens=1, temperature=0, ignore_eos=True)
    http, offline = [], []
    for prompts in (Workload().prompts(1, num_prompt, seed=number) for number in range(-3, count)):
        _, (answer,) = serving.wave(port, prompts, num_new=2)
        start = time.perf_counter()
        llm.generate(prompts, params, use_tqdm=False)
        offline.append(time.perf_counter() - start)
        http.append(answer.first_s)
    http_s, offline_s = statistics.median(http[3:]), statistics.median(offline[3:])
    return {"http_s": http_s, "offline_s": offline_s, "added_s": http_s - offline_s, "http": http, "offline": offline}


def measure_server(workload: Workload, threads: int, *, num_starts: int, num_first: int) -> dict[str, Any]:
    options: dict[str, Any] = {"num_threads": threads, "kv_memory_bytes": serving.KV_BYTES}
    starts = []
    for _ in range(num_starts - 1):
        with serving.server(threads) as served:
            starts.append(phases(served))
        print(f"  ready after {served.ready_s:.1f} s", flush=True)
    with (
        serving.server(threads) as served,
        LLM(locate_model(EMBEDDED_MODEL), dtype="bfloat16", **options) as llm,
    ):
        starts.append(phases(served))
        first = time_to_first(llm, served.port, workload.num_prompt, num_first)
        print(
            f"  first token: http {first['http_s'] * 1e3:.1f} ms, offline {first['offline_s'] * 1e3:.1f} ms", flush=True
        )
        for count in workload.request_counts:
            serving.warm_up(llm, served.port, workload, count)
        streams = {
            f"clients_{count}": serving.measure(llm, served.port, workload, count) for count in workload.request_counts
        }
    median = {name: statistics.median(start[name] for start in starts) for name in starts[0]}
    return {"start_s": median, "starts": starts, "first_token": first, **streams}


def main() -> None:
    given = machine.options(__doc__)
    workload, counts, num_streamed = given.workload, STREAM_COUNTS, NUM_STREAMED
    num_starts, num_first = NUM_STARTS, NUM_FIRST
    if given.quick:
        counts, num_streamed, num_starts, num_first = workload.request_counts, 8, 1, 2
    workload = dataclasses.replace(workload, request_counts=counts)
    result: Mapping[str, Any] = {
        "machine": machine.facts(given.threads),
        "model": EMBEDDED_MODEL,
        "num_prompt": workload.num_prompt,
        "num_new": workload.num_new,
        "repeats": workload.repeats,
        "gateway": measure_gateways(workload.repeats, counts, num_streamed),
        **measure_server(workload, given.threads, num_starts=num_starts, num_first=num_first),
    }
    print(machine.write_result(given.results, "front", result))


if __name__ == "__main__":
    main()
