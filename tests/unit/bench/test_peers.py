"""bench/peers.py with programs of our own as the others: whose turn it is, what is counted, and what is said of it."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from shoal.cluster.commands.processes import descendants

BENCH = Path(__file__).parents[3] / "bench"

# Answers with a hundredth of a second per token asked for, after writing down who was asked, and for what.
ENGINE = """
import json, sys
name, diary = sys.argv[1:]
print(json.dumps({"version": "1", "ready_s": 0.5}), flush=True)
for line in sys.stdin:
    asked = json.loads(line)
    prompts, num_new = asked["prompts"], asked["num_new"]
    with open(diary, "a") as file:
        print(name, len(prompts), len(prompts[0]), num_new, file=file)
    print(json.dumps({"seconds": len(prompts) * num_new / 100}), flush=True)
"""

# Refuses at first, as a server does that still loads, and then streams a token at a time.
SERVER = """
import asyncio, json, sys
refusals = 2
async def answer(reader, writer):
    global refusals
    head = await reader.readuntil(b"\\r\\n\\r\\n")
    length = int(next(l for l in head.split(b"\\r\\n") if l.lower().startswith(b"content-length")).split(b":")[1])
    asked = json.loads(await reader.readexactly(length))
    if refusals:
        refusals -= 1
        writer.write(b"HTTP/1.1 503 Service Unavailable\\r\\nContent-Length: 0\\r\\n\\r\\n")
    else:
        writer.write(b"HTTP/1.1 200 OK\\r\\nTransfer-Encoding: chunked\\r\\n\\r\\n")
        def send(event):
            line = b"data: " + json.dumps(event).encode() + b"\\n\\n"
            writer.write(b"%x\\r\\n%s\\r\\n" % (len(line), line))
        for _ in range(asked["max_tokens"]):
            send({"choices": [{"text": "a"}]})
            await asyncio.sleep(0.01)
        send({"choices": [], "usage": {"completion_tokens": asked["max_tokens"]}})
        writer.write(b"e\\r\\ndata: [DONE]\\n\\n\\r\\n0\\r\\n\\r\\n")
    writer.close()
async def main():
    async with await asyncio.start_server(answer, "127.0.0.1", int(sys.argv[1])) as server:
        await server.serve_forever()
asyncio.run(main())
"""


@pytest.fixture(scope="module")
def bench() -> Iterator[Callable[[str], ModuleType]]:
    """Modules of bench/, which import each other by their plain names."""
    sys.path.insert(0, str(BENCH))
    yield importlib.import_module
    sys.path.remove(str(BENCH))


@pytest.fixture
def is_undisturbed(bench: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever else runs here."""
    monkeypatch.setattr(bench("peers_process"), "MAX_DISTURBANCE", float("inf"))


def states(pids: list[int]) -> set[str]:
    return {Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] for pid in pids}


