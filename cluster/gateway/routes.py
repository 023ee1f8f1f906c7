"""The HTTP application: what each route reads, does and answers."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any, TypeVar

from fastapi import FastAPI, Request, Response
from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect

from shoal.cluster.gateway.admission import Admission, Visit
from shoal.cluster.gateway.answer_headers import answer_headers
from shoal.cluster.gateway.backend import GenerateCall, ServedModel
from shoal.cluster.gateway.calls import chat_call, completion_calls, run_by_size
from shoal.cluster.gateway.errors import ApiError, from_validation, install_error_handlers, to_api_error
from shoal.cluster.gateway.fairness import tenant_of
from shoal.cluster.gateway.formats import ChatFormat, CompletionFormat, Format
from shoal.cluster.gateway.generation import Generation, collect
from shoal.cluster.gateway.readiness import Readiness
from shoal.cluster.gateway.responses import (
    Completion,
    DetokenizeResponse,
    ModelCard,
    ModelList,
    TokenizeResponse,
    VersionResponse,
    encode,
)
from shoal.cluster.gateway.schema import (
    ChatCompletionRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
)
from shoal.cluster.gateway.sse import DONE, ChunkWriter, ClientGoneError, EventStream, error_event, until_disconnect
from shoal.engine.request import RequestError

MAX_BODY_BYTES = 32 * 2**20
_INLINE_BODY_BYTES = 2**18  # larger bodies are parsed in a thread
SESSION_HEADER = "x-session-id"
_MAX_SESSION = 256
_CLIENT_CLOSED_REQUEST = 499  # nginx's code for an answer that nobody reads

_Body = TypeVar("_Body", bound=BaseModel)


def build_app(
    models: Mapping[str, ServedModel],
    *,
    admissions: Mapping[str, Admission] | None = None,
    max_body_bytes: int = MAX_BODY_BYTES,
    metrics_text: Callable[[], Awaitable[str]] | None = None,
) -> FastAPI:
    """The gateway over `models` by name, as they are when a request comes.

    `admissions`: who gets in, for models whose objectives and weights are not the defaults.
    `metrics_text` gives the exposition for /metrics; by default the backends' own, one after the other.
    """
    app = FastAPI(title="Shoal", openapi_url=None)
    gateway = _Gateway(models, admissions or {}, max_body_bytes, metrics_text)
    routes: Sequence[tuple[str, str, Callable[..., Awaitable[Response]]]] = (
        ("GET", "/v1/models", gateway.list_models),
        ("GET", "/v1/models/{name:path}", gateway.show_model),
        ("POST", "/v1/chat/completions", gateway.chat),
        ("POST", "/v1/completions", gateway.complete),
        ("POST", "/tokenize", gateway.tokenize),
        ("POST", "/detokenize", gateway.detokenize),
        ("GET", "/health", gateway.health),
        ("GET", "/ping", gateway.ping),
        ("GET", "/metrics", gateway.metrics),
        ("GET", "/status", gateway.status),
        ("GET", "/debug/routing", gateway.explain_routing),
        ("GET", "/version", gateway.version),
    )
    for method, path, endpoint in routes:
        app.add_route(path, endpoint, methods=[method])
    install_error_handlers(app)
    return app


class _Gateway:
    def __init__(
        self,
        models: Mapping[str, ServedModel],
        admissions: Mapping[str, Admission],
        max_body_bytes: int,
        metrics_text: Callable[[], Awaitable[str]] | None,
    ) -> None:
        self._models = models
        self._readiness = Readiness(lambda: [model.backend for model in models.values()])
        self._admissions = {
            name: admissions[name] if name in admissions else Admission(model.backend) for name, model in models.items()
        }
        self._max_body_bytes = max_body_bytes
        self._metrics_text = metrics_text or self._backends_metrics

    async def chat(self, http: Request) -> Response:
        arrival = _arrival(http)
        body = await self._read(http, ChatCompletionRequest)
        model = self._model(body.model)
        format = ChatFormat(model.tokenizer, has_logprobs=bool(body.logprobs))
        answer_id = f"{format.id_prefix}{uuid.uuid4().hex}"
        call = await chat_call(body, model, answer_id, session=arrival.session)
        return await self._answer(arrival, body, model, [call], format, answer_id)

    async def complete(self, http: Request) -> Response:
        arrival = _arrival(http)
        body = await self._read(http, CompletionRequest)
        model = self._model(body.model)
        format = CompletionFormat(
            model.tokenizer,
            num_logprobs=body.logprobs,
            num_samples=body.num_samples,
            echoes=[_echo(prompt, model) for prompt in body.prompts] if body.echo else (),
        )
        answer_id = f"{format.id_prefix}{uuid.uuid4().hex}"
        calls = await completion_calls(body, model, answer_id, session=arrival.session)
        return await self._answer(arrival, body, model, calls, format, answer_id)

    async def tokenize(self, http: Request) -> Response:
        body = await self._read(http, TokenizeRequest)
        model = self._model(body.model)
        tokenizer = model.tokenizer
        if body.messages is not None:
            messages = [message.template_message() for message in body.messages]
            tokens = await run_by_size(
                sum(len(message["content"]) for message in messages),
                lambda: tokenizer.encode(
                    tokenizer.render_chat(
                        messages,
                        add_generation_prompt=body.add_generation_prompt is not False,
                        **(body.chat_template_kwargs or {}),
                    ),
                    add_special_tokens=bool(body.add_special_tokens),
                ),
            )
        else:
            text = body.prompt or ""
            tokens = await run_by_size(
                len(text), lambda: tokenizer.encode(text, add_special_tokens=body.add_special_tokens is not False)
            )
        return _json(
            TokenizeResponse(
                count=len(tokens),
                max_model_len=model.max_model_len,
                tokens=tokens,
                token_strs=[tokenizer.token_piece(token) for token in tokens] if body.return_token_strs else None,
            )
        )

    async def detokenize(self, http: Request) -> Response:
        body = await self._read(http, DetokenizeRequest)
        model = self._model(body.model)
        for index, token in enumerate(body.tokens):
            if token >= model.vocab_size:
                raise ApiError(
                    400,
                    f"token {token} is not in the vocabulary; this model has tokens 0 to {model.vocab_size - 1}",
                    param=f"tokens.{index}",
                )
        text = await run_by_size(
            len(body.tokens), lambda: model.tokenizer.decode(body.tokens, skip_special_tokens=False)
        )
        return _json(DetokenizeResponse(text))

    async def list_models(self, http: Request) -> Response:
        return _json(ModelList([_card(model) for model in self._models.values()]))

    async def show_model(self, http: Request) -> Response:
        return _json(_card(self._model(http.path_params["name"])))

    async def health(self, http: Request) -> Response:
        """Ready: every model answers."""
        await self._readiness.check()
        return Response()

    async def ping(self, http: Request) -> Response:
        """Alive, whatever else is."""
        return Response()

    async def metrics(self, http: Request) -> Response:
        return Response(await self._metrics_text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def status(self, http: Request) -> Response:
        return _json({"models": await asyncio.gather(*map(_status, self._models.values()))})

    async def explain_routing(self, http: Request) -> Response:
        """The last decisions for the model that the query names, or for each."""
        name = http.query_params.get("model")
        models = self._models.values() if name is None else [self._model(name)]
        return _json({"models": [{"name": model.name, "decisions": model.backend.explain()} for model in models]})

    async def version(self, http: Request) -> Response:
        return _json(VersionResponse(_own_version()))

    async def _backends_metrics(self) -> str:
        backends = {id(model.backend): model.backend for model in self._models.values()}
        return "".join(await asyncio.gather(*(backend.metrics_text() for backend in backends.values())))

    async def _answer(
        self,
        arrival: _Arrival,
        body: ChatCompletionRequest | CompletionRequest,
        model: ServedModel,
        calls: Sequence[GenerateCall],
        format: Format,
        answer_id: str,
    ) -> Response:
        created = int(time.time())
        admission = self._admissions[model.name]
        objectives = admission.objectives.overridden(arrival.http.headers)
        visits = [Visit(call, arrival.tenant, objectives, arrival.seconds) for call in calls]
        generation = Generation(model, calls, [admission.run(visit) for visit in visits])
        if body.stream:
            writer = ChunkWriter(
                id=answer_id,
                object=format.chunk_object,
                created=created,
                model=model.name,
                has_usage=body.has_usage_chunk,
            )
            events = _events(generation, body, format, writer, arrival.http.state.request_id)
            return EventStream(events, lambda: answer_headers(visits))
        try:
            wholes = await until_disconnect(arrival.http.receive, collect(generation))
        except ClientGoneError:
            return Response(status_code=_CLIENT_CLOSED_REQUEST)
        choices: Any = [format.choice(whole) for whole in wholes]
        whole_answer = Completion(answer_id, format.object, created, model.name, choices, generation.usage())
        return _json(whole_answer, answer_headers(visits))

    def _model(self, name: str | None) -> ServedModel:
        """The model of that name; the first one for None, which only vLLM's own routes allow."""
        if name is None:
            return next(iter(self._models.values()))
        if name not in self._models:
            raise ApiError(
                404,
                f"the model '{name[:200]}' does not exist; this server has: {', '.join(self._models)}",
                param="model",
                code="model_not_found",
            )
        return self._models[name]

    async def _read(self, http: Request, kind: type[_Body]) -> _Body:
        """The body of a request, checked."""
        data = await self._read_bytes(http)
        try:
            return await _validate(data, kind)
        except ValidationError as error:
            raise from_validation(error, kind) from None

    async def _read_bytes(self, http: Request) -> bytes:
        too_large = ApiError(
            413,
            f"the body is larger than {self._max_body_bytes} bytes, the limit of this server",
            code="body_too_large",
        )
        declared = http.headers.get("content-length", "")
        if declared.isdecimal() and int(declared) > self._max_body_bytes:
            raise too_large
        data = bytearray()
        try:
            async for part in http.stream():
                data += part
                if len(data) > self._max_body_bytes:
                    raise too_large
        except ClientDisconnect:
            raise ApiError(_CLIENT_CLOSED_REQUEST, "the client closed the connection") from None
        return bytes(data)


