"""Shoal beside other serving systems on this machine's CPU: the same weights, prompts and threads, in turn in one run.

    python bench/peers.py install [names]   every peer into an environment of its own, and the model as they read it
    python bench/peers.py offline [names]   their offline engines
    python bench/peers.py http [names]      their servers, streaming
    python bench/peers.py plot              a picture of both for the README
    python bench/peers.py all [names]       one after the other

Names are those of peers: llamacpp, vllm, ray-llm, openvino, onnxruntime. Without any it is all of them; one that is not
installed is left out. All are loaded at once (11 GiB), and those that wait for their turn are stopped. The first round
is not counted, and a turn in which other programs of the machine took part of the cores is taken again (six times at
most; num_disturbed counts those that were not better then). Results stay in bench/results/ as peers.json and
peers_http.json.

Installing takes about 10 minutes and 7 GiB, a run of five rounds about 5 minutes each.
"""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import machine
import peers_http
import peers_offline
from peers_http import LLAMA_SERVER, RAY_SERVE_LLM, VLLM
from peers_install import DEFAULT_FOLDER, INSTALLERS, Folder, install, installed
from peers_offline import SHOAL
from peers_plot import save_plot
from run import Line, at_least, print_lines

PICTURE = Path(__file__).parents[1] / "docs" / "peers.svg"
OFFLINE_GOALS = {"requests_1": 1.0, "requests_8": 1.15, "requests_32": 1.25, "prefill": 1.15}  # x the best peer
PACKED_GOALS = {"int8": 1.4, "int4": 2.0}  # x our own decode in bfloat16
HTTP_GOALS = {
    VLLM: {"clients_8": 1.1, "clients_32": 1.25},
    LLAMA_SERVER: {"clients_1": 1.0},
    RAY_SERVE_LLM: {"clients_1": 1.7, "clients_8": 1.7, "clients_32": 1.7},
}
READY_GOAL, MEMORY_GOAL = 5.0, 3.0  # Ray Serve LLM's over ours, when ready

Result = Mapping[str, Any]


def offline_lines(result: Result) -> Iterator[Line]:
    """Shoal beside the best of the others at each point."""
    facts = result["contestants"]
    for point in (point for point in OFFLINE_GOALS if point in result):
        rates = {name: rate for name, rate in result[point]["tokens_per_s"].items() if _is_16_bits(facts[name])}
        best = max((name for name in rates if name != SHOAL), key=rates.__getitem__, default=None)
        if best is not None:
            what = f"offline, {_label(point)}: shoal over {best}"
            yield at_least(what, rates[SHOAL] / rates[best], OFFLINE_GOALS[point], "x")
    decode = result["decode"]["tokens_per_s"]
    for name in (name for name in facts if facts[name]["peer"] == SHOAL and name != SHOAL):
        goal = PACKED_GOALS[facts[name]["precision"]]
        yield at_least(f"decode, 1 request: {name} over bfloat16", decode[name] / decode[SHOAL], goal, "x")


def http_lines(result: Result) -> Iterator[Line]:
    ours = peers_http.SHOAL
    for peer, goals in HTTP_GOALS.items():
        if peer not in result["ready_s"]:
            continue
        for point, goal in goals.items():
            if point in result:
                rates = result[point]["tokens_per_s"]
                yield at_least(f"http, {_label(point)}: shoal over {peer}", rates[ours] / rates[peer], goal, "x")
    if RAY_SERVE_LLM in result["ready_s"]:
        ready, memory = result["ready_s"], result["memory_bytes"]
        yield at_least(f"http, ready: {RAY_SERVE_LLM} over shoal", ready[RAY_SERVE_LLM] / ready[ours], READY_GOAL, "x")
        ratio = memory[RAY_SERVE_LLM] / memory[ours]
        yield at_least(f"http, memory when ready: {RAY_SERVE_LLM} over shoal", ratio, MEMORY_GOAL, "x")


