"""A replica group of two stages: the same answers as one rank, and no client left waiting when a rank is killed."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from shoal.cluster import cli
from shoal.cluster.config import EMBEDDED_MODEL, locate_model
from shoal.engine import LLM, SamplingParams

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")]

SHAPE = ("--pipeline-parallel", "2", "--num-threads", "1", "--kv-memory", "512MiB")
SPECULATION = ("--speculative", "method=suffix,adaptive=false")
ERROR_BOUND_S = 5.0  # from the end of a rank's process to the error at every client of its group
HEARTBEAT_TIMEOUT_S = 10.0  # the default
RETURN_BOUND_S = 60.0  # from there to the next answer, on a busy two-core machine
PROMPT = "The first ten prime numbers are"


@pytest.fixture(scope="module")
def group(make_server: Callable[..., Any]) -> Iterator[Any]:
    """A server whose first group loses a rank while it loads."""
    with make_server(*SHAPE, *SPECULATION) as server:
        server.wait_for("starting ranks")
        while not (loading := rank_processes(server)):
            assert server.process.poll() is None, server.output
            time.sleep(0.05)
        kill(max(loading))
        server.wait_for("ready after")
        yield server


@dataclass
class Outcome:
    """How a client's stream ended."""

    text: str = ""
    error_code: str | None = None
    ended_s: float | None = None  # time.monotonic()


