"""A real cluster of small replicas with and without prefix-aware routing, and what the simulator says of the same runs.

    python bench/routing_cluster.py [--repeats 3] [--quick]

One `shoal serve` with the model twice: four replicas that take requests in turn (round_robin), four that get those
whose prefix they hold (prefix_aware). One thread and a small KV pool each: four pools together hold all the prefixes,
one alone does not. The two take turns, with the same requests: first clients that ask again as soon as they have their
answer (closed loop), then arrivals at random (open loop), as many a second for both.

The simulator gets the profile that `shoal bench --calibrate` makes of one replica, two figures that are measured here
(what a request spends outside the engine, how many replicas this machine runs at full speed), and the same requests.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import math
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import machine
import yaml
from prometheus_client.parser import text_string_to_metric_families
from serving import HOST, STOP_TIMEOUT_S, ServerError, free_port, wait_until_ready

from shoal.cluster import metrics
from shoal.cluster.config import EMBEDDED_MODEL
from shoal.cluster.routing.policies import make_policy
from shoal.cluster.simulation.profile import HardwareProfile, load_profile
from shoal.cluster.simulation.result import Served
from shoal.cluster.simulation.simulator import Simulation
from shoal.cluster.simulation.trace import Trace, TracedRequest, shared_prefix_trace

POLICIES = ("round_robin", "prefix_aware")
NUM_REPLICAS = 4
BLOCK_SIZE = 16
BLOCK_BYTES = BLOCK_SIZE * 30 * 2 * 3 * 64 * 2  # of SmolLM2-135M in bfloat16: layers, K and V, heads, their size
TOKENS = range(100, 48_000)
WARM_S = 10.0  # of simulated time for a request of a warm-up
OPEN_LOAD = 0.7  # of what round robin serves in a closed loop


@dataclass(frozen=True, slots=True)
class Load:
    """The requests of one run, of one policy."""

    num_prefixes: int = 28
    prefix_tokens: int = 40 * BLOCK_SIZE
    question_tokens: int = 24
    output_tokens: int = 8
    num_blocks: int = 300  # KV blocks of a replica: seven prefixes, and what running requests need besides
    num_clients: int = 8
    num_warm: int = 56
    num_requests: int = 56  # of a round
    num_open: int = 40
    num_probes: int = 6
    repeats: int = 3

    def trace(self) -> Trace:
        """All requests of all rounds, those of the warm-up first."""
        return shared_prefix_trace(
            num_requests=self.num_warm + self.repeats * self.num_requests + self.num_open,
            requests_per_s=1.0,
            num_prefixes=self.num_prefixes,
            prefix_tokens=self.prefix_tokens,
            question_tokens=self.question_tokens,
            output_tokens=self.output_tokens,
            block_tokens=BLOCK_SIZE,
        )

    def engine(self) -> dict[str, Any]:
        return {
            "dtype": "bfloat16",
            "num_threads": 1,
            "block_size": BLOCK_SIZE,
            "max_model_len": 1024,
            "kv_memory": self.num_blocks * BLOCK_BYTES,
        }


QUICK = Load(num_clients=4, num_warm=20, num_requests=16, num_open=12, num_probes=2, repeats=1)


class Answer(NamedTuple):
    """One request as its client saw it; seconds of the client's clock, or of the simulated one."""

    sent_s: float
    first_s: float
    last_s: float
    num_prompt: int
    num_cached: int


# -- the cluster -------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def server(load: Load, folder: Path) -> Iterator[tuple[int, int, float]]:
    """`shoal serve` with a model for each policy: its port, its admin port, and the seconds from the command to
    "ready".
    """
    port, admin_port = free_port(), free_port()
    models = [
        {
            "name": policy,
            "model": EMBEDDED_MODEL,
            "replicas": NUM_REPLICAS,
            "routing": policy,
            "engine": load.engine(),
            "resources": {"num_cpus": 0.1},  # more replicas than cores, on purpose
        }
        for policy in POLICIES
    ]
    config = folder / "cluster.yaml"
    ports = {"http": {"host": HOST, "port": port}, "admin": {"host": HOST, "port": admin_port}}
    config.write_text(yaml.safe_dump({"models": models, **ports}))
    with tempfile.TemporaryFile("w+") as log:
        start = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, "-m", "shoal.cluster.cli", "serve", str(config)], stdout=log, stderr=subprocess.STDOUT
        )
        try:
            wait_until_ready(port, process, log.fileno())
            yield port, admin_port, time.perf_counter() - start
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(STOP_TIMEOUT_S)


