"""Why a request was slow: both halves on one clock, in words, kept for a while, told to clients that ask and to a
collector of traces, for which nobody waits.
"""

from __future__ import annotations

import asyncio
import json
import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from shoal.cluster.gateway import tracing
from shoal.cluster.gateway.admission import Admission, Objectives, Visit
from shoal.cluster.gateway.backend import GenerateCall, Placement, Prediction, ReplicaFailedError
from shoal.cluster.gateway.explanation import explain
from shoal.cluster.gateway.recording import Recorder
from shoal.cluster.gateway.routes import build_app
from shoal.cluster.gateway.timeline import (
    Ended,
    Recording,
    Timeline,
    TimelineSpan,
    TimelineStore,
    clock_shift,
    server_timing,
    timing_of,
)
from shoal.cluster.gateway.trace_context import TraceContext, trace_context
from shoal.cluster.gateway.tracing import OtlpExport
from shoal.engine.request import RequestTimes, SamplingParams
from shoal.engine.spans import RankWork, Span

CHAT: dict[str, Any] = {"model": "smollm2", "messages": [{"role": "user", "content": "What is the capital of France?"}]}
TEXT: dict[str, Any] = {"model": "smollm2", "prompt": "The capital of France is", "max_tokens": 8}

AHEAD = 5000.0  # the replica's host has run so much longer, in seconds
RANKS = (RankWork("pp0/tp0", 40, 0.8, 0.2), RankWork("pp1/tp0", 40, 0.3, 0.7))


def visit(*, way_s: float = 0.05, back_s: float = 0.002) -> Visit:
    """Held for 2 s, sent at 12.1, `way_s` to the replica, preempted there for 0.3 s, 1.9 s in all."""
    call = GenerateCall("chatcmpl-1", tuple(range(3100)), SamplingParams(max_tokens=50, seed=1))
    arrival = 12.1 + way_s + AHEAD
    moments = [arrival + after for after in (0.0, 0.1, 0.3, 0.5, 1.0, 1.3, 1.4, 1.9)]
    spans = (
        Span("queue", moments[0], moments[1], 0.1, waits=(("blocks", 0.08),), num_ahead=3, num_running=8),
        Span("prefill", moments[1], moments[2], 0.2, num_tokens=2048, num_cached=16, num_steps=1, mean_batch=9.0),
        Span("prefill", moments[2], moments[3], 0.2, num_tokens=1036, num_steps=1, mean_batch=9.0),
        Span("decode", moments[3], moments[4], 0.5, num_tokens=20, num_steps=20, mean_batch=9.0, ranks=RANKS),
        Span("preempted", moments[4], moments[5], 0.3, waits=(("blocks", 0.3),)),
        Span("recompute", moments[5], moments[6], 0.1, num_tokens=3120, num_steps=1, mean_batch=4.0),
        Span("decode", moments[6], moments[7], 0.5, num_tokens=28, num_steps=28, mean_batch=5.0, ranks=RANKS),
    )
    times = RequestTimes(arrival, moments[1], moments[3], moments[7], 3100, 50, 16, 1, 50, spans)
    one = Visit(call, "blue", Objectives(), arrived_s=10.05)
    one.held_since_s, one.queue_s, one.num_ahead, one.num_tenants_ahead = 10.1, 2.0, 14, 3
    one.sent_s, one.first_s = 12.1, moments[3] - AHEAD + back_s
    one.last_s = one.ended_s = moments[7] - AHEAD + back_s
    one.placement = Placement("1", 16, 0.4, 12.11, ({"replica": "1", "cost_s": 0.5},))
    one.num_tokens, one.num_cached_tokens = 50, 16
    one.times.append(times)
    return one


def ended(one: Visit, status: int = 200, *, is_cut_off: bool = False, trace: TraceContext | None = None) -> Ended:
    recording = Recording("r1", "/v1/chat/completions", 10.0, 1.7e9, taken_up_s=10.01, read_s=10.02, tokenized_s=10.05)
    recording.answer_id, recording.model, recording.tenant, recording.visits = "chatcmpl-1", "m", "blue", [one]
    recording.trace = trace
    return Ended(recording, status, 14.1, is_cut_off)


def recorded(one: Visit, status: int = 200, **fields: Any) -> Timeline:
    return ended(one, status, **fields).timeline()


