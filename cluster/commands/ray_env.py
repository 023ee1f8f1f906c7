"""`shoal ray-env`: the environment in which Ray serves Shoal best, for `ray start` on every node."""

from __future__ import annotations

import shlex

from shoal.cluster.commands.haproxy import HEADER_TIMEOUT_ENV, guarded_haproxy
from shoal.cluster.config import NODE_CHECK_ENV, SERVE_ENV, HttpSettings


def ray_environment(header_timeout_s: float) -> dict[str, str]:
    """Of a node of a Ray cluster: SERVE_ENV, and where its HAProxy is. Without one, Serve's own proxy does.

    `header_timeout_s`: what HAProxy gives a client for all its headers.
    """
    haproxy = guarded_haproxy()
    has_proxy = {
        "RAY_SERVE_ENABLE_HA_PROXY": "0" if haproxy is None else SERVE_ENV["RAY_SERVE_ENABLE_HA_PROXY"],
        "RAY_SERVE_HAPROXY_BINARY_PATH": "" if haproxy is None else str(haproxy),
    }
    timeout = {HEADER_TIMEOUT_ENV: str(round(header_timeout_s * 1000))}
    return {"RAY_USAGE_STATS_ENABLED": "0", **SERVE_ENV, **has_proxy, **timeout}


def ray_env() -> int:
    """Print lines that a shell can evaluate."""
    for name, value in {**ray_environment(HttpSettings().header_timeout), **NODE_CHECK_ENV}.items():
        print(f"export {name}={shlex.quote(value)}")
    return 0
