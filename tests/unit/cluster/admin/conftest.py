"""The real admin application over a cluster and a gateway that play what a test tells them."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from shoal.cluster.admin.cluster import ClusterStatus, Decisions, Measured, NoGatewayError, Timelines
from shoal.cluster.admin.history import History
from shoal.cluster.admin.proxy import Proxy
from shoal.cluster.admin.routes import build_admin_app
from shoal.cluster.admin.server import HttpServer, bind
from shoal.cluster.channel import GatewayFacts, GroupStatus, ModelStatus, ReplicaView
from shoal.cluster.metrics import HttpMetrics, ReplicaMetrics, Snapshot
from shoal.engine.executor import RankInfo
from shoal.engine.request import EngineStats, RequestId, RequestOutput, SamplingParams
from shoal.engine.request import Request as EngineRequest

MODEL = "smollm2"
EVIL = "<img src=x onerror=window.hacked=1>"  # a model, a tenant and a request may be called so
STEP_S = 0.02


class Replica:
    """Measurements of a replica, made by what a replica makes them with."""

    def __init__(self) -> None:
        self._metrics = ReplicaMetrics()
        self._num_requests = 0
        self.num_prompt = 0
        self.num_cached = 0
        self.num_generated = 0
        self.kv_usage = 0.25
        self.num_running = 1

    def answer(self, num_tokens: int, *, ttft_s: float = 0.1, num_prompt: int = 10, num_cached: int = 4) -> None:
        """One request from its arrival, `ttft_s` ago, to its last token."""
        self._num_requests += 1
        name = RequestId(f"r{self._num_requests}")
        arrival_s = time.monotonic() - ttft_s
        self._metrics.start([EngineRequest(name, (1,), SamplingParams(), seed=0, arrival_s=arrival_s)])
        for _ in range(num_tokens):
            self._metrics.observe_step([RequestOutput(name, (5,))])
        self._metrics.abort([name])
        self.num_prompt += num_prompt
        self.num_cached += num_cached
        self.num_generated += num_tokens

    def snapshot(self) -> Snapshot:
        stats = EngineStats(
            num_running=self.num_running,
            prompt_tokens_total=self.num_prompt,
            cached_tokens_total=self.num_cached,
            generation_tokens_total=self.num_generated,
            num_blocks=1000,
            num_free_blocks=round(1000 * (1 - self.kv_usage)),
            block_size=16,
        )
        return self._metrics.snapshot(stats)


class PlayedCluster:
    """Two groups of a model with two stages each, one model that is named to harm, two gateways."""

    def __init__(self) -> None:
        self.replicas = {MODEL: {"0": Replica(), "1": Replica()}, EVIL: {"0": Replica()}}
        self.gateways = {"0": HttpMetrics(), "1": HttpMetrics()}
        self.num_silent = 0
        self.is_gone = False
        self.requests: list[dict[str, Any]] = []
        self.now_s = time.time() - 120

    def pass_time(self, seconds: float = 2.0) -> Measured:
        """What is measured so much later."""
        self.now_s += seconds
        return self.measured()

    def measured(self) -> Measured:
        return Measured(
            self.now_s,
            {model: {label: one.snapshot() for label, one in of.items()} for model, of in self.replicas.items()},
            {label: http.snapshot() for label, http in self.gateways.items()},
            self.num_silent,
        )

    async def measure(self) -> Measured:
        return Measured(time.time(), {}, {}, 2) if self.is_gone else self.measured()

    async def status(self) -> ClusterStatus:
        self._check()
        view = ReplicaView(0.0004, 12, 0.1, 0)
        groups = tuple(GroupStatus("running", label, 65, 16, _ranks(int(label)), view) for label in "01")
        models = [
            ModelStatus(MODEL, 2048, (*groups, GroupStatus("starting"))),
            ModelStatus(EVIL, 512, (GroupStatus("running", "0", 65, 16, _ranks(4)[:1]),)),
        ]
        return ClusterStatus(models, [GatewayFacts(label, "10.0.0.1", 7) for label in "01"], self.num_silent)

    async def decisions(self) -> Mapping[str, Decisions]:
        self._check()
        return {
            "0": {MODEL: [_decision("cmpl-1", 3.0), _decision("cmpl-0", 9.0)], EVIL: []},
            "1": {MODEL: [_decision(EVIL, 5.0)], EVIL: []},
        }

    async def timelines(self, limit: int) -> Sequence[Timelines]:
        told = [{name: one[name] for name in one if name != "spans"} for one in self.requests]
        return [{"recent": told[::-1], "slowest": told}]

    async def timeline(self, request_id: str) -> Mapping[str, Any] | None:
        return next((one for one in self.requests if one["request_id"] == request_id), None)

    def _check(self) -> None:
        if self.is_gone:
            raise NoGatewayError("no gateway answers: TimeoutError")


def _ranks(group: int) -> tuple[RankInfo, ...]:
    return tuple(
        RankInfo(stage, 0, f"10.0.0.{group + 1}", 100 + 10 * group + stage, "AMD EPYC", 15 * stage, 15, 2**27, 2**26)
        for stage in range(2)
    )


def timeline(request_id: str, seconds: float) -> dict[str, Any]:
    """Of a request, as a gateway tells it."""

    def span(name: str, start: float, end: float, *spans: Any) -> dict[str, Any]:
        return {"name": name, "start_s": start * seconds, "end_s": end * seconds, "attributes": {}, "spans": spans}

    call = span("call", 0.1, 0.9, span("queue", 0.1, 0.5), span("decode", 0.5, 0.9, span("rank pp0/tp0", 0.5, 0.9)))
    return {
        "request_id": request_id,
        "model": MODEL,
        "outcome": "finished",
        "started_unix_s": 1000.0,
        "seconds": seconds,
        "ttft_s": seconds / 2,
        "explanation": [f"{EVIL} waited for KV blocks", "then it decoded"],
        "spans": [span("tokenize", 0.0, 0.1), call, span("answer", 0.9, 1.0)],
    }


def _decision(request_id: str, seconds_ago: float) -> dict[str, Any]:
    def candidate(replica: str, matched: int) -> dict[str, Any]:
        costs = {"ttft_s": 0.02, "delay_s": 0.01, "eviction_s": 0.0, "num_matched": matched, "num_uncached": 8}
        return {"replica": replica, "cost_s": 0.03, **costs}

    return {
        "request_id": request_id,
        "seconds_ago": seconds_ago,
        "num_prompt_tokens": 40,
        "chosen": "key-a",
        "predicted": {"ttft_s": 0.02, "num_matched": 32, "is_measured": True},
        "candidates": [candidate("key-a", 32), candidate("key-b", 0)],
        "labels": {"key-a": "0", "key-b": "1"},
    }


class PlayedGateway:
    """The public port: streams `pieces`; remembers what it was asked, and which answers nobody read to the end."""

    def __init__(self) -> None:
        self.pieces = ["Hel", "lo, ", "you."]
        self.step_s = STEP_S
        self.key: str | None = None  # that it asks for
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[Mapping[str, str]] = []
        self.num_open = 0
        self.app = Starlette(
            routes=[Route("/v1/models", self.models), Route("/v1/chat/completions", self.chat, methods=["POST"])]
        )

    async def models(self, http: Request) -> Response:
        self.headers.append(dict(http.headers))
        return JSONResponse({"object": "list", "data": [{"id": MODEL}, {"id": EVIL}]})

    async def chat(self, http: Request) -> Response:
        self.headers.append(dict(http.headers))
        self.bodies.append(json.loads(await http.body()))
        if self.key is not None and http.headers.get("authorization") != f"Bearer {self.key}":
            error = {
                "message": "this server wants an API key",
                "type": "authentication_error",
                "param": None,
                "code": None,
            }
            return JSONResponse({"error": error}, 401, headers={"www-authenticate": "Bearer"})
        headers = {"x-shoal-replica": "1", "x-request-id": http.headers.get("x-request-id", "made-1")}
        return StreamingResponse(self._events(), headers=headers, media_type="text/event-stream")

    async def _events(self) -> AsyncIterator[bytes]:
        self.num_open += 1
        try:
            for piece in self.pieces:
                await asyncio.sleep(self.step_s)
                yield _event({"choices": [{"index": 0, "delta": {"content": piece}}]})
            usage = {"prompt_tokens": 20, "completion_tokens": 3, "prompt_tokens_details": {"cached_tokens": 16}}
            yield _event({"choices": [], "usage": usage})
            yield b"data: [DONE]\n\n"
        finally:
            self.num_open -= 1


def _event(value: Any) -> bytes:
    return b"data: " + json.dumps(value).encode() + b"\n\n"


class Admin:
    """The admin port and the gateway behind it, listening, in an event loop of their own."""

    def __init__(self) -> None:
        self.cluster = PlayedCluster()
        self.gateway = PlayedGateway()
        self.history = History(self.cluster)
        self.url = ""
        self._is_up = threading.Event()
        self._is_over = asyncio.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()))

    def __enter__(self) -> Admin:
        self._thread.start()
        assert self._is_up.wait(10)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._is_over.set)
        self._thread.join(10)

    def live(self, num_periods: int) -> None:
        """Let both groups answer requests for so many periods."""
        for period in range(num_periods):
            for number, replica in enumerate(self.cluster.replicas[MODEL].values()):
                replica.kv_usage = 0.1 + 0.02 * (period % 20) + 0.2 * number
                replica.answer(20 + period % 7, ttft_s=0.05 + 0.02 * (period % 5))
            for gateway in self.cluster.gateways.values():
                gateway.observe(handler="/v1/chat/completions", method="POST", status=200, seconds=0.2)
            self.history.add(self.cluster.pass_time())

    async def _run(self) -> None:
        self._loop = asyncio.get_running_loop()
        public, private = [await bind("127.0.0.1", 0, timeout_s=1) for _ in range(2)]
        proxy = Proxy(f"http://127.0.0.1:{public.getsockname()[1]}", max_body_bytes=2**16, body_timeout_s=5.0)
        app = build_admin_app(self.cluster, self.history, proxy, hosts=("shoal.example.com",))
        self.url = f"http://127.0.0.1:{private.getsockname()[1]}"
        servers = [HttpServer(self.gateway.app), HttpServer(app)]
        for server, listener in zip(servers, (public, private), strict=True):
            server.start(listener)
        self._is_up.set()
        await self._is_over.wait()
        for server in servers:
            await server.close()
        await proxy.close()


@pytest.fixture
def admin() -> Iterator[Admin]:
    with Admin() as admin:
        yield admin


@pytest.fixture
def make_timeline() -> Callable[[str, float], dict[str, Any]]:
    return timeline


@pytest.fixture
async def client(admin: Admin) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=admin.url, timeout=20) as client:
        yield client


@pytest.fixture(scope="session")
def chromium() -> ModuleType:
    """bench/chromium.py, which the screenshots are made with."""
    path = Path(__file__).parents[4] / "bench" / "chromium.py"
    spec = importlib.util.spec_from_file_location("chromium", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def browser_tab(chromium: ModuleType) -> Iterator[Any]:
    """An empty page of a headless browser."""
    executable = chromium.find()
    if executable is None:
        pytest.skip("there is no Chromium")
    with chromium.browser(executable) as tab:
        yield tab


@pytest.fixture
def tab(browser_tab: Any, admin: Admin) -> Iterator[Any]:
    """The same for one test; it asks its server for nothing more once that goes."""
    browser_tab.errors.clear()
    yield browser_tab
    browser_tab.open("about:blank")
