"""Every error in OpenAI's form, `{"error": {message, type, param, code}}`, whatever raised it."""

from __future__ import annotations

import difflib
import logging
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import pydantic
from fastapi import FastAPI, Request, Response
from pydantic_core import ErrorDetails
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from shoal.cluster.gateway.admission import RefusedError
from shoal.cluster.gateway.backend import ReplicaFailedError, ReplicaUnavailableError
from shoal.engine.request import RequestError

logger = logging.getLogger(__name__)

REQUEST_ID_HEADER = b"x-request-id"
_MAX_REQUEST_ID = 128
_MAX_LISTED = 1000  # pydantic gives all that is wrong or nothing, in a microsecond and half a kilobyte each
_MAX_SHOWN = 80  # characters of a refused value in a message


class ApiError(Exception):
    """An answer other than 2xx."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.body = {"error": {"message": message, "type": type, "param": param, "code": code}}
        self.headers = dict(headers or {})

    def response(self) -> Response:
        return Response(
            msgspec.json.encode(self.body), self.status, headers=self.headers, media_type="application/json"
        )


def to_api_error(error: BaseException, request_id: str) -> ApiError:
    """The answer for any exception. What is not the client's fault is logged and named by the request id only."""
    match error:
        case ApiError():
            return error
        case RequestError():
            return ApiError(400, str(error), param=error.param, code=error.code)
        case RefusedError():
            return ApiError(
                429,
                str(error),
                type="rate_limit_error",
                code=error.code,
                headers={"retry-after": str(error.retry_after_s)},
            )
        case ReplicaUnavailableError():
            return ApiError(
                503,
                str(error),
                type="service_unavailable_error",
                code="replica_failed" if isinstance(error, ReplicaFailedError) else "no_replica",
                headers={"retry-after": str(error.retry_after_s)},
            )
        case HTTPException():
            return _from_http_exception(error)
        case _:
            logger.error("request %s failed", request_id, exc_info=error)
            return ApiError(
                500, f"the server failed on request {request_id}", type="server_error", code="internal_error"
            )


def from_validation(error: pydantic.ValidationError, model: type[pydantic.BaseModel]) -> ApiError:
    """The first thing wrong with a body, naming the field."""
    if error.error_count() > _MAX_LISTED:
        return ApiError(400, f"{error.error_count()} fields of the body are unknown or wrong")
    detail = error.errors(include_url=False)[0]
    path = [str(step) for step in detail["loc"]]
    cause = detail.get("ctx", {}).get("error")
    match detail["type"]:
        case "json_invalid":
            return ApiError(400, f"the body is not valid JSON: {detail['ctx']['error']}", code="invalid_json")
        case "model_type" | "model_attributes_type" if not path:
            return ApiError(400, "the body must be a JSON object")
        case "extra_forbidden":
            message = f"unknown field '{_join(path)}'{_suggestion(path, model)}"
        case "missing":
            message = f"'{_join(path)}' is required"
        case _ if isinstance(cause, RequestError):
            path += [cause.param] if cause.param else []
            message = str(cause)
        case _:
            message = f"'{_join(path)}': {_lower_first(detail['msg'])}{_shown(detail)}"
    return ApiError(400, message, param=_join(path) or None)


def install_error_handlers(app: FastAPI) -> None:
    """Answer every exception, unknown routes and methods included, in OpenAI's form."""

    async def answer(request: Request, error: Exception) -> Response:
        return to_api_error(error, request.state.request_id).response()

    for kind in (ApiError, RequestError, RefusedError, ReplicaUnavailableError, HTTPException):
        app.add_exception_handler(kind, answer)
    app.add_middleware(RequestIdMiddleware)


class RequestIdMiddleware:
    """Gives every request an id (the client's x-request-id, or a new one) and turns a crash into a 500.

    `state["server_send"]` is what it was given to send with, for who sends much: between the first message of an answer
    and the last, no middleware has anything to look at.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = _client_request_id(scope) or uuid.uuid4().hex
        scope.setdefault("state", {}).update(request_id=request_id, server_send=send)
        has_started = False

        async def send_with_id(message: Message) -> None:
            nonlocal has_started
            if message["type"] == "http.response.start":
                has_started = True
                message["headers"] = [*message.get("headers", ()), (REQUEST_ID_HEADER, request_id.encode())]
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except Exception as error:
            if has_started:
                raise  # nothing can be answered any more; the server cuts the connection
            await to_api_error(error, request_id).response()(scope, receive, send_with_id)


def _client_request_id(scope: Scope) -> str | None:
    value: bytes = dict(scope["headers"]).get(REQUEST_ID_HEADER, b"")
    text = value.decode("latin-1")
    return text if 0 < len(text) <= _MAX_REQUEST_ID and text.isascii() and text.isprintable() else None


def _from_http_exception(error: HTTPException) -> ApiError:
    messages = {
        404: "no such route: this port answers under /v1/chat/completions, /v1/completions and /v1/models; metrics and "
        "status are on the admin port",
        405: "this route does not answer that method",
    }
    return ApiError(
        error.status_code,
        messages.get(error.status_code, str(error.detail)),
        code={404: "not_found", 405: "method_not_allowed"}.get(error.status_code),
        headers=error.headers,
    )


def _suggestion(path: Sequence[str], model: type[pydantic.BaseModel]) -> str:
    fields = _fields_at(path[:-1], model)
    close = difflib.get_close_matches(path[-1], fields, n=1)
    return f"; did you mean '{close[0]}'?" if close else ""


def _fields_at(path: Sequence[str], model: type[pydantic.BaseModel]) -> list[str]:
    """Names of the fields of the object at `path` inside `model`."""
    for step in path:
        if not step.isdecimal():  # else an item of a list
            nested = _nested_models(model.model_fields[step].annotation)
            if not nested:
                return []
            model = nested[0]
    return list(model.model_fields)


def _nested_models(annotation: Any) -> list[type[pydantic.BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, pydantic.BaseModel):
        return [annotation]
    return [kind for part in getattr(annotation, "__args__", ()) for kind in _nested_models(part)]


def _shown(detail: ErrorDetails) -> str:
    text = repr(detail.get("input"))
    return f", got {text if len(text) <= _MAX_SHOWN else text[:_MAX_SHOWN] + '...'}"


def _join(path: Sequence[str]) -> str:
    return ".".join(path)


def _lower_first(text: str) -> str:
    return text[:1].lower() + text[1:]