def _is_16_bits(facts: Mapping[str, Any]) -> bool:
    return bool(facts["precision"] == "16 bits")


def _label(point: str) -> str:
    """ "1 request" of "requests_1"."""
    kind, _, number = point.partition("_")
    return f"{number} {kind.removesuffix('s') if number == '1' else kind}" if number else kind


def offline_table(result: Result) -> Iterator[str]:
    columns = [point for point in result if point.startswith("requests_")] + ["prefill", "decode"]
    yield f"{'tokens/s':20}" + "".join(f"{_label(column):>13}" for column in columns)
    for name in result["contestants"]:
        rates = [result[column]["tokens_per_s"].get(name) for column in columns]
        yield f"{name:20}" + "".join(f"{'':>13}" if rate is None else f"{rate:13.0f}" for rate in rates)


def http_table(result: Result) -> Iterator[str]:
    points = [point for point in result if point.startswith("clients_")]
    heads = [f"{_label(point)}: tokens/s, ttft, per token" for point in points]
    yield f"{'':15}" + "".join(f"{head:>40}" for head in heads) + f"{'ready':>9}{'memory, after':>17}"
    for name in result["ready_s"]:
        cells = []
        for point in points:
            rate, first, step = (
                result[point][key][name] for key in ("tokens_per_s", "ttft_p50_s", "time_per_token_p50_s")
            )
            cells.append(f"{rate:.0f}, {first * 1e3:.0f} ms, {step * 1e3:.1f} ms")
        memory, after = (result[key][name] / 2**30 for key in ("memory_bytes", "memory_after_bytes"))
        tail = f"{result['ready_s'][name]:7.1f} s{memory:7.2f}, {after:.2f} GiB"
        yield f"{name:15}" + "".join(f"{c:>40}" for c in cells) + tail


def conditions(result: Result) -> str:
    facts = result["machine"]
    return (
        f"{facts['cpu']}, {facts['cores']} cores, {facts['memory_gib']} GiB, {facts['threads']} threads; "
        f"{result['model']}, prompt {result['num_prompt']}, {result['num_new']} new, medians of {result['repeats']}"
    )


def show(result: Result, table: Iterator[str], lines: Iterator[Line]) -> None:
    print(f"\n{conditions(result)}\n")
    print("\n".join(table) + "\n")
    print_lines(lines)


def available(names: Sequence[str], folder: Folder) -> list[str]:
    """Those that are installed. Says which are not."""
    found = [name for name in names if installed(name, folder)]
    for name in (name for name in names if name not in found):
        print(f"{name} is left out; to install it: python bench/peers.py install {name}", file=sys.stderr)
    return found


def main() -> None:
    parser = machine.parser(__doc__)
    parser.add_argument("what", choices=("install", "offline", "http", "plot", "all"))
    parser.add_argument("names", nargs="*", metavar="names", choices=[*INSTALLERS, []], help="peers (default: all)")
    parser.add_argument("--folder", type=Path, default=DEFAULT_FOLDER, help="of the peers (default: %(default)s)")
    given = machine.parse(parser)
    folder = Folder(given.folder.expanduser().absolute())
    names = given.names or list(INSTALLERS)
    # Programs that are stopped would stay for good: whatever ends this one ends them first.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    wrong: list[str] = []
    if given.what in ("install", "all"):
        wrong = install(names, folder)
    if given.what in ("offline", "all"):
        result = peers_offline.run(folder, available(names, folder), given.workload, given.threads)
        machine.write_result(given.results, "peers", result)
        show(result, offline_table(result), offline_lines(result))
    if given.what in ("http", "all"):
        result = peers_http.run(folder, available(names, folder), given.workload, given.threads)
        machine.write_result(given.results, "peers_http", result)
        show(result, http_table(result), http_lines(result))
    if given.what in ("plot", "all"):
        offline, http = (json.loads((given.results / f"{name}.json").read_text()) for name in ("peers", "peers_http"))
        save_plot(offline, http, PICTURE)
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