class Client(threading.Thread):
    """Streams one completion; `has_begun` is set with its first text."""

    def __init__(self, url: str, prompt: str, max_tokens: int) -> None:
        super().__init__(daemon=True)
        self._url = url
        self._body = {"model": EMBEDDED_MODEL, "prompt": prompt, "max_tokens": max_tokens, "stream": True,
                      "ignore_eos": True, "temperature": 0}  # fmt: skip
        self.has_begun = threading.Event()
        self.outcome = Outcome()

    def run(self) -> None:
        request = urllib.request.Request(
            f"{self._url}/v1/completions", json.dumps(self._body).encode(), {"content-type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=120) as response:
                self._read(response)
        except urllib.error.HTTPError as error:
            self.outcome.error_code = json.loads(error.read())["error"]["code"]
        except OSError as error:
            self.outcome.error_code = type(error).__name__
        self.outcome.ended_s = time.monotonic()

    def _read(self, response: Any) -> None:
        for line in response:
            if not line.startswith(b"data: {"):
                continue
            event = json.loads(line.removeprefix(b"data: "))
            if "error" in event:
                self.outcome.error_code = event["error"]["code"]
                continue
            self.outcome.text += event["choices"][0]["text"]
            self.has_begun.set()


def clients(server: Any, count: int, *, prompt: str = PROMPT, max_tokens: int = 2000) -> list[Client]:
    started = [Client(server.url, prompt, max_tokens) for _ in range(count)]
    for client in started:
        client.start()
    return started


def complete(server: Any, prompt: str = PROMPT, max_tokens: int = 24) -> str:
    """The text of one answer, whole. Raises OSError (HTTPError too) if there is none."""
    text: str = answer(server, prompt, max_tokens)["choices"][0]["text"]
    return text


def answer(server: Any, prompt: str, max_tokens: int) -> dict[str, Any]:
    body = {"model": EMBEDDED_MODEL, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0}
    request = urllib.request.Request(
        f"{server.url}/v1/completions", json.dumps(body).encode(), {"content-type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=RETURN_BOUND_S) as response:
        whole: dict[str, Any] = json.load(response)
        return whole


def until_answering(server: Any) -> str:
    deadline = time.monotonic() + RETURN_BOUND_S
    while True:
        try:
            return complete(server)
        except urllib.error.HTTPError as error:
            if error.code != 503 or time.monotonic() > deadline:
                raise
            time.sleep(0.2)


def ranks(server: Any) -> list[dict[str, Any]]:
    with urllib.request.urlopen(f"{server.admin_url}/status", timeout=10) as response:
        (model,) = json.load(response)["models"]
    found: list[dict[str, Any]] = model["groups"][0]["ranks"]
    return found


def rank_processes(server: Any) -> set[int]:
    return {pid for pid, command in server.processes().items() if command.startswith("ray::RankActor")}


def kill(pid: int) -> float:
    os.kill(pid, signal.SIGKILL)
    return time.monotonic()


def check_ended(waiting: list[Client], killed_s: float) -> None:
    """Every client has its answer or a named error within the bound."""
    for client in waiting:
        client.join(max(0.0, killed_s + ERROR_BOUND_S - time.monotonic()))
        assert client.outcome.ended_s is not None, "a client hangs"
        assert client.outcome.error_code == "replica_failed", client.outcome


def test_two_stages_answer_as_one_rank_does(group: Any) -> None:
    llm = LLM(locate_model(EMBEDDED_MODEL), num_threads=1, num_blocks=64)
    (alone,) = llm.generate([PROMPT], SamplingParams(temperature=0, max_tokens=24))
    assert complete(group) == alone.outputs[0].text


def test_speculation_over_two_stages_says_the_same_in_fewer_steps(group: Any) -> None:
    prompt = "Row, row, row your boat, gently down the stream.\n" * 6  # no close choice: the next token leads by 0.6
    llm = LLM(locate_model(EMBEDDED_MODEL), num_threads=1, num_blocks=64)
    (alone,) = llm.generate([prompt], SamplingParams(temperature=0, max_tokens=24))
    whole = answer(group, prompt, 24)
    assert whole["choices"][0]["text"] == alone.outputs[0].text
    assert whole["usage"]["completion_tokens_details"]["accepted_prediction_tokens"] >= 12


def test_status_shows_both_ranks(group: Any, capsys: pytest.CaptureFixture[str]) -> None:
    stages = ranks(group)
    assert [rank["stage"] for rank in stages] == [0, 1]
    assert {rank["pid"] for rank in stages} == rank_processes(group)
    assert sum(rank["num_layers"] for rank in stages) == 30
    assert all(rank["weight_bytes"] > 0 and rank["kv_bytes"] > 0 for rank in stages)
    assert cli.main(["status", "--url", group.admin_url]) == 0
    shown = capsys.readouterr().out
    assert "stage 0 rank 0: " in shown
    assert "stage 1 rank 0: " in shown


@pytest.mark.parametrize("stage", [pytest.param(0, marks=pytest.mark.soak), 1])
def test_a_rank_killed_while_decoding_fails_its_clients_and_the_group_comes_back(group: Any, stage: int) -> None:
    expected = until_answering(group)
    waiting = clients(group, 4)
    assert all(client.has_begun.wait(30) for client in waiting)
    pids = {rank["stage"]: rank["pid"] for rank in ranks(group)}
    killed_s = kill(pids[stage])
    check_ended(waiting, killed_s)
    assert until_answering(group) == expected
    print(f"decode, stage {stage}: errors after {last_end(waiting) - killed_s:.2f} s, "
          f"next answer after {time.monotonic() - killed_s:.2f} s")  # fmt: skip
    assert not set(pids.values()) & rank_processes(group), "half a group is left"


@pytest.mark.parametrize("stage", [0, pytest.param(1, marks=pytest.mark.soak)])
def test_a_rank_killed_in_prefill_fails_its_clients_and_the_group_comes_back(group: Any, stage: int) -> None:
    expected = until_answering(group)
    pids = {rank["stage"]: rank["pid"] for rank in ranks(group)}
    waiting = clients(group, 2, prompt="word " * 7000, max_tokens=4)
    time.sleep(0.5)
    killed_s = kill(pids[stage])
    # The gateway may have held the second one, as the first kept the group busy: it waits for the new group then.
    for client in waiting:
        client.join(max(0.0, killed_s + ERROR_BOUND_S - time.monotonic()))
    failed = [client for client in waiting if client.outcome.ended_s is not None]
    assert failed, "the client whose prompt was being computed hangs"
    check_ended(failed, killed_s)
    assert until_answering(group) == expected
    for client in set(waiting) - set(failed):
        client.join(RETURN_BOUND_S)
        assert client.outcome.error_code is None
        assert client.outcome.text
    print(f"prefill, stage {stage}: errors after {last_end(failed) - killed_s:.2f} s, "
          f"next answer after {time.monotonic() - killed_s:.2f} s")  # fmt: skip


@pytest.mark.soak
def test_a_rank_of_a_new_group_killed_while_it_loads_only_costs_time(group: Any) -> None:
    expected = until_answering(group)
    pids = {rank["stage"]: rank["pid"] for rank in ranks(group)}
    killed_s = kill(pids[0])
    while not (loading := rank_processes(group) - set(pids.values())):
        assert time.monotonic() < killed_s + RETURN_BOUND_S, "no new group"
        time.sleep(0.05)
    kill(loading.pop())
    assert until_answering(group) == expected
    print(f"decode and then load: next answer after {time.monotonic() - killed_s:.2f} s")


@pytest.mark.soak
def test_a_rank_that_hangs_is_a_dead_one(group: Any) -> None:
    expected = until_answering(group)
    waiting = clients(group, 2)
    assert all(client.has_begun.wait(30) for client in waiting)
    (stopped, *_) = (rank["pid"] for rank in ranks(group))
    os.kill(stopped, signal.SIGSTOP)
    stopped_s = time.monotonic()
    check_ended(waiting, stopped_s + HEARTBEAT_TIMEOUT_S)
    assert until_answering(group) == expected
    print(f"SIGSTOP: errors after {last_end(waiting) - stopped_s:.2f} s, "
          f"next answer after {time.monotonic() - stopped_s:.2f} s")  # fmt: skip
    assert stopped not in rank_processes(group)


@pytest.mark.soak
def test_other_groups_do_not_notice(make_server: Callable[..., Any]) -> None:
    with make_server(*SHAPE, "--replicas", "2") as server:
        server.wait_for("ready after")
        waiting = clients(server, 8, max_tokens=200)
        assert all(client.has_begun.wait(60) for client in waiting)
        killed_s = kill(ranks(server)[0]["pid"])
        for client in waiting:
            client.join(120)
        failed = [client.outcome for client in waiting if client.outcome.error_code is not None]
        answered = [client.outcome for client in waiting if client.outcome.error_code is None]
        assert failed
        assert {outcome.error_code for outcome in failed} == {"replica_failed"}
        assert all(outcome.ended_s and outcome.ended_s < killed_s + ERROR_BOUND_S for outcome in failed)
        assert answered, "no call went to the other group"
        assert {outcome.text for outcome in answered} == {answered[0].text}


@pytest.mark.parametrize("stage", [pytest.param(0, marks=pytest.mark.soak), 1])
def test_a_rank_killed_in_an_idle_moment_is_replaced_unasked(group: Any, stage: int) -> None:
    expected = until_answering(group)
    pids = {rank["stage"]: rank["pid"] for rank in ranks(group)}
    killed_s = kill(pids[stage])
    while rank_processes(group) & set(pids.values()):
        assert time.monotonic() < killed_s + ERROR_BOUND_S, "half a group is left"
        time.sleep(0.05)
    assert until_answering(group) == expected
    print(f"idle, stage {stage}: next answer after {time.monotonic() - killed_s:.2f} s")


def last_end(ended: list[Client]) -> float:
    return max(client.outcome.ended_s or 0.0 for client in ended)
