"""Follows every HTTP request to its end: its timeline is kept and exported, and one line of it is logged."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any, Final

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from shoal.cluster.gateway.explanation import explain
from shoal.cluster.gateway.timeline import Ended, Recording, Timeline, TimelineStore, outcome_of
from shoal.cluster.gateway.trace_context import TRACEPARENT, trace_context
from shoal.cluster.logs import about_request

log = logging.getLogger(__name__)

_CLIENT_GONE: Final = 499
_RECORDED: Final = frozenset(("/v1/chat/completions", "/v1/completions"))


class Recorder:
    """Keeps timelines of one gateway. `sample_ratio`: of the traces that begin here, None where there is no tracing;
    `export` gets those that are sampled. It must not block.
    """

    def __init__(
        self,
        *,
        sample_ratio: float | None = None,
        export: Callable[[Ended], None] | None = None,
        store: TimelineStore | None = None,
    ) -> None:
        self._sample_ratio = sample_ratio
        self._export = export
        self._store = store or TimelineStore()

    def begin(self, request_id: str, path: str, traceparent: str | None) -> Recording:
        trace = trace_context(traceparent, sample_ratio=self._sample_ratio)
        return Recording(request_id, path, time.monotonic(), time.time(), trace)

    def end(self, recording: Recording, status: int, *, is_cut_off: bool) -> Ended:
        ended = Ended(recording, status, time.monotonic(), is_cut_off)
        self._store.add(ended)
        if self._export is not None and recording.trace is not None and recording.trace.is_sampled:
            self._export(ended)
        return ended

    def timeline(self, request_id: str) -> dict[str, Any] | None:
        """The newest one of a request, by its x-request-id or the `id` of its answer, as JSON takes it.

        The fields of Timeline and TimelineSpan, and "explanation", a list of sentences, the longest times first.
        """
        found = self._store.find(request_id)
        return None if found is None else asdict(found) | {"explanation": explain(found)}

    def timelines(self, limit: int) -> dict[str, list[dict[str, Any]]]:
        """{"recent": newest first, "slowest": slowest first}, `limit` of each at most; each with the fields of Timeline
        but "spans", and the first sentence of its explanation as "reason".
        """
        return {
            "recent": [_summary(one) for one in self._store.recent(limit)],
            "slowest": [_summary(one) for one in self._store.slowest(limit)],
        }


def _summary(timeline: Timeline) -> dict[str, Any]:
    values = {name: getattr(timeline, name) for name in Timeline.__slots__ if name != "spans"}
    return values | {"reason": next(iter(explain(timeline)), "")}


class RecordingMiddleware:
    """Gives requests for tokens a recording, `state["recording"]`, and logs every request once it is over."""

    def __init__(self, app: ASGIApp, recorder: Recorder) -> None:
        self._app = app
        self._recorder = recorder

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start = time.monotonic()
        request_id = scope["state"]["request_id"]
        traceparent = _header(scope, TRACEPARENT.encode())
        recording = self._recorder.begin(request_id, scope["path"], traceparent) if _is_recorded(scope) else None
        scope["state"]["recording"] = recording
        status, is_over = _CLIENT_GONE, False

        async def send_and_look(message: Message) -> None:
            nonlocal status, is_over
            if message["type"] == "http.response.start":
                status = message["status"]
                if recording is not None and recording.trace is not None:
                    header = (TRACEPARENT.encode(), recording.trace.traceparent.encode())
                    message["headers"] = [*message.get("headers", ()), header]
            await send(message)
            is_over = message["type"] == "http.response.body" and not message.get("more_body", False)

        try:
            with about_request(request_id, traceparent or ""):
                await self._app(scope, receive, send_and_look)
        except Exception:
            status, is_over = 500, True
            raise
        finally:
            if recording is None:
                _log_other(scope, request_id, status, time.monotonic() - start)
            else:
                _log_ended(self._recorder.end(recording, status, is_cut_off=not is_over))


def _is_recorded(scope: Scope) -> bool:
    return scope["method"] == "POST" and scope["path"] in _RECORDED


def _header(scope: Scope, name: bytes) -> str | None:
    for key, value in scope["headers"]:
        if key == name:
            return str(value.decode("latin-1"))
    return None


def _log_ended(ended: Ended) -> None:
    if not log.isEnabledFor(logging.INFO):
        return
    one = ended.recording
    num_prompt = num_cached = num_generated = num_preemptions = 0
    ttft_s: float | None = None
    for visit in one.visits:
        num_prompt += visit.num_prompt_tokens
        num_cached += visit.num_cached_tokens
        num_generated += visit.num_tokens
        num_preemptions += sum([times.num_preemptions for times in visit.times])
        if visit.first_s is not None:
            ttft_s = min(visit.first_s - one.arrived_s, ttft_s if ttft_s is not None else math.inf)
    fields: Mapping[str, Any] = {
        "request_id": one.request_id,
        "trace_id": one.trace.trace_id if one.trace is not None else "",
        "answer_id": one.answer_id,
        "path": one.path,
        "model": one.model,
        "tenant": one.tenant,
        "status": ended.status,
        "outcome": outcome_of(ended),
        "seconds": round(ended.seconds, 6),
        "ttft_s": round(ttft_s, 6) if ttft_s is not None else None,
        "num_prompt_tokens": num_prompt,
        "num_cached_tokens": num_cached,
        "num_output_tokens": num_generated,
        "num_preemptions": num_preemptions,
    }
    log.info(
        "POST %s %d %s in %.3f s: %d prompt tokens, %d cached, %d generated [%s]",
        one.path, ended.status, fields["outcome"], ended.seconds, num_prompt, num_cached, num_generated,
        one.request_id, extra=fields,
    )  # fmt: skip


def _log_other(scope: Scope, request_id: str, status: int, seconds: float) -> None:
    """What asks for no tokens; probes and scrapes come all the time."""
    level = logging.DEBUG if scope["method"] == "GET" and status < 500 else logging.INFO
    if log.isEnabledFor(level):
        path = scope["path"][:200]
        fields = {"request_id": request_id, "path": path, "status": status, "seconds": round(seconds, 6)}
        log.log(
            level, "%s %s %d in %.3f s [%s]", scope["method"], repr(path)[1:-1], status, seconds, request_id,
            extra=fields,
        )  # fmt: skip