@dataclass(frozen=True, slots=True)
class _Arrival:
    """An HTTP request for tokens: whose it is, what it belongs to, and when it came (time.monotonic())."""

    http: Request
    tenant: str
    session: str
    seconds: float


def _arrival(http: Request) -> _Arrival:
    """Raises RequestError naming the header."""
    session = http.headers.get(SESSION_HEADER, "")
    if len(session) > _MAX_SESSION:
        raise RequestError(f"{SESSION_HEADER} is longer than {_MAX_SESSION} characters", param=SESSION_HEADER)
    return _Arrival(http, tenant_of(http.headers), session, time.monotonic())


async def _validate(data: bytes, kind: type[_Body]) -> _Body:
    if len(data) <= _INLINE_BODY_BYTES:
        return kind.model_validate_json(data)
    return await asyncio.to_thread(kind.model_validate_json, data)


async def _events(
    generation: Generation,
    body: ChatCompletionRequest | CompletionRequest,
    format: Format,
    writer: ChunkWriter,
    request_id: str,
) -> AsyncGenerator[bytes, None]:
    """The events of one stream: one per choice and engine step; those of one step leave together."""
    has_started = False
    try:
        async with aclosing(generation.deltas()) as steps:
            async for deltas in steps:
                has_started = True
                usage = generation.usage() if body.has_running_usage else None
                yield b"".join(writer.chunk(format.chunk_choice(delta), usage) for delta in deltas)
    except Exception as error:
        if not has_started:
            raise
        yield error_event(to_api_error(error, request_id).body)
    else:
        if body.has_usage_chunk:
            yield writer.usage_chunk(generation.usage())
    yield DONE


def _echo(prompt: str | list[int], model: ServedModel) -> str:
    return prompt if isinstance(prompt, str) else model.tokenizer.decode(prompt)


def _card(model: ServedModel) -> ModelCard:
    return ModelCard(id=model.name, created=model.created, max_model_len=model.max_model_len, root=model.name)


async def _status(model: ServedModel) -> dict[str, Any]:
    return {"name": model.name, "max_model_len": model.max_model_len, "groups": await model.backend.groups()}


def _json(value: Any, headers: Mapping[str, str] | None = None) -> Response:
    return Response(encode(value), headers=headers, media_type="application/json")


def _own_version() -> str:
    try:
        return version("shoal")
    except PackageNotFoundError:  # run from a checkout
        return "0"
