"""The admin port's HTTP application: what each route asks and answers."""

from __future__ import annotations

import logging
import math
from collections.abc import Collection
from typing import Any, Final

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp

from shoal.cluster.admin.cluster import Cluster, NoGatewayError
from shoal.cluster.admin.guard import Guard
from shoal.cluster.admin.history import PERIOD_S, QUANTILES, History
from shoal.cluster.admin.join import exposition, health, join_decisions
from shoal.cluster.admin.page import read_page
from shoal.cluster.admin.proxy import Proxy
from shoal.cluster.gateway.errors import ApiError
from shoal.cluster.gateway.responses import encode

log = logging.getLogger(__name__)

DEFAULT_REQUESTS: Final = 50
MAX_REQUESTS: Final = 1000


def build_admin_app(cluster: Cluster, history: History, proxy: Proxy, *, hosts: Collection[str] = ()) -> ASGIApp:
    """`hosts`: public names by which browsers may call it, see `Guard`."""
    admin = _Admin(cluster, history)
    page, page_headers = read_page()

    async def show_page(http: Request) -> Response:
        return Response(page, headers=page_headers, media_type="text/html")

    app = Starlette(
        routes=[
            Route("/", show_page),
            Route("/health", admin.health),
            Route("/metrics", admin.metrics),
            Route("/status", admin.status),
            Route("/debug/routing", admin.explain_routing),
            Route("/debug/requests", admin.list_requests),
            Route("/debug/requests/{request_id:path}", admin.show_request),
            Route("/api/history", admin.show_history),
            Route("/v1/models", proxy.forward),
            Route("/v1/chat/completions", proxy.forward, methods=["POST"]),
        ],
        exception_handlers={
            ApiError: _answer_error,
            NoGatewayError: _answer_error,
            HTTPException: _answer_error,
            Exception: _answer_error,
        },
    )
    return Guard(app, hosts)


class _Admin:
    def __init__(self, cluster: Cluster, history: History) -> None:
        self._cluster = cluster
        self._history = history

    async def health(self, http: Request) -> Response:
        return _json(health(await self._cluster.measure()))

    async def metrics(self, http: Request) -> Response:
        text = exposition(await self._cluster.measure())
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")

    async def status(self, http: Request) -> Response:
        status = await self._cluster.status()
        return _json({"models": status.models, "gateways": status.gateways, "gateways_silent": status.num_silent})

    async def explain_routing(self, http: Request) -> Response:
        """The last decisions for the model that the query names, or for each."""
        name, limit = http.query_params.get("model"), _limit(http)
        models = join_decisions(await self._cluster.decisions(), name)
        if name is not None and not models:
            raise ApiError(404, f"the model '{name[:200]}' does not exist", param="model", code="model_not_found")
        return _json({"models": [model | {"decisions": model["decisions"][:limit]} for model in models]})

    async def list_requests(self, http: Request) -> Response:
        limit = _limit(http)
        timelines = await self._cluster.timelines(limit)
        return _json({"requests": timelines})

    async def show_request(self, http: Request) -> Response:
        request_id = http.path_params["request_id"]
        timeline = await self._cluster.timeline(request_id)
        if timeline is None:
            raise ApiError(
                404,
                f"no gateway knows request '{request_id[:200]}': its timeline is forgotten, or its gateway is gone",
                code="request_not_found",
            )
        return _json(timeline)

    async def show_history(self, http: Request) -> Response:
        points = self._history.since(_number(http, "since", 0.0))
        return _json({"period_s": PERIOD_S, "quantiles": QUANTILES, "points": points})


def _limit(http: Request) -> int:
    """Raises ApiError."""
    limit = _number(http, "limit", DEFAULT_REQUESTS)
    if not 1 <= limit <= MAX_REQUESTS:
        raise ApiError(400, f"limit must be from 1 to {MAX_REQUESTS}", param="limit")
    return int(limit)


def _number(http: Request, name: str, default: float) -> float:
    """Raises ApiError."""
    text = http.query_params.get(name)
    try:
        value = default if text is None else float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ApiError(400, f"{name} must be a number", param=name)
    return value


def _json(value: Any) -> Response:
    return Response(encode(value), headers={"cache-control": "no-store"}, media_type="application/json")


async def _answer_error(http: Request, error: Exception) -> Response:
    match error:
        case ApiError():
            return error.response()
        case NoGatewayError():
            kind = "service_unavailable_error"
            return ApiError(503, str(error), type=kind, code="no_gateway", headers={"retry-after": "2"}).response()
        case HTTPException():
            message = "no such route: see / for the status page, /metrics, /status, /debug/routing and /debug/requests"
            text = message if error.status_code == 404 else str(error.detail)
            return ApiError(error.status_code, text, headers=error.headers).response()
        case _:
            log.error("%s failed", http.url.path, exc_info=error)
            return ApiError(500, "the admin port failed; its log says why", type="server_error").response()
