"""Timelines as OpenTelemetry spans, sent to an OTLP collector over HTTP in the background.

The one place that imports opentelemetry, and only where `tracing.otlp_endpoint` is set. A request never waits for it:
timelines go into a bounded queue, from which a thread takes them. What does not fit, because the collector is slow or
away, is dropped and counted.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Final

from shoal.cluster.gateway.timeline import Ended, Timeline, TimelineSpan
from shoal.cluster.gateway.trace_context import TraceContext, new_span_id
from shoal.cluster.metrics import TRACES, Point, Snapshot

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import ReadableSpan

log = logging.getLogger(__name__)

MAX_QUEUED: Final = 2048  # timelines
MAX_BATCH: Final = 64
BATCH_PERIOD_S: Final = 1.0
EXPORT_TIMEOUT_S: Final = 5.0
CLOSE_TIMEOUT_S: Final = 3.0
TRACES_PATH: Final = "/v1/traces"


class OtlpExport:
    """Sends timelines to the collector at `endpoint`, "http://host:4318" or the whole URL of its traces."""

    def __init__(
        self, endpoint: str, *, max_queued: int = MAX_QUEUED, period_s: float = BATCH_PERIOD_S, gateway: str = ""
    ) -> None:
        """`gateway` names this process in the traces."""
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource

        url = endpoint.rstrip("/")
        self._exporter = OTLPSpanExporter(
            endpoint=url if url.endswith(TRACES_PATH) else url + TRACES_PATH, timeout=EXPORT_TIMEOUT_S
        )
        # One line of ours for a batch that was lost, instead of the client's for each try.
        logging.getLogger("opentelemetry.exporter.otlp.proto.http").setLevel(logging.CRITICAL)
        self._resource = Resource.create({"service.name": "shoal", "service.instance.id": gateway})
        self._period_s = period_s
        self._queue: queue.Queue[Ended] = queue.Queue(max_queued)
        self._closing = threading.Event()
        self.num_exported = 0  # timelines
        self.num_dropped = 0
        self._is_lost = False
        self._thread = threading.Thread(target=self._run, name="otlp-export", daemon=True)
        self._thread.start()

    def __call__(self, ended: Ended) -> None:
        """Never blocks, never raises."""
        try:
            self._queue.put_nowait(ended)
        except queue.Full:
            self.num_dropped += 1

    def snapshot(self) -> Snapshot:
        return (
            Point(TRACES.name, ("exported",), float(self.num_exported)),
            Point(TRACES.name, ("dropped",), float(self.num_dropped)),
        )

    def close(self) -> None:
        """Send what is queued, for CLOSE_TIMEOUT_S at most."""
        self._closing.set()
        self._thread.join(CLOSE_TIMEOUT_S)
        self._exporter.shutdown()  # type: ignore[no-untyped-call]

    def _run(self) -> None:
        while not (self._closing.wait(self._period_s) and self._queue.empty()):
            while batch := self._take():
                self._send(batch)

    def _take(self) -> list[Ended]:
        batch: list[Ended] = []
        while len(batch) < MAX_BATCH:
            try:
                batch.append(self._queue.get_nowait())
            except queue.Empty:
                break
        return batch

    def _send(self, batch: list[Ended]) -> None:
        from opentelemetry.sdk.trace.export import SpanExportResult

        try:
            spans = [span for ended in batch for span in spans_of(ended, self._resource)]
            is_sent = self._exporter.export(spans) is SpanExportResult.SUCCESS
        except Exception:
            log.exception("timelines could not be exported")
            is_sent = False
        if is_sent:
            self.num_exported += len(batch)
        else:
            self.num_dropped += len(batch)
        if not is_sent and not self._is_lost:
            log.warning("the trace collector does not take traces; they are dropped until it does")
        self._is_lost = not is_sent


def spans_of(ended: Ended, resource: Any) -> list[ReadableSpan]:
    """The request's own span, whose parent is the client's, and below it all that its timeline tells."""
    trace, timeline = ended.recording.trace, ended.timeline()
    assert trace is not None
    return list(_Spans(timeline, trace, resource).all())


class _Spans:
    def __init__(self, timeline: Timeline, trace: TraceContext, resource: Any) -> None:
        from opentelemetry.trace import SpanContext, TraceFlags

        self._timeline = timeline
        self._trace = trace
        self._resource = resource
        self._flags = TraceFlags(TraceFlags.SAMPLED)
        self._context = SpanContext

    def all(self) -> Iterator[ReadableSpan]:
        from opentelemetry.sdk.trace import Event
        from opentelemetry.trace import SpanKind, Status, StatusCode

        timeline, trace = self._timeline, self._trace
        operation = "chat" if "chat" in timeline.path else "text_completion"
        gone = [span for call in timeline.spans for span in call.spans if span.name == "preempted"]
        is_error = timeline.outcome == "failed"
        yield self._span(
            f"{operation} {timeline.model}".rstrip(),
            trace.span_id,
            trace.parent_id,
            (0.0, timeline.seconds),
            _request_attributes(timeline, operation),
            kind=SpanKind.SERVER,
            is_remote_parent=True,
            status=Status(StatusCode.ERROR if is_error else StatusCode.UNSET),
            events=[Event("preempted", {"seconds": span.seconds}, self._ns(span.start_s)) for span in gone],
        )
        for span in timeline.spans:
            yield from self._tree(span, trace.span_id, (0.0, timeline.seconds))

    def _tree(self, span: TimelineSpan, parent_id: str, within: tuple[float, float]) -> Iterator[ReadableSpan]:
        own_id = new_span_id()
        start = min(max(span.start_s, within[0]), within[1])
        end = min(max(span.end_s, start), within[1])
        yield self._span(span.name, own_id, parent_id, (start, end), dict(_flat("shoal", span.attributes)))
        for child in span.spans:
            yield from self._tree(child, own_id, (start, end))

    def _span(
        self,
        name: str,
        span_id: str,
        parent_id: str,
        times: tuple[float, float],
        attributes: Mapping[str, Any],
        *,
        is_remote_parent: bool = False,
        **fields: Any,
    ) -> ReadableSpan:
        from opentelemetry.sdk.trace import ReadableSpan

        return ReadableSpan(
            name,
            context=self._span_context(span_id, is_remote=False),
            parent=self._span_context(parent_id, is_remote=is_remote_parent) if parent_id else None,
            resource=self._resource,
            attributes=dict(attributes),
            start_time=self._ns(times[0]),
            end_time=self._ns(times[1]),
            **fields,
        )

    def _span_context(self, span_id: str, *, is_remote: bool) -> Any:
        return self._context(int(self._trace.trace_id, 16), int(span_id, 16), is_remote, self._flags)

    def _ns(self, seconds: float) -> int:
        return round((self._timeline.started_unix_s + seconds) * 1e9)


def _request_attributes(timeline: Timeline, operation: str) -> dict[str, Any]:
    """Names of OpenTelemetry's conventions for HTTP and generative AI; gen_ai.latency.* and request.id as vLLM's."""
    call = max((span for span in timeline.spans if span.name == "call"), key=lambda span: span.end_s, default=None)
    seconds: dict[str, float] = {}
    for span in call.spans if call is not None else ():
        seconds[span.name] = seconds.get(span.name, 0.0) + span.seconds
    known: dict[str, Any] = {
        "http.request.method": "POST",
        "url.path": timeline.path,
        "http.response.status_code": timeline.status,
        "gen_ai.operation.name": operation,
        "gen_ai.provider.name": "shoal",
        "gen_ai.request.model": timeline.model,
        "gen_ai.response.model": timeline.model,
        "gen_ai.response.id": timeline.answer_id,
        "gen_ai.request.id": timeline.request_id,
        "gen_ai.usage.input_tokens": timeline.num_prompt_tokens,
        "gen_ai.usage.cache_read.input_tokens": timeline.num_cached_tokens,
        "gen_ai.usage.output_tokens": timeline.num_output_tokens,
        "gen_ai.latency.e2e": timeline.seconds,
        "gen_ai.latency.time_in_queue": seconds.get("held", 0.0) + seconds.get("queue", 0.0),
        "gen_ai.latency.time_in_model_prefill": seconds.get("prefill", 0.0),
        "gen_ai.latency.time_in_model_decode": seconds.get("decode", 0.0),
        "shoal.request_id": timeline.request_id,
        "shoal.tenant": timeline.tenant,
        "shoal.outcome": timeline.outcome,
        "shoal.num_preemptions": timeline.num_preemptions,
    }
    if timeline.ttft_s is not None:
        known["gen_ai.latency.time_to_first_token"] = timeline.ttft_s
    return known


def _flat(prefix: str, values: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Attributes hold single values: what is nested goes by dotted names."""
    for name, value in values.items():
        key = f"{prefix}.{name}"
        if isinstance(value, Mapping):
            yield from _flat(key, value)
        elif isinstance(value, list):
            for index, one in enumerate(value):
                yield from _flat(f"{key}.{index}", one)
        elif value is not None:
            yield key, value
