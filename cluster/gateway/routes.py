"""The HTTP application: what each route reads, does and answers."""

from __future__ import annotations

import asyncio
import re
import time
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from itertools import islice
from typing import Any, TypeVar

from fastapi import FastAPI, Request, Response
from pydantic import BaseModel, ValidationError
from starlette.middleware.cors import CORSMiddleware

from shoal.cluster.gateway.admission import Admission, Visit
from shoal.cluster.gateway.answer_headers import answer_headers
from shoal.cluster.gateway.auth import Auth, AuthMiddleware, Grant
from shoal.cluster.gateway.backend import GenerateCall, ServedModel
from shoal.cluster.gateway.calls import chat_call, completion_calls, run_by_size
from shoal.cluster.gateway.errors import ApiError, from_validation, install_error_handlers, to_api_error
from shoal.cluster.gateway.formats import ChatFormat, CompletionFormat, Format
from shoal.cluster.gateway.front import CLIENT_CLOSED_REQUEST, FrontMiddleware, read_body
from shoal.cluster.gateway.generation import Generation, collect
from shoal.cluster.gateway.openapi import description
from shoal.cluster.gateway.readiness import Readiness
from shoal.cluster.gateway.recording import Recorder, RecordingMiddleware
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
from shoal.cluster.gateway.timeline import Recording, server_timing, timing_of
from shoal.engine.request import RequestError

MAX_BODY_BYTES = 32 * 2**20
BODY_TIMEOUT_S = 30.0
_INLINE_BODY_BYTES = 2**18  # larger bodies are parsed in a thread
# Each field that is unknown would take half a kilobyte to refuse. A quote within a text has a backslash before it.
_MAX_FIELDS = 200_000
_FIELD = re.compile(rb'(?<!\\)"[ \t\r\n]*:')
SESSION_HEADER = "x-session-id"
TIMELINE_HEADER = "x-shoal-timeline"  # "1": the answer tells where its time went
_MAX_SESSION = 256

_Body = TypeVar("_Body", bound=BaseModel)


def build_app(
    models: Mapping[str, ServedModel],
    *,
    admissions: Mapping[str, Admission] | None = None,
    max_body_bytes: int = MAX_BODY_BYTES,
    body_timeout_s: float = BODY_TIMEOUT_S,
    cors_origins: Sequence[str] = (),
    auth: Auth | None = None,
    recorder: Recorder | None = None,
) -> FastAPI:
    """The gateway over `models` by name, as they are when a request comes.

    `admissions`: who gets in, for models whose objectives and weights are not the defaults. `auth`: who may ask at all;
    None is anybody. `cors_origins`: sites whose pages may ask, "*" for all. `recorder` keeps the timelines.
    """
    app = FastAPI(title="Shoal", openapi_url=None)
    gateway = _Gateway(models, admissions or {}, max_body_bytes, body_timeout_s, has_keys=auth is not None)
    routes: Sequence[tuple[str, str, Callable[..., Awaitable[Response]]]] = (
        ("GET", "/v1/models", gateway.list_models),
        ("GET", "/v1/models/{name:path}", gateway.show_model),
        ("POST", "/v1/chat/completions", gateway.chat),
        ("POST", "/v1/completions", gateway.complete),
        ("POST", "/tokenize", gateway.tokenize),
        ("POST", "/detokenize", gateway.detokenize),
        ("GET", "/health", gateway.health),
        ("GET", "/ping", gateway.ping),
        ("GET", "/version", gateway.version),
        ("GET", "/openapi.json", gateway.describe),
    )
    for method, path, endpoint in routes:
        app.add_route(path, endpoint, methods=[method])
    app.add_middleware(AuthMiddleware, auth=auth)  # the last one that is added stands in front
    if cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(cors_origins),
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["*"],
        )
    app.add_middleware(FrontMiddleware)
    app.add_middleware(RecordingMiddleware, recorder=recorder or Recorder())
    install_error_handlers(app)
    return app


