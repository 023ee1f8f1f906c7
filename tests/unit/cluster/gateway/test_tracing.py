"""Spans as a collector gets them, over OTLP; and that nobody waits for a collector that is away."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from tests.unit.cluster.gateway.test_timeline import ended, visit

from shoal.cluster.gateway import tracing
from shoal.cluster.gateway.timeline import Ended
from shoal.cluster.gateway.trace_context import trace_context
from shoal.cluster.gateway.tracing import OtlpExport

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


class Collector(BaseHTTPRequestHandler):
    spans: list[Any] = []  # noqa: RUF012  (the fixture empties it)
    resources: list[Any] = []  # noqa: RUF012

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
            self.resources.append({one.key: one.value.string_value for one in resource.resource.attributes})
            self.spans.extend(span for scope in resource.scope_spans for span in scope.spans)
        self.send_response(200 if self.path == "/v1/traces" else 404)
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def endpoint() -> Iterator[str]:
    Collector.spans.clear()
    Collector.resources.clear()
    with ThreadingHTTPServer(("127.0.0.1", 0), Collector) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def an_ended(traceparent: str | None = PARENT) -> Ended:
    return ended(visit(), trace=trace_context(traceparent, sample_ratio=1.0))


def attributes_of(span: Any) -> dict[str, Any]:
    return {one.key: getattr(one.value, one.value.WhichOneof("value")) for one in span.attributes}


def test_a_collector_gets_the_tree_with_times_that_nest(endpoint: str) -> None:
    export = OtlpExport(endpoint, period_s=0.01, gateway="g7")
    one = an_ended()
    timeline, trace = one.timeline(), one.recording.trace
    export(one)
    export.close()
    assert (export.num_exported, export.num_dropped) == (1, 0)
    assert Collector.resources[0]["service.instance.id"] == "g7"
    spans = {span.span_id.hex(): span for span in Collector.spans}
    assert len(spans) == len(Collector.spans) == 20
    assert {span.trace_id.hex() for span in spans.values()} == {"0af7651916cd43dd8448eb211c80319c"}
    assert trace is not None
    root = spans[trace.span_id]
    assert (root.name, root.parent_span_id.hex()) == ("chat m", "b7ad6b7169203331")
    assert root.start_time_unix_nano == 1_700_000_000_000_000_000
    assert root.end_time_unix_nano - root.start_time_unix_nano == pytest.approx(4.1e9, abs=1e3)
    paths = []
    for span in spans.values():
        if span is root:
            continue
        parent = spans[span.parent_span_id.hex()]
        assert parent.start_time_unix_nano <= span.start_time_unix_nano <= span.end_time_unix_nano
        assert span.end_time_unix_nano <= parent.end_time_unix_nano
        paths.append(f"{parent.name}/{span.name}")
    assert sorted(paths) == sorted(
        [f"chat m/{name}" for name in ("auth", "read", "tokenize", "call", "answer")]
        + ["call/prefill", "call/decode"] * 2
        + [f"call/{name}" for name in ("held", "route", "send", "queue", "preempted", "recompute")]
        + ["decode/rank pp0/tp0", "decode/rank pp1/tp0"] * 2
    )
    about = attributes_of(root)
    assert about["gen_ai.request.model"] == "m"
    assert about["gen_ai.usage.input_tokens"] == 3100
    assert about["gen_ai.usage.output_tokens"] == 50
    assert about["gen_ai.latency.time_in_queue"] == pytest.approx(2.1)
    assert about["gen_ai.latency.time_in_model_prefill"] == pytest.approx(0.4)
    assert about["gen_ai.latency.time_to_first_token"] == pytest.approx(timeline.ttft_s)
    (event,) = root.events
    assert event.name == "preempted"
    assert root.start_time_unix_nano < event.time_unix_nano < root.end_time_unix_nano
    (rank,) = [span for span in spans.values() if span.name == "rank pp1/tp0"][:1]
    assert attributes_of(rank)["shoal.wait_s"] == pytest.approx(0.7)


def test_a_collector_that_is_away_holds_nobody_up_and_what_is_lost_is_counted(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(tracing, "EXPORT_TIMEOUT_S", 0.2)
    export = OtlpExport("http://127.0.0.1:9", max_queued=50, period_s=0.01)
    one = an_ended(None)
    start = time.perf_counter()
    for _ in range(300):
        export(one)
    assert time.perf_counter() - start < 0.1
    start = time.perf_counter()
    export.close()
    assert time.perf_counter() - start < tracing.CLOSE_TIMEOUT_S + 1
    assert export.num_exported == 0
    assert export.num_dropped >= 250
    points = {point.labels: point.value for point in export.snapshot()}
    assert points[("exported",)] == 0.0
    assert len([one for one in caplog.records if "collector" in one.getMessage()]) == 1


def test_an_endpoint_may_name_the_path_of_its_traces(endpoint: str) -> None:
    export = OtlpExport(f"{endpoint}/v1/traces", period_s=0.01)
    export(an_ended(None))
    export.close()
    assert export.num_exported == 1
