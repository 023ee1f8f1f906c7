"""Prometheus, as configured here, answers every panel's and every rule's query with data."""

from __future__ import annotations

import http.server
import json
import shutil
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[3]
CONFIGURATION = ROOT / "deploy/prometheus"
START_TIMEOUT_S = 30.0
SPACING_S, NUM_SCRAPES = 60, 12  # of the past that it begins with: enough for rates over 5 minutes


class Prometheus:
    def __init__(self, port: int) -> None:
        self._url = f"http://127.0.0.1:{port}"

    def get(self, path: str, **query: str) -> Any:
        with urllib.request.urlopen(f"{self._url}{path}?{urllib.parse.urlencode(query)}", timeout=10) as answer:
            return json.loads(answer.read())["data"]

    def ask(self, query: str) -> list[dict[str, Any]]:
        found = self.get("/api/v1/query", query=query)["result"]
        assert isinstance(found, list)
        return found

    def is_ready(self) -> bool:
        try:
            return urllib.request.urlopen(f"{self._url}/-/ready", timeout=10).status == 200
        except (urllib.error.URLError, ConnectionError):
            return False


def wait_until(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@pytest.fixture(scope="module")
def exporter(scrape: Callable[[int], str]) -> Iterator[int]:
    """The port of something that has our metrics at /metrics; they grow from scrape to scrape."""
    numbers = iter(range(NUM_SCRAPES, 10**6))

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            is_there = self.path == "/metrics"
            self.send_response(200 if is_there else 404)
            self.send_header("content-type", "text/plain; version=0.0.4; charset=utf-8")
            self.end_headers()
            if is_there:
                self.wfile.write(scrape(next(numbers)).encode())

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server.server_address[1]
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def past(scrape: Callable[[int], str], tmp_path_factory: pytest.TempPathFactory, promtool: Callable[..., str]) -> Path:
    """A data folder with some minutes of scrapes, the last one now."""
    folder = tmp_path_factory.mktemp("past")
    now = int(time.time())
    lines = []
    for n in range(NUM_SCRAPES):
        stamp = now - SPACING_S * (NUM_SCRAPES - 1 - n)
        lines += [f"{line} {stamp}\n" for line in scrape(n).splitlines()]
    (folder / "scrapes.txt").write_text("".join(lines) + "# EOF\n")
    promtool("tsdb", "create-blocks-from", "openmetrics", folder / "scrapes.txt", folder / "data")
    return folder / "data"


@pytest.fixture(scope="module")
def prometheus(exporter: int, past: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    """With the configuration that comes with Shoal, but for the port that it scrapes and how often."""
    if shutil.which("prometheus") is None:
        pytest.skip("prometheus is not installed; Debian has it in the package of this name")
    folder = tmp_path_factory.mktemp("prometheus")
    for name in ("rules.yaml", "alerts.yaml"):
        shutil.copy(CONFIGURATION / name, folder)
    text = (CONFIGURATION / "prometheus.yaml").read_text()
    assert "'127.0.0.1:8001'" in text
    assert text.count("_interval: 15s") == 2
    text = text.replace("127.0.0.1:8001", f"127.0.0.1:{exporter}").replace("_interval: 15s", "_interval: 1s")
    (folder / "prometheus.yaml").write_text(text)
    port = free_port()
    with (folder / "log.txt").open("wb") as log:
        process = subprocess.Popen(
            ["prometheus", f"--config.file={folder / 'prometheus.yaml'}", f"--storage.tsdb.path={past}",
             f"--web.listen-address=127.0.0.1:{port}"],
            stdout=log, stderr=subprocess.STDOUT,
        )  # fmt: skip
    try:
        server = Prometheus(port)
        wait_until(lambda: process.poll() is not None or server.is_ready())
        assert process.poll() is None, (folder / "log.txt").read_text()
        yield server
    finally:
        process.terminate()
        process.wait(START_TIMEOUT_S)


def test_every_panel_has_data(prometheus: Prometheus, panel_queries: list[tuple[str, str]]) -> None:
    empty = [f"{where}: {query}" for where, query in panel_queries if not prometheus.ask(query)]
    assert not empty, "\n".join(empty)
    numbers = [one["value"][1] for _, query in panel_queries for one in prometheus.ask(query)]
    assert "NaN" not in numbers
    assert "+Inf" not in numbers


def test_every_rule_is_evaluated_and_every_recording_has_values(prometheus: Prometheus) -> None:
    def rules() -> list[dict[str, Any]]:
        return [rule for group in prometheus.get("/api/v1/rules")["groups"] for rule in group["rules"]]

    wait_until(lambda: all(rule["health"] != "unknown" for rule in rules()))
    assert [rule["lastError"] for rule in rules() if rule["health"] != "ok"] == []
    recordings = [rule["name"] for rule in rules() if rule["type"] == "recording"]
    assert recordings
    wait_until(lambda: all(prometheus.ask(name) for name in recordings))


def test_it_scrapes_what_shoal_serves(prometheus: Prometheus) -> None:
    wait_until(lambda: [one["value"][1] for one in prometheus.ask('up{job="shoal"}')] == ["1"])
    (target,) = prometheus.get("/api/v1/targets")["activeTargets"]
    assert target["scrapeUrl"].endswith("/metrics")
    assert target["lastError"] == ""
