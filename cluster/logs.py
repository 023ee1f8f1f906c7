"""Where our log lines go inside a Serve replica."""

from __future__ import annotations

import logging


def adopt_serve_handlers() -> None:
    """Send `shoal` log records where Serve sends its own: the replica's log file. Once per process is enough."""
    ours = logging.getLogger("shoal")
    ours.setLevel(logging.INFO)
    for handler in logging.getLogger("ray.serve").handlers:
        if handler not in ours.handlers:
            ours.addHandler(handler)