async def ask(port: int, model: str, prompt: Sequence[int], num_new: int) -> Answer:
    """One streamed completion. The client does little: it shares the cores with what it measures."""
    body = json.dumps(
        {
            "model": model,
            "prompt": prompt,
            "max_tokens": num_new,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
    ).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {HOST}:{port}\r\nContent-Type: application/json\r\n"
    sent_s = time.perf_counter()
    reader, writer = await asyncio.open_connection(HOST, port)
    writer.write(f"{head}Content-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode() + body)
    answer = await reader.readuntil(b"\r\n\r\n")
    if b" 200 " not in answer.partition(b"\r\n")[0]:
        raise ServerError((answer + await reader.read(2000)).decode(errors="replace"))
    await reader.readuntil(b"data: ")
    first_s = time.perf_counter()
    rest = await reader.read()
    last_s = time.perf_counter()
    writer.close()
    usage = _usage(rest)
    assert usage["completion_tokens"] == num_new, usage
    cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0)
    return Answer(sent_s, first_s, last_s, usage["prompt_tokens"], cached)


def _usage(stream: bytes) -> Mapping[str, Any]:
    (line,) = re.findall(rb'^data: (\{.*"usage":\s*\{.*)$', stream, re.MULTILINE)
    usage: Mapping[str, Any] = json.loads(line)["usage"]
    return usage


def prompt_of(request: TracedRequest) -> list[int]:
    """Tokens that are equal wherever block ids are."""
    tokens: list[int] = []
    for block in request.block_ids:
        tokens += random.Random(block).choices(TOKENS, k=BLOCK_SIZE)
    return tokens[: request.num_prompt]


async def closed_loop(port: int, model: str, requests: Sequence[TracedRequest], num_clients: int) -> list[Answer]:
    """Each client sends the next request as soon as its last one is answered."""
    left = iter([(prompt_of(request), request.num_output) for request in requests])
    answers: list[Answer] = []

    async def client() -> None:
        for prompt, num_new in left:
            answers.append(await ask(port, model, prompt, num_new))

    await asyncio.gather(*(client() for _ in range(num_clients)))
    return answers


async def open_loop(port: int, model: str, requests: Sequence[TracedRequest]) -> list[Answer]:
    """Each request at its own time, whatever became of those before."""
    prompts = [prompt_of(request) for request in requests]
    start = asyncio.get_running_loop().time()

    async def client(request: TracedRequest, prompt: Sequence[int]) -> Answer:
        await asyncio.sleep(start + request.arrival_s - asyncio.get_running_loop().time())
        return await ask(port, model, prompt, request.num_output)

    return await asyncio.gather(*(client(*pair) for pair in zip(requests, prompts, strict=True)))


# -- what is reported of a run, real or simulated ------------------------------------------------------------------


def summary(answers: Sequence[Answer], num_clients: int) -> dict[str, float]:
    """Of the requests between the first and the last ones to end: while all clients were at work."""
    ordered = sorted(answers, key=lambda answer: answer.last_s)
    inner = ordered[num_clients:-num_clients]
    seconds = inner[-1].last_s - ordered[num_clients - 1].last_s
    return {
        "hit_rate": sum(a.num_cached for a in inner) / sum(a.num_prompt for a in inner),
        "requests_per_s": len(inner) / seconds,
        "ttft_p50_s": statistics.median(a.first_s - a.sent_s for a in inner),
        "e2e_p50_s": statistics.median(a.last_s - a.sent_s for a in inner),
    }


def medians(rounds: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {name: statistics.median(one[name] for one in rounds) for name in rounds[0]}


# -- the simulator's side ------------------------------------------------------------------------------------------


def calibrated(folder: Path, load: Load) -> HardwareProfile:
    """One replica alone on this machine, as `shoal bench --calibrate` sees it."""
    config, out = folder / "replica.yaml", folder / "profile.yaml"
    config.write_text(yaml.safe_dump({"models": [{"name": "replica", "engine": load.engine()}]}))
    command = [sys.executable, "-m", "shoal.cluster.cli", "bench", str(config), "--calibrate", "--out", str(out)]
    subprocess.run(command, check=True)
    return load_profile(out)


async def probe(port: int, admin_port: int, load: Load) -> dict[str, float]:
    """What the engine's own steps do not tell: the time of a request outside of it, and what replicas cost each other.

    The first is what clients see of the time to the first token beyond what the replicas do, for prompts of usual
    length that are cached; the second from as many clients as replicas, whose prompts share nothing, against one.
    """
    model = "prefix_aware"
    chance = random.Random("probe")
    num_prompt = load.prefix_tokens + 1
    cached = chance.choices(TOKENS, k=num_prompt)
    await ask(port, model, cached, 1)
    num_before, seconds_before = first_tokens(admin_port, model)
    answers = [await ask(port, model, cached, 1) for _ in range(load.num_probes)]
    num_after, seconds_after = first_tokens(admin_port, model)
    assert num_after - num_before == len(answers), "somebody else uses the server"
    outside_s = sum(answer.first_s - answer.sent_s for answer in answers) - (seconds_after - seconds_before)
    rates = {}
    for num_clients in (1, NUM_REPLICAS):
        requests = [
            TracedRequest(
                0.0, num_prompt // 4, load.output_tokens, tuple(chance.sample(range(2**40), num_prompt // 64 + 1))
            )
            for _ in range(num_clients * load.num_probes)
        ]
        answered = await closed_loop(port, model, requests, num_clients)
        rates[num_clients] = len(answered) / (max(a.last_s for a in answered) - min(a.sent_s for a in answered))
    return {
        "request_s": outside_s / len(answers),
        "concurrent_replicas": max(1.0, rates[NUM_REPLICAS] / rates[1]),
    }


def first_tokens(admin_port: int, model: str) -> tuple[float, float]:
    """How many requests have had their first token, and the seconds that took in the replicas, all together."""
    with urllib.request.urlopen(f"http://{HOST}:{admin_port}/metrics", timeout=30) as response:
        families = list(text_string_to_metric_families(response.read().decode()))

    def total(end: str) -> float:
        samples = [sample for family in families for sample in family.samples]
        name = f"{metrics.TTFT.name}_{end}"
        return sum(one.value for one in samples if one.name == name and one.labels.get("model_name") == model)

    return total("count"), total("sum")


def simulated(
    profile: HardwareProfile, policy: str, requests: Sequence[TracedRequest], num_clients: int
) -> list[Answer]:
    """The closed loop over `requests`; answers in the order in which they were asked."""
    left = iter(requests)
    first = [dataclasses.replace(next(left), arrival_s=0.0) for _ in range(num_clients)]

    def next_request(served: Served) -> TracedRequest | None:
        following = next(left, None)
        return None if following is None else dataclasses.replace(following, arrival_s=served.finished_s)

    trace = Trace("closed loop", first, BLOCK_SIZE)
    return _answers(Simulation(trace, profile, make_policy(policy), NUM_REPLICAS, next_request=next_request))


def simulated_open(
    profile: HardwareProfile, policy: str, warm: Sequence[TracedRequest], requests: Sequence[TracedRequest]
) -> list[Answer]:
    """The open loop, behind a warm-up in which one request follows the other."""
    spaced = [dataclasses.replace(request, arrival_s=WARM_S * number) for number, request in enumerate(warm)]
    start = WARM_S * len(warm)
    shifted = [dataclasses.replace(request, arrival_s=start + request.arrival_s) for request in requests]
    trace = Trace("open loop", [*spaced, *shifted], BLOCK_SIZE)
    return _answers(Simulation(trace, profile, make_policy(policy), NUM_REPLICAS))[len(warm) :]


def _answers(simulation: Simulation) -> list[Answer]:
    served = sorted(simulation.run().requests, key=lambda one: one.arrival_s)
    return [
        Answer(one.arrival_s, one.arrival_s + one.ttft_s, one.finished_s, one.num_prompt, one.num_cached)
        for one in served
    ]


# -- both ----------------------------------------------------------------------------------------------------------


def run(load: Load) -> dict[str, Any]:
    """Measure everything; answers what goes into the result file."""
    requests = load.trace().requests
    warm, rest = requests[: load.num_warm], requests[load.num_warm :]
    rounds = [rest[i * load.num_requests : (i + 1) * load.num_requests] for i in range(load.repeats)]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        print("calibrating one replica", flush=True)
        alone = calibrated(folder, load)
        print("starting the cluster", flush=True)
        with server(load, folder) as (port, admin_port, ready_s):
            probed = asyncio.run(probe(port, admin_port, load))
            print(f"  ready after {ready_s:.0f} s; {_listed(probed)}", flush=True)
            measured = _measured(port, load, warm, rounds)
            rate = OPEN_LOAD * measured["round_robin"]["median"]["requests_per_s"]
            arriving = _at_rate(requests[-load.num_open :], rate)
            opened = {policy: _measured_open(port, load, policy, arriving) for policy in POLICIES}
    profile = dataclasses.replace(
        alone, request_s=probed["request_s"], concurrent_replicas=probed["concurrent_replicas"]
    )
    predicted = {policy: _predicted(profile, load, policy, warm, rounds) for policy in POLICIES}
    before = requests[: -load.num_open]
    predicted_open = {
        policy: summary(simulated_open(profile, policy, before, arriving), load.num_clients) for policy in POLICIES
    }
    return {
        "machine": machine.facts(threads=1),
        "model": EMBEDDED_MODEL,
        "dtype": "bfloat16",
        "num_replicas": NUM_REPLICAS,
        "load": dataclasses.asdict(load),
        "profile": dataclasses.asdict(profile),
        "ready_s": ready_s,
        "closed_loop": measured,
        "closed_loop_predicted": predicted,
        "open_loop_requests_per_s": rate,
        "open_loop": opened,
        "open_loop_predicted": predicted_open,
    }


def _measured(
    port: int, load: Load, warm: Sequence[TracedRequest], rounds: Sequence[Sequence[TracedRequest]]
) -> dict[str, Any]:
    for policy in POLICIES:
        asyncio.run(closed_loop(port, policy, warm, load.num_clients))
    seen: dict[str, list[dict[str, float]]] = {policy: [] for policy in POLICIES}
    for requests in rounds:
        for policy in POLICIES:
            answers = asyncio.run(closed_loop(port, policy, requests, load.num_clients))
            seen[policy].append(summary(answers, load.num_clients))
            print(f"  closed loop, {policy:13} {_listed(seen[policy][-1])}", flush=True)
    return {policy: {"rounds": seen[policy], "median": medians(seen[policy])} for policy in POLICIES}


def _predicted(
    profile: HardwareProfile,
    load: Load,
    policy: str,
    warm: Sequence[TracedRequest],
    rounds: Sequence[Sequence[TracedRequest]],
) -> dict[str, Any]:
    """As `_measured`, in one loop without pauses."""
    answers = simulated(profile, policy, [*warm, *(one for requests in rounds for one in requests)], load.num_clients)
    ends = [len(warm) + (number + 1) * load.num_requests for number in range(len(rounds))]
    seen = [summary(answers[end - load.num_requests : end], load.num_clients) for end in ends]
    return {"rounds": seen, "median": medians(seen)}


def _measured_open(port: int, load: Load, policy: str, arriving: Sequence[TracedRequest]) -> dict[str, float]:
    seen = summary(asyncio.run(open_loop(port, policy, arriving)), load.num_clients)
    print(f"  open loop,   {policy:13} {_listed(seen)}", flush=True)
    return seen


def _at_rate(requests: Sequence[TracedRequest], requests_per_s: float) -> list[TracedRequest]:
    """The same requests from time 0 on, so many a second; the trace has one a second."""
    first = requests[0].arrival_s
    return [dataclasses.replace(one, arrival_s=(one.arrival_s - first) / requests_per_s) for one in requests]


def _listed(values: Mapping[str, float]) -> str:
    return "  ".join(f"{name} {value:.3f}" for name, value in values.items())


def lines(result: Mapping[str, Any]) -> Iterator[str]:
    """What came out, against what is wanted."""
    closed = {policy: result["closed_loop"][policy]["median"] for policy in POLICIES}
    ours, theirs = closed["prefix_aware"], closed["round_robin"]
    yield f"hit rate: {ours['hit_rate']:.3f} for {theirs['hit_rate']:.3f}, {_ratio(ours, theirs, 'hit_rate', 3.0)}"
    yield (
        f"requests/s: {ours['requests_per_s']:.2f} for {theirs['requests_per_s']:.2f}, "
        f"{_ratio(ours, theirs, 'requests_per_s', 1.3)}"
    )
    yield f"median TTFT: {ours['ttft_p50_s'] * 1e3:.0f} ms for {theirs['ttft_p50_s'] * 1e3:.0f} ms"
    for kind, seen in (("closed_loop", closed), ("open_loop", result["open_loop"])):
        for policy in POLICIES:
            predicted = result[f"{kind}_predicted"][policy]
            predicted = predicted.get("median", predicted)
            errors = {name: predicted[name] / seen[policy][name] - 1 for name in ("requests_per_s", "ttft_p50_s")}
            verdict = "met" if max(map(abs, errors.values())) <= 0.15 else "MISSED"
            yield (
                f"{kind.replace('_', ' ')}, {policy}: predicted requests/s {errors['requests_per_s']:+.1%}, "
                f"median TTFT {errors['ttft_p50_s']:+.1%} (goal within 15 %: {verdict})"
            )


def _ratio(ours: Mapping[str, float], theirs: Mapping[str, float], name: str, goal: float) -> str:
    ratio = ours[name] / theirs[name] if theirs[name] else math.inf
    return f"{ratio:.2f} x (goal {goal:g}: {'met' if ratio >= goal else 'MISSED'})"


def main() -> None:
    given = machine.options(__doc__)
    load = QUICK if given.quick else Load()
    load = dataclasses.replace(load, repeats=given.repeats or load.repeats)
    result = run(load)
    print(machine.write_result(given.results, "routing_cluster", result))
    print("\n".join(lines(result)))


if __name__ == "__main__":
    main()
