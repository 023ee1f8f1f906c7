"""Two replicas over HTTP: prompts that begin alike meet, and a replica that is killed is forgotten."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest

from shoal.cluster.config import EMBEDDED_MODEL

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")]

SHAPE = ("--replicas", "2", "--num-threads", "1", "--kv-memory", "64MiB", "--max-model-len", "1024")
FIRST = "The quick brown fox jumps over the lazy dog. " * 12
SECOND = "Once upon a time there was a princess in a castle. " * 12
TIMEOUT_S = 120.0


@pytest.fixture(scope="module")
def server(make_server: Callable[..., Any]) -> Iterator[Any]:
    with make_server(*SHAPE) as server:
        server.wait_for("ready after")
        yield server


class Answer(NamedTuple):
    replica: str
    num_cached: int


def complete(url: str, prompt: str) -> Answer:
    body = {"model": EMBEDDED_MODEL, "prompt": prompt, "max_tokens": 2, "temperature": 0}
    request = urllib.request.Request(
        f"{url}/v1/completions", json.dumps(body).encode(), {"content-type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=TIMEOUT_S) as response:
        return Answer(response.headers["x-shoal-replica"], int(response.headers["x-shoal-cached-tokens"]))


def get(url: str) -> Any:
    with urllib.request.urlopen(url, timeout=TIMEOUT_S) as response:
        return json.load(response)


def groups(server: Any) -> list[dict[str, Any]]:
    return list(get(f"{server.admin_url}/status")["models"][0]["groups"])


def test_prompts_that_begin_alike_meet_and_others_go_elsewhere(server: Any) -> None:
    answers = [(complete(server.url, f"{FIRST}{i}"), complete(server.url, f"{SECOND}{i}")) for i in range(4)]
    first, second = zip(*answers, strict=True)
    assert len({answer.replica for answer in first}) == 1
    assert len({answer.replica for answer in second}) == 1
    assert first[0].replica != second[0].replica
    assert all(answer.num_cached > 100 for answer in (*first[1:], *second[1:]))


def test_the_last_decisions_are_explained_with_each_candidates_cost(server: Any) -> None:
    complete(server.url, f"{FIRST}x")
    (model,) = get(f"{server.admin_url}/debug/routing")["models"]
    decision = model["decisions"][0]
    costs = {candidate["replica"]: candidate["cost_s"] for candidate in decision["candidates"]}
    assert len(costs) == 2
    assert min(costs, key=costs.__getitem__) == decision["chosen"]
    assert {*decision["labels"]} == {*costs}


def test_the_index_holds_what_the_replicas_hold(server: Any) -> None:
    complete(server.url, f"{FIRST}y")
    deadline = time.monotonic() + TIMEOUT_S
    while not all(group["routing"]["num_indexed_blocks"] > 6 for group in groups(server)):
        assert time.monotonic() < deadline, groups(server)
        time.sleep(0.1)
    assert all(group["routing"]["staleness_s"] < 30 for group in groups(server))


def test_a_killed_replica_is_forgotten_and_its_prompts_are_served_by_the_other(server: Any) -> None:
    holder = complete(server.url, f"{FIRST}z").replica
    (group,) = (group for group in groups(server) if group["label"] == holder)
    os.kill(group["ranks"][0]["pid"], signal.SIGKILL)
    try:
        answer = complete(server.url, f"{FIRST}z")
    except urllib.error.HTTPError:  # it was on its way to the replica that is gone
        answer = complete(server.url, f"{FIRST}z")
    assert answer.replica != holder or answer.num_cached == 0  # its successor has its label and none of its blocks
    again = complete(server.url, f"{FIRST}z")
    assert again.replica == answer.replica
    assert again.num_cached > 100
