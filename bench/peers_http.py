"""`shoal serve` and the servers of others at the same streams of /v1/completions, in turn."""

from __future__ import annotations

import contextlib
import json
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import machine
import serving
from machine import Workload
from peers_child import MAX_LENGTH, MAX_REQUESTS
from peers_install import PINNED, Folder
from peers_offline import SEEDS, vllm_environment
from peers_process import Program, num_tries
from serving import HOST, Answer, free_port

from shoal.cluster.config import EMBEDDED_MODEL

RAY_LLM = Path(__file__).parent / "peers_ray_llm.py"
SHOAL, VLLM, LLAMA_SERVER, RAY_SERVE_LLM = "shoal serve", "vllm serve", "llama-server", "Ray Serve LLM"
SETTLE_S = 2.0  # `shoal serve` asks its own address before it says "ready", and ends if it gets no answer
READY_TIMEOUT_S = 300.0
TURN_TIMEOUT_S = 30.0  # until a server that was stopped answers again
ENGINE_OPTIONS = {  # vLLM's
    "dtype": "bfloat16",
    "max_model_len": MAX_LENGTH,
    "max_num_seqs": MAX_REQUESTS,
    "max_num_batched_tokens": MAX_LENGTH,
    "enable_prefix_caching": False,
}


Wave = tuple[float, list[Answer]]  # seconds until the last answer's end, and the answers


@dataclass(frozen=True, slots=True)
class Contestant:
    """A server of the embedded model, by its name, in 16 bits."""

    name: str
    peer: str  # what has to be installed, or Shoal itself
    port: int
    command: Sequence[str]
    environment: Mapping[str, str] = field(default_factory=dict)


def contestants(folder: Folder, threads: int, scratch: Path) -> list[Contestant]:
    """All that could take part, each on a free port. `scratch` is a folder for files of theirs."""
    ports = [free_port() for _ in range(4)]
    return [
        Contestant(SHOAL, "shoal", ports[0], serving.command(ports[0], threads)),
        Contestant(VLLM, "vllm", ports[1], _vllm(folder, ports[1]), vllm_environment(folder, threads)),
        Contestant(LLAMA_SERVER, "llamacpp", ports[2], _llama_server(folder, ports[2], threads)),
        Contestant(
            RAY_SERVE_LLM,
            "ray-llm",
            ports[3],
            [
                str(folder.python("vllm")),
                str(RAY_LLM),
                str(ports[3]),
                str(folder.hugging_face),
                EMBEDDED_MODEL,
                json.dumps(ENGINE_OPTIONS),
            ],
            _ray_environment(folder, threads, scratch),
        ),
    ]


def _vllm(folder: Folder, port: int) -> list[str]:
    settings = {
        "--served-model-name": EMBEDDED_MODEL,
        "--host": HOST,
        "--port": port,
        "--dtype": "bfloat16",
        "--max-model-len": MAX_LENGTH,
        "--max-num-seqs": MAX_REQUESTS,
        "--max-num-batched-tokens": MAX_LENGTH,
    }
    given = [str(word) for pair in settings.items() for word in pair]
    command = [str(folder.env("vllm") / "bin" / "vllm"), "serve", str(folder.hugging_face), *given]
    return [*command, "--no-enable-prefix-caching", "--disable-uvicorn-access-log"]


def _llama_server(folder: Folder, port: int, threads: int) -> list[str]:
    settings = {
        "--model": folder.gguf("BF16"),
        "--alias": EMBEDDED_MODEL,
        "--host": HOST,
        "--port": port,
        "--threads": threads,
        "--threads-batch": threads,
        "--parallel": 32,
        "--ctx-size": 32 * 256,
        "--flash-attn": "on",
        "--cache-ram": 0,
    }
    return [str(folder.llama("llama-server")), *(str(word) for pair in settings.items() for word in pair)]


