"""The description of the HTTP API (OpenAPI 3.1), made from the types that requests and answers have in the code."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, Final

import msgspec
from pydantic.json_schema import models_json_schema

from shoal.cluster.gateway.responses import (
    ChatChoice,
    ChatChunkChoice,
    CompletionChoice,
    DetokenizeResponse,
    ModelCard,
    ModelList,
    TokenizeResponse,
    Usage,
    VersionResponse,
)
from shoal.cluster.gateway.schema import (
    ChatCompletionRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
)

_Schema = dict[str, Any]

_REF: Final = "#/components/schemas/{}"
_PYDANTIC_REF: Final = _REF.format("{model}")
_MSGSPEC_REF: Final = _REF.format("{name}")
_BODIES: Final = (ChatCompletionRequest, CompletionRequest, TokenizeRequest, DetokenizeRequest)
_ANSWERS: Final = (
    ChatChoice, ChatChunkChoice, CompletionChoice, Usage, ModelCard, ModelList, TokenizeResponse, DetokenizeResponse,
    VersionResponse,
)  # fmt: skip

_STREAM: Final = (
    "With stream: true, server-sent events: `data: ` and a chunk of JSON for each choice and engine step, then, where "
    "stream_options.include_usage asks for it, one without choices and with the usage, and at last `data: [DONE]`. "
    "An error after the first event is an event with an error."
)
_ERRORS: Final[Mapping[int, str]] = {
    400: "The body or a header is not as it should be; `param` names the field.",
    401: "There is no API key, or it is not known, revoked or expired (code invalid_api_key).",
    403: "The API key may not ask this model (code model_not_allowed).",
    404: "There is no such model (code model_not_found).",
    408: "The body came too slowly (code body_timeout).",
    413: "The body is too large (code body_too_large).",
    414: "The URL is too long (code url_too_long).",
    429: "The key is over a limit (code rate_limit_exceeded), or the server has too much to do for this request "
    "(codes objective_unreachable and queue_full). Retry-After says when to come again.",
    431: "Too many headers, or too long ones (code headers_too_large).",
    500: "The server failed; the message names the request (code internal_error).",
    503: "No replica is ready, the one that had the request failed, or the server is about to stop (codes no_replica, "
    "replica_failed and draining). Retry-After says when to come again.",
}
_ALWAYS: Final = (414, 431, 500)
_WITH_KEY: Final = (401, *_ALWAYS)
_WITH_MODEL: Final = (403, 404, *_WITH_KEY)
_WITH_BODY: Final = (400, 408, 413, *_WITH_MODEL)
_RATE_HEADERS: Final = tuple(
    f"x-ratelimit-{kind}-{of}" for kind in ("limit", "remaining", "reset") for of in ("requests", "tokens")
)


@cache
def description(version: str, *, has_keys: bool) -> _Schema:
    """The whole document, as plain data. `has_keys`: whether requests need one."""
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Shoal",
            "version": version,
            "description": "An OpenAI-compatible API for large language models. Routes outside /v1 are vLLM's.",
        },
        "security": [{"bearer": []}, {"header": []}] if has_keys else [],
        "paths": {
            "/v1/chat/completions": {"post": _chat()},
            "/v1/completions": {"post": _completion()},
            "/v1/models": {"get": _get("listModels", "The models that this key may ask.", "ModelList", _WITH_KEY)},
            "/v1/models/{name}": {
                "get": _get("showModel", "One model.", "ModelCard", _WITH_MODEL) | {"parameters": [_NAME]}
            },
            "/tokenize": {"post": _tokenize()},
            "/detokenize": {"post": _detokenize()},
            "/health": {
                "get": _public(_empty("health", "Whether every model has a replica that answers.", (503, *_ALWAYS)))
            },
            "/ping": {"get": _public(_empty("ping", "Whether the process lives, whatever else does.", _ALWAYS))},
            "/version": {"get": _public(_get("version", "The version of the server.", "VersionResponse", _ALWAYS))},
            "/openapi.json": {"get": _public(_get("describe", "This document.", None, _ALWAYS))},
        },
        "components": {
            "schemas": _schemas(),
            "responses": {str(status): _error(status) for status in _ERRORS},
            "headers": {
                "x-request-id": _header("What the logs call this request: the client's own, or a new one."),
                "retry-after": _header("Seconds to wait before asking again."),
                **{name: _header("Of the API key, as OpenAI names it.") for name in _RATE_HEADERS},
            },
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer", "description": "An API key, where the server has any."},
                "header": {"type": "apiKey", "in": "header", "name": "x-api-key"},
            },
        },
    }


_NAME: Final[_Schema] = {"name": "name", "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}


def _chat() -> _Schema:
    question = {"role": "user", "content": "What is the capital of France?"}
    asked = {"model": "smollm2-135m-instruct", "messages": [question], "temperature": 0}
    answer = {
        "id": "chatcmpl-7d0f3a", "object": "chat.completion", "created": 1767225600, "model": "smollm2-135m-instruct",
        "choices": [{
            "index": 0, "message": {"content": "Paris.", "role": "assistant", "refusal": None}, "logprobs": None,
            "finish_reason": "stop",
        }],
        "usage": {"prompt_tokens": 37, "completion_tokens": 3, "total_tokens": 40,
                  "prompt_tokens_details": {"cached_tokens": 0}},
    }  # fmt: skip
    return _generation("chat", "Continue a conversation.", "ChatCompletion", "ChatCompletionRequest", asked, answer)


def _completion() -> _Schema:
    asked = {"model": "smollm2-135m-instruct", "prompt": "The capital of France is", "max_tokens": 4}
    answer = {
        "id": "cmpl-7d0f3a", "object": "text_completion", "created": 1767225600, "model": "smollm2-135m-instruct",
        "choices": [{"index": 0, "text": " Paris.", "logprobs": None, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 5, "completion_tokens": 3, "total_tokens": 8,
                  "prompt_tokens_details": {"cached_tokens": 0}},
    }  # fmt: skip
    return _generation("complete", "Continue texts.", "TextCompletion", "CompletionRequest", asked, answer)


def _generation(name: str, summary: str, answer_kind: str, body_kind: str, asked: _Schema, answer: _Schema) -> _Schema:
    content = {
        "application/json": {"schema": {"$ref": _REF.format(answer_kind)}, "example": answer},
        "text/event-stream": {
            "schema": {"type": "string", "description": f"Each chunk is a {answer_kind}Chunk."},
            "example": 'data: {"id":"cmpl-7d0f3a", ...}\n\ndata: [DONE]\n\n',
        },
    }
    whole = {
        "description": f"The answer. {_STREAM}",
        "headers": _headers("x-request-id", *_RATE_HEADERS),
        "content": content,
    }
    return _post(name, summary, body_kind, asked, whole, (*_WITH_BODY, 429, 503)) | {
        "parameters": [
            _header_parameter("x-slo-ttft-ms", "Refuse it if the first token would come later. Milliseconds."),
            _header_parameter("x-slo-tpot-ms", "Refuse it if tokens would come more slowly. Milliseconds."),
            _header_parameter("x-session-id", "Requests that belong together.", {"type": "string", "maxLength": 256}),
        ],
    }


def _tokenize() -> _Schema:
    answer = {"count": 2, "max_model_len": 8192, "tokens": [19556, 905], "token_strs": None}
    return _post("tokenize", "A text or a conversation as tokens.", "TokenizeRequest", {"prompt": "Hello world"},
                 _content("TokenizeResponse", answer))  # fmt: skip


def _detokenize() -> _Schema:
    return _post("detokenize", "Tokens as text.", "DetokenizeRequest", {"tokens": [19556, 905]},
                 _content("DetokenizeResponse", {"prompt": "Hello world"}))  # fmt: skip


def _post(
    name: str, summary: str, body_kind: str, asked: _Schema, answer: _Schema, errors: Sequence[int] = (*_WITH_BODY, 429)
) -> _Schema:
    body = {"schema": {"$ref": _REF.format(body_kind)}, "example": asked}
    return {
        "operationId": name,
        "summary": summary,
        "requestBody": {"required": True, "content": {"application/json": body}},
        "responses": {"200": {"headers": _headers("x-request-id"), **answer}, **_errors(errors)},
    }


def _get(name: str, summary: str, answer_kind: str | None, errors: Sequence[int]) -> _Schema:
    answer = {"description": summary, "content": {"application/json": {"schema": {"type": "object"}}}}
    if answer_kind is not None:
        answer = _content(answer_kind) | {"description": summary}
    return {
        "operationId": name,
        "summary": summary,
        "responses": {"200": {"headers": _headers("x-request-id"), **answer}, **_errors(errors)},
    }


def _empty(name: str, summary: str, errors: Sequence[int]) -> _Schema:
    answer = {"description": "It is so. The body is empty.", "headers": _headers("x-request-id")}
    return {"operationId": name, "summary": summary, "responses": {"200": answer, **_errors(errors)}}


def _public(operation: _Schema) -> _Schema:
    return operation | {"security": []}


def _content(kind: str, example: _Schema | None = None) -> _Schema:
    content: _Schema = {"schema": {"$ref": _REF.format(kind)}}
    if example is not None:
        content["example"] = example
    return {"description": "The answer.", "content": {"application/json": content}}


def _errors(statuses: Sequence[int]) -> _Schema:
    return {str(status): {"$ref": f"#/components/responses/{status}"} for status in sorted(set(statuses))}


def _error(status: int) -> _Schema:
    names = ["x-request-id", *(["retry-after"] if status in (429, 503) else [])]
    return {
        "description": _ERRORS[status],
        "headers": _headers(*names),
        "content": {"application/json": {"schema": {"$ref": _REF.format("Error")}}},
    }


def _headers(*names: str) -> _Schema:
    return {name: {"$ref": f"#/components/headers/{name}"} for name in names}


def _header(text: str) -> _Schema:
    return {"description": text, "schema": {"type": "string"}}


def _header_parameter(name: str, text: str, schema: _Schema | None = None) -> _Schema:
    number = {"type": "number", "exclusiveMinimum": 0}
    return {"name": name, "in": "header", "required": False, "description": text, "schema": schema or number}


def _schemas() -> _Schema:
    _, bodies = models_json_schema([(kind, "validation") for kind in _BODIES], ref_template=_PYDANTIC_REF)
    _, answers = msgspec.json.schema_components(_ANSWERS, ref_template=_MSGSPEC_REF)
    return {
        **bodies["$defs"],
        **{name: _closed(schema) for name, schema in answers.items()},
        "ChatCompletion": _whole("chat.completion", "ChatChoice"),
        "TextCompletion": _whole("text_completion", "CompletionChoice"),
        "ChatCompletionChunk": _chunk("chat.completion.chunk", "ChatChunkChoice"),
        "TextCompletionChunk": _chunk("text_completion", "CompletionChoice"),
        "Error": {
            "type": "object",
            "required": ["error"],
            "properties": {
                "error": {
                    "type": "object",
                    "required": ["message", "type", "param", "code"],
                    "properties": {
                        "message": {"type": "string"},
                        "type": {"type": "string"},
                        "param": {"type": ["string", "null"], "description": "The field or header that is wrong."},
                        "code": {"type": ["string", "null"], "description": "For programs; stays as it is."},
                    },
                    "additionalProperties": False,
                }
            },
            "additionalProperties": False,
        },
    }


def _closed(schema: _Schema) -> _Schema:
    """msgspec leaves room for other fields; there are none."""
    return schema | {"additionalProperties": False} if schema.get("type") == "object" else schema


def _whole(kind: str, choice: str) -> _Schema:
    return _answer(kind, choice, {"usage": {"$ref": _REF.format("Usage")}}, ["usage"])


def _chunk(kind: str, choice: str) -> _Schema:
    usage = {"anyOf": [{"$ref": _REF.format("Usage")}, {"type": "null"}]}
    return _answer(kind, choice, {"usage": usage}, [])


def _answer(kind: str, choice: str, more: _Schema, required: Sequence[str]) -> _Schema:
    properties = {
        "id": {"type": "string"},
        "object": {"const": kind},
        "created": {"type": "integer", "description": "Unix time in seconds."},
        "model": {"type": "string"},
        "choices": {"type": "array", "items": {"$ref": _REF.format(choice)}},
        **more,
    }
    return {
        "type": "object",
        "properties": properties,
        "required": ["id", "object", "created", "model", "choices", *required],
        "additionalProperties": False,
    }