def wait_until(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_program_runs_in_its_turn_only_with_all_that_it_started(bench: Callable[[str], ModuleType]) -> None:
    process = bench("peers_process")
    command = ["sh", "-c", "sh -c 'echo started; sleep 100 & wait' & wait"]
    with process.Program("three processes", command, {}, is_asked=True) as program:
        assert program.ask() == "started\n"
        wait_until(lambda: len(descendants()) >= 3)
        own = [pid for pid in descendants() if os.getsid(pid) != os.getsid(0)]
        assert len(own) == 3
        assert "T" not in states(own)
        with program.turn():
            assert "T" not in states(own)
        wait_until(lambda: states(own) == {"T"})
        with program.turn():
            wait_until(lambda: "T" not in states(own))
        assert program.memory_bytes() > 100_000
    assert not set(own) & set(descendants())


def test_a_turn_that_a_stranger_disturbs_is_taken_again(
    bench: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    process = bench("peers_process")
    monkeypatch.setattr(process, "CALM_TIMEOUT_S", 0.5)
    stranger = subprocess.Popen(["sh", "-c", "while :; do :; done"])
    attempts = []

    def work(attempt: int) -> str:
        time.sleep(0.5)
        attempts.append(attempt)
        if attempt == 1:
            stranger.kill()
            stranger.wait()
        return f"of attempt {attempt}"

    try:
        with process.Program("idle", ["sleep", "100"], {}) as program:
            program.undisturbed(lambda attempt: time.sleep(0.3), tries=2)
            assert program.num_disturbed == 1
            assert program.undisturbed(work, tries=4) == f"of attempt {attempts[-1]}"
    finally:
        stranger.kill()
        stranger.wait()
    assert attempts[:3] == [0, 1, 2]


def test_a_program_that_ends_is_reported_with_what_it_printed(bench: Callable[[str], ModuleType]) -> None:
    process = bench("peers_process")
    command = ["sh", "-c", "echo no such model >&2"]
    with (
        process.Program("poor engine", command, {}, is_asked=True) as program,
        pytest.raises(process.PeerError, match=r"(?s)poor engine ended.*no such model"),
    ):
        program.ask()


@pytest.mark.usefixtures("is_undisturbed")
def test_engines_take_turns_and_the_first_round_does_not_count(
    bench: Callable[[str], ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    offline, install = bench("peers_offline"), bench("peers_install")
    diary = tmp_path / "diary"

    def contestant(name: str, precision: str) -> Any:
        return offline.Contestant(name, name, precision, [sys.executable, "-c", ENGINE, name, str(diary)])

    fakes = [contestant("shoal", "16 bits"), contestant("other", "16 bits"), contestant("packed", "int4")]
    monkeypatch.setattr(offline, "contestants", lambda folder, threads: [*fakes, contestant("left out", "16 bits")])
    workload = bench("machine").Workload(num_prompt=5, num_new=3, request_counts=(1, 2), num_prefill=7, repeats=2)
    result = offline.run(install.Folder(tmp_path), ["other", "packed"], workload, 1)
    whole = ["1 5 3", "2 5 3", "1 5 1", "1 7 1"]
    turns = [f"{name} {asked}" for name in ("shoal", "other") for asked in whole]
    turns += ["packed 1 5 3", "packed 1 5 1"]
    assert diary.read_text().splitlines() == 3 * turns
    assert result["requests_2"]["seconds"] == {"shoal": [0.06, 0.06], "other": [0.06, 0.06]}
    assert result["requests_2"]["tokens_per_s"]["other"] == pytest.approx(100)
    assert result["prefill"]["tokens_per_s"]["shoal"] == pytest.approx(700)
    assert result["decode"]["tokens_per_s"]["packed"] == pytest.approx(2 / 0.02)
    assert result["contestants"]["packed"]["precision"] == "int4"


@pytest.mark.usefixtures("is_undisturbed")
def test_servers_are_waited_for_and_take_turns(bench: Callable[[str], ModuleType]) -> None:
    http, process = bench("peers_http"), bench("peers_process")
    workload = bench("machine").Workload(num_prompt=5, num_new=4, request_counts=(1, 3), num_prefill=7, repeats=2)
    port = bench("serving").free_port()
    contestant = http.Contestant("server", "server", port, [sys.executable, "-c", SERVER, str(port)])
    with process.Program("server", contestant.command, {}) as program:
        server = http.Server(contestant, program, workload)
        result = http.measure([server], workload)
        assert server.memory_bytes > 2**20
        assert server.memory_now_bytes() > 2**20
    assert len(result["clients_3"]["seconds"]["server"]) == 2
    assert 20 < result["clients_3"]["tokens_per_s"]["server"] < 12 / 0.04
    assert result["clients_1"]["ttft_p50_s"]["server"] < result["clients_1"]["seconds"]["server"][0]
    assert result["clients_1"]["time_per_token_p50_s"]["server"] >= 0.0099


def test_a_server_that_ends_is_not_waited_for(bench: Callable[[str], ModuleType]) -> None:
    http, process = bench("peers_http"), bench("peers_process")
    port = bench("serving").free_port()
    contestant = http.Contestant("server", "server", port, ["sh", "-c", "echo no memory"])
    with (
        process.Program("server", contestant.command, {}) as program,
        pytest.raises(process.PeerError, match=r"(?s)server ended.*no memory"),
    ):
        http.Server(contestant, program, bench("machine").QUICK)


def offline_result(shoal: float) -> dict[str, Any]:
    rates = {"shoal": shoal, "slow": 50.0, "fast": 100.0}
    facts = {name: {"peer": name, "precision": "16 bits"} for name in rates}
    facts["shoal Q4_0"] = {"peer": "shoal", "precision": "int4"}
    points = {point: {"tokens_per_s": rates} for point in ("requests_1", "requests_8", "requests_32", "prefill")}
    decode = {"tokens_per_s": {**rates, "shoal Q4_0": 180.0}}
    return {"contestants": facts, "num_prefill": 1024, **points, "decode": decode}


def http_result() -> dict[str, Any]:
    names = ("shoal serve", "vllm serve", "llama-server", "Ray Serve LLM")
    times = dict.fromkeys(names, 0.1)
    rates = dict(zip(names, (100.0, 90.0, 100.0, 50.0), strict=True))
    points = {
        f"clients_{count}": {"tokens_per_s": rates, "ttft_p50_s": times, "time_per_token_p50_s": times}
        for count in (1, 8, 32)
    }
    ready = dict(zip(names, (10.0, 20.0, 2.0, 49.0), strict=True))
    memory = dict(zip(names, (2.0e9, 3.0e9, 1.0e9, 8.0e9), strict=True))
    return {"ready_s": ready, "memory_bytes": memory, "memory_after_bytes": memory, **points}


def test_each_goal_is_held_against_the_best_peer(bench: Callable[[str], ModuleType]) -> None:
    lines = list(bench("peers").offline_lines(offline_result(shoal=116.0)))
    assert {line.what.rpartition(" over ")[2] for line in lines[:4]} == {"fast"}
    assert [line.value for line in lines] == ["1.16 x"] * 4 + ["1.55 x"]
    assert [line.is_met for line in lines] == [True, True, False, True, False]


def test_goals_over_http(bench: Callable[[str], ModuleType]) -> None:
    lines = {line.what: line.is_met for line in bench("peers").http_lines(http_result())}
    assert lines == {
        "http, 8 clients: shoal over vllm serve": True,
        "http, 32 clients: shoal over vllm serve": False,
        "http, 1 client: shoal over llama-server": True,
        "http, 1 client: shoal over Ray Serve LLM": True,
        "http, 8 clients: shoal over Ray Serve LLM": True,
        "http, 32 clients: shoal over Ray Serve LLM": True,
        "http, ready: Ray Serve LLM over shoal": False,
        "http, memory when ready: Ray Serve LLM over shoal": True,
    }


def test_tables_name_everybody(bench: Callable[[str], ModuleType]) -> None:
    offline, http = offline_result(shoal=116.0), http_result()
    assert [line.split("  ")[0] for line in bench("peers").offline_table(offline)][1:] == list(offline["contestants"])
    assert [line.split("  ")[0] for line in bench("peers").http_table(http)][1:] == list(http["ready_s"])


def test_the_picture_shows_both(bench: Callable[[str], ModuleType], tmp_path: Path) -> None:
    picture = tmp_path / "peers.svg"
    bench("peers_plot").save_plot(offline_result(shoal=116.0), http_result(), picture)
    assert picture.read_text().count("<!-- Ray Serve LLM -->") == 1
    assert "<!-- 32 requests, tokens/s -->" in picture.read_text()


def test_an_engine_that_stops_early_is_refused(bench: Callable[[str], ModuleType]) -> None:
    run = bench("peers_child").timed(lambda prompts, num_new: [[7] * num_new, [7]])
    assert run([[1], [2]], 1) >= 0
    with pytest.raises(AssertionError, match=r"\[3, 1\] new tokens instead of 3"):
        run([[1], [2]], 3)


def test_a_peer_that_cannot_be_installed_leaves_the_others_alone(
    bench: Callable[[str], ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install = bench("peers_install")
    folder = install.Folder(tmp_path)

    def fail(folder: Any) -> None:
        install.Steps("broken", folder).run("sh", "-c", "echo no compiler; exit 1")

    monkeypatch.setattr(install, "INSTALLERS", {"broken": fail, "whole": lambda folder: None})
    (wrong,) = install.install(["broken", "whole"], folder)
    assert wrong.startswith("broken cannot be installed: ")
    assert "no compiler" in wrong
    assert [name for name in ("broken", "whole") if install.installed(name, folder)] == ["whole"]


def test_shoal_itself_is_measured_where_nothing_else_is_installed(tmp_path: Path) -> None:
    command = [sys.executable, str(BENCH / "peers.py"), "offline", "--quick", "--threads", "1"]
    folders = ["--folder", str(tmp_path / "peers"), "--results", str(tmp_path)]
    done = subprocess.run([*command, *folders], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "python bench/peers.py install vllm" in done.stderr
    result = json.loads((tmp_path / "peers.json").read_text())
    assert list(result["contestants"]) == ["shoal", "shoal Q4_1"]
    assert list(result["requests_4"]["tokens_per_s"]) == ["shoal"]
    assert result["requests_1"]["tokens_per_s"]["shoal Q4_1"] > 0
