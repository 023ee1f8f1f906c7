"""Shoal's offline engine and others, each in a process and an environment of its own, at the same work in turn."""

from __future__ import annotations

import contextlib
import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import machine
from machine import Workload
from peers_child import KV_GIB
from peers_install import Folder, version_of
from peers_process import MAX_TRIES, Program, num_tries

from shoal.cluster.config import EMBEDDED_MODEL, locate_model

CHILD = Path(__file__).parent / "peers_child.py"
SHOAL = "shoal"
SEEDS = 1000  # more than there are rounds: every prompt is a new one

Precision = Literal["16 bits", "int8", "int4"]  # of the weights


@dataclass(frozen=True, slots=True)
class Contestant:
    """An engine with one model and one set of options."""

    name: str
    peer: str  # what has to be installed, or Shoal itself
    precision: Precision
    command: Sequence[str]  # starts peers_child.py, or what speaks as it does
    environment: Mapping[str, str] = field(default_factory=dict)


class Point(NamedTuple):
    """So many prompts of `length` tokens at once, with `num_new` new tokens each."""

    requests: int
    length: int
    num_new: int


def contestants(folder: Folder, threads: int) -> list[Contestant]:
    """All that could take part, with the settings that are best for each."""
    stored = locate_model(EMBEDDED_MODEL)
    number = {"OMP_NUM_THREADS": str(threads)}

    def child(python: Path, engine: str, model: Path | str, **options: Any) -> list[str]:
        return [str(python), str(CHILD), engine, json.dumps({"model": str(model), "threads": threads, **options})]

    def shoal(name: str, precision: Precision, model: Path | str, **options: Any) -> Contestant:
        return Contestant(name, SHOAL, precision, child(Path(sys.executable), "shoal", model, **options), number)

    def vllm(name: str, *, is_compiled: bool) -> Contestant:
        command = child(folder.python("vllm"), "vllm", folder.hugging_face, is_compiled=is_compiled)
        environment = {**vllm_environment(folder, threads), "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
        return Contestant(name, "vllm", "16 bits", command, environment)

    def llamacpp(name: str, precision: Precision, kind: str) -> Contestant:
        tool = {"tool": str(folder.llama("llama-batched-bench")), "version": version_of("llamacpp")}
        command = child(folder.python("llamacpp"), "llamacpp", folder.gguf(kind), **tool)
        return Contestant(name, "llamacpp", precision, command)

    def openvino(name: str, precision: Precision, model: Path | str) -> Contestant:
        return Contestant(name, "openvino", precision, child(folder.python("openvino"), "openvino", model), number)

    def onnxruntime(name: str, precision: Precision, model: Path | str) -> Contestant:
        command = child(folder.python("onnxruntime"), "onnxruntime", model)
        return Contestant(name, "onnxruntime", precision, command)

    def packed_shoal(precision: Precision, kind: str, model: Path | str) -> Contestant:
        return shoal(f"shoal {kind}", precision, model, dtype="bfloat16", quantization="gguf")

    packed: tuple[tuple[Precision, str], ...] = (("int8", "Q8_0"), ("int4", "Q4_0"))
    made = [(precision, kind) for precision, kind in packed if folder.gguf(kind).exists()]  # by llama.cpp
    return [
        shoal(SHOAL, "16 bits", stored, dtype="bfloat16"),
        vllm("vllm, eager", is_compiled=False),
        vllm("vllm, compiled", is_compiled=True),
        llamacpp("llama.cpp BF16", "16 bits", "BF16"),
        openvino("openvino f16", "16 bits", folder.gguf("F16")),
        *(packed_shoal(precision, kind, folder.gguf(kind)) for precision, kind in made),
        packed_shoal("int4", "Q4_1", stored),
        llamacpp("llama.cpp Q8_0", "int8", "Q8_0"),
        llamacpp("llama.cpp Q4_0", "int4", "Q4_0"),
        openvino("openvino Q4_1", "int4", stored),
        onnxruntime("onnxruntime int4", "int4", folder.onnx),
    ]


def vllm_environment(folder: Folder, threads: int) -> dict[str, str]:
    """What makes vLLM fastest on a CPU, by its documentation."""
    return {
        "HF_HUB_OFFLINE": "1",
        "LD_PRELOAD": ":".join(map(str, folder.preloaded)),
        "OMP_NUM_THREADS": str(threads),
        "VLLM_CACHE_ROOT": str(folder.path / "cache" / "vllm"),
        "VLLM_CPU_KVCACHE_SPACE": str(KV_GIB),
        "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
        "VLLM_CPU_OMP_THREADS_BIND": f"0-{threads - 1}",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_NO_USAGE_STATS": "1",
    }


class Child:
    """A contestant, loaded."""

    def __init__(self, contestant: Contestant, program: Program) -> None:
        self.contestant = contestant
        self._program = program
        with program.turn():
            ready = json.loads(program.ask())
        self.version: str = ready["version"]
        self.ready_s: float = ready["ready_s"]

    @property
    def num_disturbed(self) -> int:
        return self._program.num_disturbed

    def run(self, workload: Workload, point: Point, repeat: int) -> float:
        """Seconds."""

        def work(attempt: int) -> float:
            of_point = repeat + SEEDS * (attempt + MAX_TRIES * point.num_new)
            prompts = workload.prompts(point.requests, point.length, of_point)
            answer = json.loads(self._program.ask(json.dumps({"prompts": prompts, "num_new": point.num_new})))
            return float(answer["seconds"])

        return self._program.undisturbed(work, tries=num_tries(workload, repeat))


def points(workload: Workload, precision: Precision) -> dict[str, Point]:
    """What is measured, by name. Of int8 and int4 that is one request alone, for its decode rate."""
    counts = workload.request_counts if precision == "16 bits" else (1,)
    measured = {f"requests_{n}": Point(n, workload.num_prompt, workload.num_new) for n in counts}
    measured["first_token"] = Point(1, workload.num_prompt, 1)
    if precision == "16 bits":
        measured["prefill"] = Point(1, workload.num_prefill, 1)
    return measured


def measure(children: Sequence[Child], workload: Workload) -> dict[str, dict[str, list[float]]]:
    """Seconds by point, contestant and round. A round is a turn of each; the first one, which nobody is used to, does
    not count.
    """
    seconds: dict[str, dict[str, list[float]]] = {}
    for repeat in range(-1, workload.repeats):
        for child in children:
            name = child.contestant.name
            last = {}
            for point, asked in points(workload, child.contestant.precision).items():
                last[point] = child.run(workload, asked, repeat)
                if repeat >= 0:
                    seconds.setdefault(point, {}).setdefault(name, []).append(last[point])
            said = "  ".join(f"{point} {taken:.3f}" for point, taken in last.items())
            print(f"  {f'{repeat + 1}/{workload.repeats}' if repeat >= 0 else 'warm'}  {name:18} {said}", flush=True)
    return seconds


def summary(seconds: Mapping[str, Mapping[str, Sequence[float]]], workload: Workload) -> dict[str, Any]:
    """By point: seconds, and tokens per second from their medians. "decode" is what all but the first token took."""
    result: dict[str, Any] = {}
    for name, point in points(workload, "16 bits").items():
        tokens = point.length if name == "prefill" else point.requests * point.num_new
        rates = {contestant: tokens / statistics.median(taken) for contestant, taken in seconds[name].items()}
        result[name] = {"seconds": seconds[name], "tokens_per_s": rates}
    whole, first = seconds["requests_1"], seconds["first_token"]
    steps = {name: statistics.median(whole[name]) - statistics.median(first[name]) for name in whole}
    result["decode"] = {"tokens_per_s": {name: (workload.num_new - 1) / step for name, step in steps.items()}}
    return result


def run(folder: Folder, names: Sequence[str], workload: Workload, threads: int) -> dict[str, Any]:
    """Load Shoal and the peers one after the other, measure them in turn; answers what goes into the result file."""
    chosen = [contestant for contestant in contestants(folder, threads) if contestant.peer in (SHOAL, *names)]
    with contextlib.ExitStack() as stack:
        children = []
        for contestant in chosen:
            print(f"loading {contestant.name}", flush=True)
            program = Program(contestant.name, contestant.command, contestant.environment, is_asked=True)
            children.append(Child(contestant, stack.enter_context(program)))
        seconds = measure(children, workload)
    return {
        "machine": machine.facts(threads),
        "model": EMBEDDED_MODEL,
        "num_prompt": workload.num_prompt,
        "num_new": workload.num_new,
        "num_prefill": workload.num_prefill,
        "repeats": workload.repeats,
        "contestants": {
            child.contestant.name: {
                "peer": child.contestant.peer,
                "precision": child.contestant.precision,
                "version": child.version,
                "ready_s": child.ready_s,
                "num_disturbed": child.num_disturbed,
            }
            for child in children
        },
        **summary(seconds, workload),
    }
