"""Where log lines of `shoal` go and how they look, the same in gateways, replicas, ranks and `shoal serve`.

As text, or as one JSON object a line with timestamp, level, logger, message and, where they are known, request_id,
trace_id, replica and node, beside what a line itself tells. Serve writes the files of its replicas: there our fields
are added to each of its lines, ours among them.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import sys
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from datetime import UTC, datetime
from logging.handlers import MemoryHandler
from typing import Any, Final, Literal, TextIO

import msgspec

LogFormat = Literal["text", "json"]
LEVEL_ENV: Final = "SHOAL_LOG_LEVEL"
FORMAT_ENV: Final = "SHOAL_LOG_FORMAT"
TEXT_FORMAT: Final = "%(asctime)s %(levelname)s %(name)s: %(message)s"

_STANDARD: Final = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}
_ADDED: Final = ("timestamp", "level", "logger", "replica", "node", "request_id", "trace_id")
_call: ContextVar[tuple[str, str]] = ContextVar("shoal_call", default=("", ""))  # request id, trace id


@contextlib.contextmanager
def about_request(request_id: str, traceparent: str = "") -> Iterator[None]:
    """Lines that are logged within tell that they are about this request."""
    trace_id = traceparent.split("-")[1] if traceparent.count("-") >= 3 else ""
    token = _call.set((request_id, trace_id))
    try:
        yield
    finally:
        _call.reset(token)


class ContextFilter(logging.Filter):
    """Adds our fields to every record. Lets all pass."""

    def __init__(self, *, replica: str = "", node: str = "") -> None:
        super().__init__()
        self._replica = replica
        self._node = node or socket.gethostname()

    def filter(self, record: logging.LogRecord) -> bool:
        values = vars(record)
        request_id, trace_id = _call.get()
        values["timestamp"] = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        values["level"] = record.levelname
        values["logger"] = record.name
        values["node"] = self._node
        if self._replica:
            values.setdefault("replica", self._replica)
        if request_id:
            values.setdefault("request_id", request_id)
        if trace_id:
            values.setdefault("trace_id", trace_id)
        return True


class JsonFormatter(logging.Formatter):
    """One JSON object a line. For handlers with a ContextFilter."""

    def format(self, record: logging.LogRecord) -> str:
        values = vars(record)
        line: dict[str, Any] = {name: values[name] for name in _ADDED if values.get(name)}
        line["message"] = record.getMessage()
        line |= {name: value for name, value in values.items() if _is_told(name) and name not in line}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return msgspec.json.encode(line, enc_hook=str).decode()


def _is_told(name: str) -> bool:
    return name not in _STANDARD and not name.startswith("_")  # Ray adds a private one


def log_to_serve(format: LogFormat, level: str, *, replica: str = "", node: str = "") -> None:
    """Inside a Serve replica: send `shoal` log records where Serve sends its own. Once per process is enough.

    Serve's LoggingConfig decides between text and JSON.
    """
    ours = logging.getLogger("shoal")
    ours.setLevel(level)
    for handler in logging.getLogger("ray.serve").handlers:
        if isinstance(handler, MemoryHandler):
            handler.capacity = 1  # with RAY_SERVE_THROUGHPUT_OPTIMIZED, Serve holds lines back until there are 1,000
        if format == "json" and not any(isinstance(one, ContextFilter) for one in handler.filters):
            handler.addFilter(ContextFilter(replica=replica, node=node))
        if handler not in ours.handlers:
            ours.addHandler(handler)


def log_to(stream: TextIO, format: LogFormat, level: str, *, replica: str = "", node: str = "") -> None:
    """In a process of our own: `shoal` log records to a stream, in place of where they went before."""
    handler = logging.StreamHandler(stream)
    if format == "json":
        handler.addFilter(ContextFilter(replica=replica, node=node))
        handler.setFormatter(JsonFormatter())
    else:
        handler.setFormatter(logging.Formatter(TEXT_FORMAT))
    ours = logging.getLogger("shoal")
    ours.handlers[:] = [handler]
    ours.propagate = False
    ours.setLevel(level)


def log_environment(format: LogFormat, level: str) -> dict[str, str]:
    """For processes that learn it from their environment: see `log_as_environment_says`."""
    return {FORMAT_ENV: format, LEVEL_ENV: level}


def log_as_environment_says(environment: Mapping[str, str], *, replica: str = "") -> None:
    """In a rank's process."""
    is_json = environment.get(FORMAT_ENV) == "json"
    log_to(sys.stderr, "json" if is_json else "text", environment.get(LEVEL_ENV, "INFO"), replica=replica)