def _ray_environment(folder: Folder, threads: int, scratch: Path) -> dict[str, str]:
    """HAProxy in front, with ports and files of its own beside those of Shoal's Ray."""
    settings = vllm_environment(folder, threads)
    return {
        **settings,
        "LD_PRELOAD": "",
        "PRELOAD_IN_ENGINE": settings["LD_PRELOAD"],
        "PATH": f"{folder.env('vllm') / 'bin'}:/usr/bin:/bin",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_worker_niceness": "0",
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(scratch / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(scratch / "admin.sock"),
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(scratch / "metrics.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(scratch),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(scratch / "server-state"),
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(free_port()),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(free_port()),
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(free_port()),
        "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": "32000",
        "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT": "33000",
        "RAY_SERVE_DIRECT_INGRESS_MIN_GRPC_PORT": "42000",
        "RAY_SERVE_DIRECT_INGRESS_MAX_GRPC_PORT": "43000",
    }


class Server:
    """A contestant that has answered a request: seconds from the command until then, and what is resident then."""

    def __init__(self, contestant: Contestant, program: Program, workload: Workload) -> None:
        self.name = contestant.name
        self._port = contestant.port
        self._program = program
        start = time.perf_counter()
        with program.turn():
            self._wait_until_it_answers(workload, READY_TIMEOUT_S)
            self.ready_s = time.perf_counter() - start
            self.memory_bytes = program.memory_bytes()
            time.sleep(SETTLE_S if contestant.peer == "shoal" else 0)

    @property
    def num_disturbed(self) -> int:
        return self._program.num_disturbed

    def run(self, workload: Workload, count: int, repeat: int) -> Wave:
        """A wave of `count` clients. First the server's programs, which watch each other, see that all are well."""

        def work(attempt: int) -> Wave:
            self._wait_until_it_answers(workload, TURN_TIMEOUT_S)
            prompts = workload.prompts(count, workload.num_prompt, repeat + SEEDS * attempt)
            return serving.wave(self._port, prompts, workload.num_new)

        return self._program.undisturbed(work, tries=num_tries(workload, repeat))

    def memory_now_bytes(self) -> int:
        return self._program.memory_bytes()

    def _wait_until_it_answers(self, workload: Workload, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        prompts = workload.prompts(1, workload.num_prompt, seed=time.monotonic_ns())
        while True:
            try:
                serving.wave(self._port, prompts, 2)
                return
            except (OSError, serving.ServerError) as error:
                if not self._program.is_running:
                    raise self._program.error("ended") from None
                if time.monotonic() > deadline:
                    raise self._program.error(f"does not answer ({error!r})") from None
                time.sleep(0.1)


def measure(servers: Sequence[Server], workload: Workload) -> dict[str, Any]:
    """By number of clients: seconds of each server's waves, and what its clients saw. A round is a turn of each; the
    first one, which nobody is used to, does not count.
    """
    waves: dict[int, dict[str, list[Wave]]] = {count: {} for count in workload.request_counts}
    for repeat in range(-1, workload.repeats):
        for server in servers:
            last = {count: server.run(workload, count, repeat) for count in workload.request_counts}
            if repeat >= 0:
                for count, wave in last.items():
                    waves[count].setdefault(server.name, []).append(wave)
            said = "  ".join(f"{count} {seconds:.3f} s" for count, (seconds, _) in last.items())
            which = f"{repeat + 1}/{workload.repeats}" if repeat >= 0 else "warm"
            print(f"  {which}  {server.name:14} {said}", flush=True)
    return {f"clients_{count}": summary(by_server, count, workload) for count, by_server in waves.items()}


def summary(waves: Mapping[str, Sequence[Wave]], count: int, workload: Workload) -> dict[str, Any]:
    """By server: seconds of its waves, and medians over waves and over streams."""
    seconds = {name: [taken for taken, _ in seen] for name, seen in waves.items()}
    answers = {name: [answer for _, streams in seen for answer in streams] for name, seen in waves.items()}
    steps = workload.num_new - 1
    return {
        "seconds": seconds,
        "tokens_per_s": {n: count * workload.num_new / statistics.median(taken) for n, taken in seconds.items()},
        "ttft_p50_s": {n: statistics.median(a.first_s for a in seen) for n, seen in answers.items()},
        "time_per_token_p50_s": {
            n: statistics.median((a.last_s - a.first_s) / steps for a in seen) for n, seen in answers.items()
        },
    }


def run(folder: Folder, names: Sequence[str], workload: Workload, threads: int) -> dict[str, Any]:
    """Start the servers, Shoal's first, and measure them in turn; answers what goes into the result file."""
    with contextlib.ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="peers-")))
        servers = []
        for contestant in contestants(folder, threads, scratch):
            if contestant.peer in ("shoal", *names):
                print(f"starting {contestant.name}", flush=True)
                program = Program(contestant.name, contestant.command, contestant.environment)
                servers.append(Server(contestant, stack.enter_context(program), workload))
                print(f"  answers after {servers[-1].ready_s:.1f} s", flush=True)
        measured = measure(servers, workload)
        memory_after = {server.name: server.memory_now_bytes() for server in servers}
    return {
        "machine": machine.facts(threads),
        "model": EMBEDDED_MODEL,
        "num_prompt": workload.num_prompt,
        "num_new": workload.num_new,
        "repeats": workload.repeats,
        "peers": {name: PINNED[name] for name in names},
        "ready_s": {server.name: server.ready_s for server in servers},
        "memory_bytes": {server.name: server.memory_bytes for server in servers},
        "memory_after_bytes": memory_after,
        "num_disturbed": {server.name: server.num_disturbed for server in servers},
        **measured,
    }
