"""Ctrl-C takes everything down, whatever the server is doing; a start that fails says why and does the same."""

from __future__ import annotations

import json
import os
import shutil
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shoal.cluster.config import EMBEDDED_MODEL, locate_model

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")]


def test_ctrl_c_stops_a_busy_server_and_leaves_no_process(start_server: Callable[..., Any]) -> None:
    server = start_server()
    server.wait_for("ready after")
    names = " ".join(server.processes().values())
    assert "raylet" in names
    assert "gcs_server" in names

    ended = threading.Event()
    threading.Thread(target=_stream, args=(server.url, ended), daemon=True).start()
    time.sleep(1.0)
    server.interrupt()
    assert server.wait() == 0
    assert server.processes() == {}
    assert ended.wait(5.0), "the client of the open stream hangs"
    assert "Traceback" not in server.output


def test_sigterm_drains_and_a_second_signal_does_not_wait(start_server: Callable[..., Any]) -> None:
    server = start_server()
    server.wait_for("ready after")
    ended = threading.Event()
    threading.Thread(target=_stream, args=(server.url, ended), daemon=True).start()
    time.sleep(1.0)
    server.process.terminate()
    server.wait_for("stopping")
    refusal = _refusal(server.url)
    assert refusal.code == 503
    assert int(refusal.headers["retry-after"]) > 0
    assert json.load(refusal)["error"]["code"] == "draining"
    assert not ended.is_set(), "what is open goes on"
    server.interrupt()
    assert server.wait(5.0) == 130
    assert server.processes() == {}
    assert ended.wait(5.0), "the client of the open stream hangs"


def test_ctrl_c_while_starting_leaves_no_process(start_server: Callable[..., Any]) -> None:
    server = start_server()
    server.wait_for(f"starting 1 x {EMBEDDED_MODEL}")
    server.interrupt()
    assert server.wait() == 0
    assert server.processes() == {}
    assert "Traceback" not in server.output


def test_a_replica_that_cannot_start_says_why_and_stops_everything(
    start_server: Callable[..., Any], tmp_path: Path
) -> None:
    model = tmp_path / "tiny.gguf"
    shutil.copy(locate_model(EMBEDDED_MODEL), model)
    server = start_server(str(model))
    server.wait_for("starting 1 x tiny")
    os.truncate(model, 20_000_000)  # what can be known before is refused before
    assert server.wait(120) == 1
    errors = [line for line in server.output.splitlines() if line.startswith("shoal: error: ")]
    assert len(errors) == 1
    assert f"tiny: {model} is truncated" in errors[0]
    assert server.processes() == {}
    assert "Traceback" not in server.output


def _refusal(url: str) -> urllib.error.HTTPError:
    """Of a readiness probe, within a few seconds."""
    deadline = time.monotonic() + 10
    while True:
        try:
            urllib.request.urlopen(f"{url}/health", timeout=10).close()
        except urllib.error.HTTPError as error:
            return error
        assert time.monotonic() < deadline, "still ready"
        time.sleep(0.05)


def _stream(url: str, ended: threading.Event) -> None:
    body = {"model": EMBEDDED_MODEL, "prompt": "Count:", "max_tokens": 8000, "stream": True, "ignore_eos": True}
    request = urllib.request.Request(
        f"{url}/v1/completions", json.dumps(body).encode(), {"content-type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            for _ in response:
                pass
    except OSError:
        pass  # cut off: that is an end too
    finally:
        ended.set()