class _Gateway:
    def __init__(
        self,
        models: Mapping[str, ServedModel],
        admissions: Mapping[str, Admission],
        max_body_bytes: int,
        body_timeout_s: float,
        *,
        has_keys: bool,
    ) -> None:
        self._models = models
        self._readiness = Readiness(lambda: [model.backend for model in models.values()])
        self._admissions = {
            name: admissions[name] if name in admissions else Admission(model.backend) for name, model in models.items()
        }
        self._max_body_bytes = max_body_bytes
        self._body_timeout_s = body_timeout_s
        self._description = encode(description(_own_version(), has_keys=has_keys))

    async def chat(self, http: Request) -> Response:
        arrival = _arrival(http)
        body = await self._read(http, ChatCompletionRequest)
        model = self._model(body.model, http)
        format = ChatFormat(model.tokenizer, has_logprobs=bool(body.logprobs))
        answer_id = f"{format.id_prefix}{uuid.uuid4().hex}"
        call = await chat_call(body, model, answer_id, session=arrival.session)
        return await self._answer(arrival, body, model, [call], format, answer_id)

    async def complete(self, http: Request) -> Response:
        arrival = _arrival(http)
        body = await self._read(http, CompletionRequest)
        model = self._model(body.model, http)
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
        model = self._model(body.model, http)
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
        model = self._model(body.model, http)
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
        return _json(ModelList([_card(model) for model in self._allowed(http)]))

    async def show_model(self, http: Request) -> Response:
        return _json(_card(self._model(http.path_params["name"], http)))

    async def health(self, http: Request) -> Response:
        """Ready: every model answers."""
        await self._readiness.check()
        return Response()

    async def ping(self, http: Request) -> Response:
        """Alive, whatever else is."""
        return Response()

    async def version(self, http: Request) -> Response:
        return _json(VersionResponse(_own_version()))

    async def describe(self, http: Request) -> Response:
        return Response(self._description, media_type="application/json")

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
        recording, grant = arrival.recording, arrival.grant
        traceparent = recording.trace.traceparent if recording.trace is not None else ""
        bound = grant.bound(calls, has_own_limit=body.tokens_wanted[1] is not None)
        calls = [replace(call, http_request_id=recording.request_id, traceparent=traceparent) for call in bound]
        visits = [Visit(call, grant.tenant, objectives, arrival.seconds) for call in calls]
        recording.tokenized_s = time.monotonic()
        recording.answer_id, recording.model, recording.is_stream = answer_id, model.name, bool(body.stream)
        recording.visits = visits
        steps = [grant.metered(admission.run(visit), visit.call, model.name) for visit in visits]
        generation = Generation(model, calls, steps)
        if body.stream:
            writer = ChunkWriter(
                id=answer_id,
                object=format.chunk_object,
                created=created,
                model=model.name,
                has_usage=body.has_usage_chunk or arrival.wants_timeline,
            )
            events = _events(generation, body, format, writer, recording, wants_timeline=arrival.wants_timeline)
            return EventStream(events, lambda: answer_headers(visits))
        try:
            wholes = await until_disconnect(arrival.http.receive, collect(generation))
        except ClientGoneError:
            return Response(status_code=CLIENT_CLOSED_REQUEST)
        choices: Any = [format.choice(whole) for whole in wholes]
        whole_answer = Completion(answer_id, format.object, created, model.name, choices, generation.usage())
        headers = answer_headers(visits)
        if arrival.wants_timeline:
            headers["server-timing"] = server_timing(visits)
        return _json(whole_answer, headers)

    def _allowed(self, http: Request) -> list[ServedModel]:
        grant = _grant(http)
        return [model for name, model in self._models.items() if grant.may_ask(name)]

    def _model(self, name: str | None, http: Request) -> ServedModel:
        """The model of that name; the first one for None, which only vLLM's own routes allow."""
        if name is None:
            name = next((model.name for model in self._allowed(http)), next(iter(self._models)))
        if name not in self._models:
            names = ", ".join(model.name for model in self._allowed(http))
            raise ApiError(
                404,
                f"the model '{name[:200]}' does not exist; this server has: {names}",
                param="model",
                code="model_not_found",
            )
        _grant(http).check_model(name)
        return self._models[name]

    async def _read(self, http: Request, kind: type[_Body]) -> _Body:
        """The body of a request, checked."""
        data = await read_body(http, max_bytes=self._max_body_bytes, timeout_s=self._body_timeout_s)
        if (recording := getattr(http.state, "recording", None)) is not None:
            recording.read_s = time.monotonic()
        try:
            return await _validate(data, kind)
        except ValidationError as error:
            raise from_validation(error, kind) from None