def walk(spans: Iterable[TimelineSpan], within: tuple[float, float]) -> None:
    for span in spans:
        assert within[0] - 1e-9 <= span.start_s <= span.end_s <= within[1] + 1e-9, (span, within)
        walk(span.spans, (span.start_s, span.end_s))


@pytest.mark.parametrize(("way_s", "back_s"), [(0.05, 0.002), (0.0005, 0.04), (0.0, 0.0)])
def test_a_replicas_spans_lie_in_its_call_whatever_its_clock_says(way_s: float, back_s: float) -> None:
    one = visit(way_s=way_s, back_s=back_s)
    shift, error_s = clock_shift(one)
    assert abs(shift - -AHEAD) <= error_s + 1e-9
    assert error_s == pytest.approx(way_s + back_s)
    timeline = recorded(one)
    walk(timeline.spans, (0.0, timeline.seconds))
    (call,) = (span for span in timeline.spans if span.name == "call")
    assert [span.name for span in call.spans] == [
        "held", "route", "send", "queue", "prefill", "prefill", "decode", "preempted", "recompute", "decode",
    ]  # fmt: skip
    assert [rank.name for rank in call.spans[6].spans] == ["rank pp0/tp0", "rank pp1/tp0"]


def test_it_tells_what_took_the_time_and_the_longest_first() -> None:
    sentences = explain(recorded(visit()))
    assert sentences[0] == "2.0 s of 4.1 s: held in the gateway, 14 calls of 3 tenants were there already"
    assert (
        "1.0 s of 4.1 s: 48 tokens after the first, in 48 steps of 20.8 ms, with 9 requests in a step; "
        "rank pp0/tp0 computed 80% of its time, rank pp1/tp0 30%"
    ) in sentences
    assert "400 ms of 4.1 s: prefill of 3,084 tokens in 2 chunks; 16 more were cached" in sentences
    assert "300 ms of 4.1 s: preempted once: KV memory was full (300 ms)" in sentences
    assert "100 ms of 4.1 s: computing 3,120 tokens in 1 chunk again after a preemption" in sentences
    assert "100 ms of 4.1 s: waiting in replica 1, 3 ahead of it and 8 running: KV memory was full (80 ms)" in sentences
    total = sum(float(one.split()[0]) * (0.001 if one.split()[1] == "ms" else 1.0) for one in sentences)
    assert total == pytest.approx(4.1, abs=0.15), "all of the time is told of"


@pytest.mark.parametrize(
    ("status", "is_cut_off", "outcome", "first"),
    [
        (429, False, "refused", "It was refused with status 429."),
        (200, True, "client_gone", "The client left before its answer was over."),
        (503, False, "failed", "It failed: the log has the reason under its request id."),
    ],
)
def test_how_it_ended_comes_before_all(status: int, is_cut_off: bool, outcome: str, first: str) -> None:
    timeline = recorded(visit(), status, is_cut_off=is_cut_off)
    assert timeline.outcome == outcome
    assert explain(timeline)[0] == first


def test_server_timing_adds_up_to_the_call() -> None:
    one = visit()
    timing = timing_of([one])
    assert timing["queue"] == pytest.approx(2100.0)
    assert timing["prefill"] == pytest.approx(400.0)
    assert sum(timing.values()) == pytest.approx(1000 * (one.last_s - 10.1), abs=0.3)
    assert server_timing([one]).startswith("queue;dur=2100, route;dur=")


def test_the_store_keeps_the_last_and_the_slowest_for_a_while() -> None:
    now = 20.0
    store = TimelineStore(max_recent=3, max_slowest=2, memory_s=100.0, clock=lambda: now)

    def add(name: str, seconds: float) -> None:
        recording = Recording(f"r{name}", "/v1/completions", now - seconds, 1.7e9, answer_id=f"a{name}")
        store.add(Ended(recording, 200, now))

    for index, seconds in enumerate((9.0, 1.0, 2.0, 8.0, 3.0)):
        add(str(index), seconds)
    assert [one.request_id for one in store.recent(9)] == ["r4", "r3", "r2"]
    assert [one.request_id for one in store.slowest(9)] == ["r0", "r3"]
    assert [one.request_id for one in store.slowest(0)] == []
    assert [store.find(name) is not None for name in ("r0", "a0", "r1", "a3", "r4")] == [True, True, False, True, True]
    now = 121.0
    assert store.slowest(9) == []
    add("5", 0.5)
    assert [one.request_id for one in store.slowest(9)] == ["r5"]
    assert store.find("r0") is None


