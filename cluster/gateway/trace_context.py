"""Which trace a request belongs to: W3C Trace Context's traceparent (www.w3.org/TR/trace-context), read and written."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from typing import Final

TRACEPARENT: Final = "traceparent"
_FORM: Final = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")
_IDS: Final = random.SystemRandom()


@dataclass(frozen=True, slots=True)
class TraceContext:
    """A request's own span in its trace. parent_id: the client's span, empty where it named none."""

    trace_id: str
    span_id: str
    parent_id: str
    is_sampled: bool

    @property
    def traceparent(self) -> str:
        """For what this request asks of others."""
        return f"00-{self.trace_id}-{self.span_id}-{'01' if self.is_sampled else '00'}"


def trace_context(traceparent: str | None, *, sample_ratio: float | None) -> TraceContext | None:
    """The client's trace if it names a valid one, with its decision about sampling; else a new one, sampled with
    `sample_ratio`, or None without that.
    """
    found = _FORM.fullmatch(traceparent.strip().lower()) if traceparent is not None else None
    if found is not None and _is_valid(*found.groups()):
        _, trace_id, parent_id, flags, _ = found.groups()
        return TraceContext(trace_id, new_span_id(), parent_id, bool(int(flags, 16) & 1))
    if sample_ratio is None:
        return None
    trace_id = _new_id(128)
    # As OpenTelemetry's TraceIdRatioBased: every service with this ratio takes the same traces.
    return TraceContext(trace_id, new_span_id(), "", int(trace_id[16:], 16) < round(sample_ratio * 2**64))


def _is_valid(version: str, trace_id: str, parent_id: str, flags: str, rest: str | None) -> bool:
    has_own_form = version != "00" or rest is None  # later versions may add fields
    return version != "ff" and has_own_form and bool(int(trace_id, 16)) and bool(int(parent_id, 16))


def new_span_id() -> str:
    return _new_id(64)


def _new_id(bits: int) -> str:
    return f"{_IDS.getrandbits(bits) or 1:0{bits // 4}x}"
