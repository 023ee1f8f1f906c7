"""The Serve ingress: the gateway's HTTP application, and what it needs from the cluster."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final

import ray
from fastapi import FastAPI
from ray import serve
from ray.serve.handle import DeploymentHandle
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from shoal.cluster.channel import DrainState, GatewayFacts, ModelStatus, PeerMessage, Spent
from shoal.cluster.config import (
    AuthSettings,
    HttpSettings,
    LogSettings,
    ModelSettings,
    TracingSettings,
    locate_model,
)
from shoal.cluster.gateway.admission import Admission, Objectives
from shoal.cluster.gateway.auth import start_auth
from shoal.cluster.gateway.backend import ServedModel
from shoal.cluster.gateway.errors import REQUEST_ID_HEADER
from shoal.cluster.gateway.inbox import StepInbox
from shoal.cluster.gateway.readiness import DrainableApp
from shoal.cluster.gateway.recording import Recorder
from shoal.cluster.gateway.replica_backend import ReplicaBackend
from shoal.cluster.gateway.routes import build_app
from shoal.cluster.gateway.tracing import OtlpExport
from shoal.cluster.logs import log_to_serve
from shoal.cluster.metrics import HttpMetrics, Snapshot
from shoal.cluster.routing.mirror import Mirror
from shoal.cluster.routing.model_routing import ModelRouting, expire_mirrored, routing_of, take_peer_message
from shoal.engine.tokenizer import Tokenizer

FACTS_PERIOD_S: Final = 1.0


class Gateway:
    """One gateway process: HTTP in, token ids out. Constructing it waits until every model has a replica."""

    async def __init__(  # type: ignore[misc]  # Serve awaits constructors
        self,
        models: tuple[ModelSettings, ...],
        http: HttpSettings,
        replicas: Mapping[str, DeploymentHandle[object]],
        own_ip: str | None = None,
        *,
        admin: DeploymentHandle[object],
        logs: LogSettings,
        tracing: TracingSettings,
        auth: AuthSettings,
    ) -> None:
        """`own_ip`: where this gateway receives tokens; None is its node's address. `admin` is not asked for anything:
        naming it here makes it part of the application. Raises ConfigError for a keys file that is not here or wrong.
        """
        log_to_serve(logs.format, logs.level)
        self._label = str(serve.get_replica_context().rank.rank)
        self._node = ray.util.get_node_ip_address()
        self._export = _export(tracing)
        self._recorder = Recorder(
            sample_ratio=tracing.sample_ratio if self._export is not None else None, export=self._export
        )
        self._http = http
        self._drain_timeout_s = max(model.drain_timeout for model in models)
        self._http_metrics = HttpMetrics()
        self._inbox = StepInbox(own_ip or self._node, self._take_peer_message, interval_s=http.stream_interval)
        self._mirror = Mirror(self._inbox.address, self._pass_mirror_period)
        keys_file = auth.keys_file
        self._auth = start_auth(keys_file, self._inbox.address, self._mirror.tell) if keys_file is not None else None
        self._inbox.start()
        self._mirror.start()
        self._backends = {
            model.name: ReplicaBackend(model.name, handle, self._inbox, self._routing(model, handle))
            for model in models
            for handle in (replicas[model.name],)
        }
        served = await asyncio.gather(*(self._serve(model, self._backends[model.name]) for model in models))
        self._models = {model.name: model for model in served}
        self._admissions = {model.name: self._admission(model) for model in models}
        self._refresh = asyncio.create_task(self._keep_facts())

    async def drain(self, node_id: str | None = None, is_over: bool = False) -> DrainState:
        """Take no more requests, and answer how many are open. With `node_id`, only the gateways on that node do.
        `is_over` cuts off those that are still open.
        """
        app = self._app
        if node_id in (None, ray.get_runtime_context().get_node_id()):
            app.is_draining = True
            if is_over:
                app.cut_off()
        return DrainState(app.is_draining, app.num_open, self._drain_timeout_s)

    async def _keep_facts(self) -> None:
        """Replicas of an update may take longer prompts than those before them, or shorter ones."""
        while True:
            await asyncio.sleep(FACTS_PERIOD_S)
            for name, model in self._models.items():
                length = self._backends[name].max_model_len
                if length not in (None, model.max_model_len):
                    self._models[name] = replace(model, max_model_len=length)

    def _take_peer_message(self, message: PeerMessage) -> None:
        if not isinstance(message, Spent):
            take_peer_message(message)
        elif self._auth is not None:
            self._auth.limits.take(message)

    def _pass_mirror_period(self) -> None:
        expire_mirrored()
        if self._auth is not None:
            self._auth.limits.beat()

    def _routing(self, model: ModelSettings, handle: DeploymentHandle[object]) -> ModelRouting:
        routing = routing_of(handle.app_name, handle.deployment_name, model.routing.policy, dict(model.routing.options))
        routing.share(self._mirror)
        return routing

    def _admission(self, model: ModelSettings) -> Admission:
        asked, limit = model.objectives, model.max_queued_requests
        return Admission(
            self._backends[model.name],
            objectives=Objectives.of_milliseconds(asked.ttft_ms, asked.tpot_ms),
            window_s=model.fairness.window_ms / 1000,
            weights=model.fairness.weights,
            max_waiting=limit if limit >= 0 else None,
        )

    async def _serve(self, model: ModelSettings, backend: ReplicaBackend) -> ServedModel:
        path = await asyncio.to_thread(locate_model, model.model, has_weights=False)
        tokenizer = await asyncio.to_thread(Tokenizer.load, path)
        facts = await backend.facts()
        return ServedModel(
            name=model.name,
            tokenizer=tokenizer,
            max_model_len=facts.max_model_len,
            vocab_size=facts.vocab_size,
            created=int(time.time()),
            backend=backend,
            is_speculative=model.speculative is not None,
        )

    def __serve_build_asgi_app__(self) -> ASGIApp:
        app = build_app(
            self._models,
            admissions=self._admissions,
            max_body_bytes=self._http.max_body_bytes,
            recorder=self._recorder,
            body_timeout_s=self._http.body_timeout,
            cors_origins=self._http.cors_origins,
            auth=self._auth,
        )
        self._app = DrainableApp(CountedApp(app, self._http_metrics))
        return self._app

    # -- what Admin asks ---------------------------------------------------------------------------------------

    async def facts(self) -> GatewayFacts:
        return GatewayFacts(self._label, self._node, os.getpid())

    async def metrics(self) -> tuple[str, Snapshot]:
        """This gateway's label and its own measurements."""
        routing = (point for backend in self._backends.values() for point in backend.routing_snapshot())
        admitting = (point for name, one in self._admissions.items() for point in one.snapshot(name))
        exported = self._export.snapshot() if self._export is not None else ()
        keys = self._auth.snapshot() if self._auth is not None else ()
        return self._label, (*self._http_metrics.snapshot(), *routing, *admitting, *exported, *keys)

    async def replica_metrics(self) -> dict[str, dict[str, Snapshot]]:
        """Measurements of the replicas that answer, by model and `engine` label."""
        snapshots = await asyncio.gather(*(backend.snapshots() for backend in self._backends.values()))
        return dict(zip(self._backends, snapshots, strict=True))

    async def status(self) -> list[ModelStatus]:
        """Every model with all of its groups."""
        groups = await asyncio.gather(*(self._backends[name].groups() for name in self._models))
        return [
            ModelStatus(model.name, model.max_model_len, tuple(of_model))
            for model, of_model in zip(self._models.values(), groups, strict=True)
        ]

    async def explain(self) -> tuple[str, dict[str, list[dict[str, Any]]]]:
        """This gateway's label, and its last routing decisions by model, newest first."""
        return self._label, {name: backend.explain() for name, backend in self._backends.items()}

    async def timelines(self, limit: int) -> dict[str, list[dict[str, Any]]]:
        """The last requests and the slowest of late: see `Recorder.timelines`."""
        return self._recorder.timelines(limit)

    async def timeline(self, request_id: str) -> dict[str, Any] | None:
        """Why a request took as long as it did: see `Recorder.timeline`. None where this gateway did not have it, or
        has forgotten it.
        """
        return self._recorder.timeline(request_id)

    def __del__(self) -> None:
        # Serve calls this once the gateway is drained.
        if (auth := getattr(self, "_auth", None)) is not None:
            auth.close()
        if (export := getattr(self, "_export", None)) is not None:
            export.close()


def _export(tracing: TracingSettings) -> OtlpExport | None:
    if tracing.otlp_endpoint is None:
        return None
    return OtlpExport(tracing.otlp_endpoint, gateway=serve.get_replica_context().replica_id.unique_id)


class CountedApp:
    """Counts what an ASGI application answers. Serve's server puts the x-request-id of a request on its answer too: of
    two that are the same one is sent.
    """

    def __init__(self, app: FastAPI, metrics: HttpMetrics) -> None:
        self._app = app
        self._metrics = metrics
        self._paths = {path for route in app.routes if (path := getattr(route, "path", None))}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start = time.monotonic()
        status = 499  # the client left before there was an answer
        named = [header for header in scope["headers"] if header[0] == REQUEST_ID_HEADER]

        async def send_and_look(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [header for header in message.get("headers", ()) if header not in named]
            await send(message)

        self._metrics.num_open += 1
        try:
            await self._app(scope, receive, send_and_look)
        except Exception:
            status = 500
            raise
        finally:
            self._metrics.num_open -= 1
            self._metrics.observe(
                handler=scope["path"] if scope["path"] in self._paths else "other",
                method=scope["method"],
                status=status,
                seconds=time.monotonic() - start,
            )