def test_what_is_kept_holds_no_prompt() -> None:
    one = visit()
    assert ended(one).timeline().num_prompt_tokens == 3100
    assert one.call.prompt_ids == ()


# -- over HTTP ------------------------------------------------------------------------------------------------


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


@pytest.fixture
def connect(served: Any, recorder: Recorder) -> Callable[..., httpx.AsyncClient]:
    def make(**options: Any) -> httpx.AsyncClient:
        app = build_app({"smollm2": served}, recorder=options.pop("recorder", recorder), **options)
        return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://gateway")

    return make


@pytest.mark.parametrize(("path", "body"), [("/v1/chat/completions", CHAT), ("/v1/completions", TEXT)])
@pytest.mark.parametrize("stream", [False, True])
async def test_every_request_can_be_asked_about(connect, recorder, backend, path, body, stream) -> None:
    backend.placed = Placement("3", 16, 0.1)
    async with connect() as client:
        answer = await client.post(path, json=body | {"stream": stream}, headers={"x-request-id": "mine"})
    assert answer.headers["x-request-id"] == "mine"
    found = recorder.timeline("mine")
    assert (found["outcome"], found["status"], found["model"], found["is_stream"]) == (
        "finished", 200, "smollm2", stream,
    )  # fmt: skip
    assert [span["name"] for span in found["spans"]] == ["auth", "read", "tokenize", "call", "answer"]
    assert found["num_output_tokens"] == sum(len(script) for script, _ in [backend.script(backend.calls[0])])
    assert found["ttft_s"] <= found["seconds"]
    event = answer.text.split("\n\n")[0].removeprefix("data: ") if stream else answer.text
    assert recorder.timeline(json.loads(event)["id"]) == found
    json.dumps(found)
    assert recorder.timelines(5)["recent"][0]["request_id"] == "mine"
    assert backend.calls[0].http_request_id == "mine"


async def test_a_client_that_asks_is_told_with_the_answer(connect, backend) -> None:
    async with connect() as client:
        headers = {"x-shoal-timeline": "1"}
        whole = await client.post("/v1/chat/completions", json=CHAT, headers=headers)
        assert [part.split(";")[0] for part in whole.headers["server-timing"].split(", ")] == [
            "queue", "route", "prefill", "decode",
        ]  # fmt: skip
        stream = await client.post("/v1/chat/completions", json=CHAT | {"stream": True}, headers=headers)
        plain = await client.post("/v1/chat/completions", json=CHAT | {"stream": True})
    *_, last, done = [part.removeprefix("data: ") for part in stream.text.split("\n\n") if part]
    assert done == "[DONE]"
    assert set(json.loads(last)["timeline"]) == {"queue", "route", "prefill", "decode"}
    assert json.loads(last)["choices"] == []
    assert "timeline" not in plain.text
    assert "usage" not in plain.text


async def test_refused_and_failed_ones_are_kept_too(connect, recorder, backend) -> None:
    async with connect() as client:
        backend.prediction = Prediction(ttft_s=7.3, tpot_s=0.2)
        headers = {"x-slo-ttft-ms": "250", "x-request-id": "late"}
        assert (await client.post("/v1/chat/completions", json=CHAT, headers=headers)).status_code == 429
        backend.prediction, backend.error = None, ReplicaFailedError("gone")
        failed = await client.post("/v1/chat/completions", json=CHAT, headers={"x-request-id": "lost"})
        assert failed.status_code == 503
        backend.error_after = 1
        stream = await client.post(
            "/v1/chat/completions", json=CHAT | {"stream": True}, headers={"x-request-id": "cut"}
        )
        assert "error" in stream.text
        bad = await client.post("/v1/chat/completions", json={"model": "nobody"}, headers={"x-request-id": "bad"})
        assert bad.status_code == 400
    assert [recorder.timeline(name)["outcome"] for name in ("late", "lost", "cut", "bad")] == [
        "refused", "failed", "failed", "refused",
    ]  # fmt: skip


