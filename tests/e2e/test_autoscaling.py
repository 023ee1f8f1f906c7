"""A real server whose model goes to zero replicas when it is idle, and comes back for a request."""

from __future__ import annotations

import json
import random
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shoal.cluster.config import EMBEDDED_MODEL

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")]

IDLE_TIMEOUT_S = 2.0
GONE_TIMEOUT_S = 40.0  # reports, decisions and the replica's end, on a busy machine
CONFIG = f"""
models:
  - model: {EMBEDDED_MODEL}
    autoscaling: {{min_replicas: 0, max_replicas: 1, idle_timeout: {IDLE_TIMEOUT_S}}}
    engine: {{num_threads: 1, max_model_len: 512, kv_memory: 64MiB}}
"""


@pytest.fixture
def server(start_server: Callable[..., Any], tmp_path: Path) -> Any:
    path = tmp_path / "cluster.yaml"
    path.write_text(CONFIG)
    server = start_server(str(path))
    server.wait_for("ready after")
    return server


def test_an_idle_model_goes_to_zero_and_a_request_brings_it_back(server: Any) -> None:
    first = _complete(server.url)
    _wait_until_gone(server)
    with urllib.request.urlopen(f"{server.url}/health", timeout=30) as health:
        assert health.status == 200
    assert _complete(server.url) == first
    assert _num_replicas(server) == 1


def test_no_request_is_lost_while_the_model_goes_and_comes(server: Any) -> None:
    chance = random.Random(0)
    before, replicas = _complete(server.url), set()
    until = time.monotonic() + 30.0
    while time.monotonic() < until:
        time.sleep(IDLE_TIMEOUT_S * chance.uniform(0.5, 4.0))
        assert _complete(server.url) == before
        replicas |= {pid for pid, command in server.processes().items() if _is_replica(command)}
    assert len(replicas) > 1, "it never went"


def _complete(url: str) -> str:
    body = {"model": EMBEDDED_MODEL, "prompt": "One, two,", "max_tokens": 8, "temperature": 0, "ignore_eos": True}
    request = urllib.request.Request(
        f"{url}/v1/completions", json.dumps(body).encode(), {"content-type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as response:
        answer = json.load(response)
    assert answer["usage"]["completion_tokens"] == 8
    text: str = answer["choices"][0]["text"]
    return text


def _wait_until_gone(server: Any) -> None:
    deadline = time.monotonic() + GONE_TIMEOUT_S
    while _num_replicas(server):
        assert time.monotonic() < deadline, server.output
        time.sleep(0.2)


def _num_replicas(server: Any) -> int:
    return sum(_is_replica(command) for command in server.processes().values())


def _is_replica(command: str) -> bool:
    return command.startswith("ray::ServeReplica:shoal:replica-")