@dataclass(frozen=True, slots=True)
class _Arrival:
    """An HTTP request for tokens: what it may do, what it belongs to, and when it came (time.monotonic())."""

    http: Request
    grant: Grant
    session: str
    seconds: float
    recording: Recording
    wants_timeline: bool


def _arrival(http: Request) -> _Arrival:
    """Raises RequestError naming the header."""
    session = http.headers.get(SESSION_HEADER, "")
    if len(session) > _MAX_SESSION:
        raise RequestError(f"{SESSION_HEADER} is longer than {_MAX_SESSION} characters", param=SESSION_HEADER)
    recording: Recording = http.state.recording
    grant = _grant(http)
    recording.tenant = grant.tenant
    recording.taken_up_s = time.monotonic()
    wants_timeline = http.headers.get(TIMELINE_HEADER) == "1"
    return _Arrival(http, grant, session, recording.taken_up_s, recording, wants_timeline)


def _grant(http: Request) -> Grant:
    """What the request may do, as AuthMiddleware says."""
    grant: Grant = http.state.grant
    return grant


async def _validate(data: bytes, kind: type[_Body]) -> _Body:
    if len(data) <= _INLINE_BODY_BYTES:
        return kind.model_validate_json(data)
    return await asyncio.to_thread(_validate_large, data, kind)


def _validate_large(data: bytes, kind: type[_Body]) -> _Body:
    if next(islice(_FIELD.finditer(data), _MAX_FIELDS, None), None) is not None:
        raise ApiError(400, f"the body has more than {_MAX_FIELDS} fields, in all its objects")
    return kind.model_validate_json(data)


async def _events(
    generation: Generation,
    body: ChatCompletionRequest | CompletionRequest,
    format: Format,
    writer: ChunkWriter,
    recording: Recording,
    *,
    wants_timeline: bool,
) -> AsyncGenerator[bytes, None]:
    """The events of one stream: one per choice and engine step; those that come together leave together."""
    has_started, has_running_usage = False, body.has_running_usage
    try:
        async with aclosing(generation.deltas()) as steps:
            async for deltas in steps:
                has_started = True
                usage = generation.usage() if has_running_usage else None
                yield b"".join([writer.chunk(format.chunk_choice(delta), usage) for delta in deltas])
    except Exception as error:
        if not has_started:
            raise
        recording.has_failed = True
        yield error_event(to_api_error(error, recording.request_id).body)
    else:
        if body.has_usage_chunk or wants_timeline:
            timeline = timing_of(recording.visits) if wants_timeline else None
            yield writer.usage_chunk(generation.usage(), timeline)
    yield DONE


def _echo(prompt: str | list[int], model: ServedModel) -> str:
    return prompt if isinstance(prompt, str) else model.tokenizer.decode(prompt)


def _card(model: ServedModel) -> ModelCard:
    return ModelCard(id=model.name, created=model.created, max_model_len=model.max_model_len, root=model.name)


def _json(value: Any, headers: Mapping[str, str] | None = None) -> Response:
    return Response(encode(value), headers=headers, media_type="application/json")


def _own_version() -> str:
    try:
        return version("shoal")
    except PackageNotFoundError:  # run from a checkout
        return "0"