async def test_a_client_that_left_has_a_timeline_up_to_there(connect, recorder, backend) -> None:
    backend.hangs_after = 1
    async with connect() as client:
        asking = asyncio.create_task(client.post("/v1/chat/completions", json=CHAT, headers={"x-request-id": "left"}))
        await asyncio.sleep(0.05)
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
    found = recorder.timeline("left")
    assert found["outcome"] == "client_gone"
    assert found["num_output_tokens"] == 2


async def test_one_line_tells_of_a_request_and_nothing_of_its_text(connect, backend, caplog) -> None:
    caplog.set_level(logging.INFO, logger="shoal")
    headers = {"x-request-id": "mine", "authorization": "Bearer sk-secret", "x-session-id": "private"}
    async with connect() as client:
        await client.post("/v1/chat/completions", json=CHAT, headers=headers)
        await client.get("/health")
    (record,) = [one for one in caplog.records if one.name.startswith("shoal.cluster.gateway.recording")]
    assert (record.request_id, record.status, record.model, record.outcome) == ("mine", 200, "smollm2", "finished")
    assert record.num_output_tokens > 0
    shown = record.getMessage() + repr(vars(record))
    assert "mine" in record.getMessage()
    for secret in ("capital", "Paris", "sk-secret", "private"):
        assert secret not in shown


async def test_the_clients_trace_goes_on_to_the_replica_and_comes_back(connect, backend) -> None:
    parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    async with connect() as client:
        answer = await client.post("/v1/chat/completions", json=CHAT, headers={"traceparent": parent})
        untraced = await client.post("/v1/chat/completions", json=CHAT)
    own = answer.headers["traceparent"]
    assert own.startswith("00-0af7651916cd43dd8448eb211c80319c-")
    assert own != parent
    assert backend.calls[0].traceparent == own
    assert "traceparent" not in untraced.headers
    assert backend.calls[1].traceparent == ""


@pytest.mark.parametrize(
    "header",
    [
        "", "00", "00-0-0-01", "ff-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
        "00-00000000000000000000000000000000-b7ad6b7169203331-01",
        "00-0af7651916cd43dd8448eb211c80319c-0000000000000000-01",
        "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01-more",
        "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01\r\nx: y",
    ],
)  # fmt: skip
def test_a_traceparent_that_is_none_is_no_ones_trace(header: str) -> None:
    assert trace_context(header, sample_ratio=None) is None
    fresh = trace_context(header, sample_ratio=1.0)
    assert fresh is not None
    assert (fresh.is_sampled, fresh.parent_id) == (True, "")


def test_new_traces_are_sampled_by_the_ratio() -> None:
    contexts = [trace_context(None, sample_ratio=0.25) for _ in range(4000)]
    share = sum(one is not None and one.is_sampled for one in contexts) / len(contexts)
    assert 0.2 < share < 0.3
    never = trace_context("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00", sample_ratio=1.0)
    assert never is not None
    assert not never.is_sampled


async def test_a_call_that_is_held_knows_who_was_there_before(backend, tokenizer) -> None:
    backend.prediction = Prediction(ttft_s=9.0, tpot_s=0.1, wait_s=9.0)
    admission = Admission(backend, window_s=0.5)
    calls = [GenerateCall(f"c{i}", (1, 2, 3), SamplingParams(max_tokens=4, seed=1)) for i in range(3)]
    visits = [Visit(call, tenant, Objectives(), 0.0) for call, tenant in zip(calls, ("a", "b", "c"), strict=True)]
    blocker = Visit(GenerateCall("c9", (1,), SamplingParams(seed=1)), "z", Objectives(), 0.0)
    admission._starting.add(blocker)

    async def drain(one: Visit) -> None:
        async for _ in admission.run(one):
            pass

    tasks = []
    for one in visits:
        tasks.append(asyncio.create_task(drain(one)))
        await asyncio.sleep(0.01)
    backend.prediction = Prediction(ttft_s=0.1, tpot_s=0.1)
    await asyncio.gather(*tasks)
    assert [(one.num_ahead, one.num_tenants_ahead) for one in visits] == [(0, 0), (1, 1), (2, 2)]
    assert all(one.queue_s > 0 and one.held_since_s is not None for one in visits)
    assert all(len(one.times) == 1 and one.sent_s is not None and one.ended_s is not None for one in visits)


PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


# -- as a collector gets them, over OTLP ----------------------------------------------------------------------


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
