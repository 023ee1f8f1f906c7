"""What clients may send. Every field of OpenAI's and vLLM's APIs is served, ignored because harmless, or refused."""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    WithJsonSchema,
    model_validator,
)
from pydantic.json_schema import SkipJsonSchema

from shoal.engine.request import RequestError, SamplingParams

MAX_PROMPTS = 256
MAX_CACHE_SALT = 256
DEFAULT_COMPLETION_TOKENS = 16  # OpenAI's

Prompt = str | list[int]

_Int32 = Annotated[int, Field(ge=-(2**31), lt=2**31)]
_Count = Annotated[int, Field(ge=0, lt=2**31)]
_Positive = Annotated[int, Field(ge=1, lt=2**31)]


def _refuse_unless(*neutral: Any) -> AfterValidator:
    """A field that would change the answer and is not served: only its neutral values pass."""

    def check(value: Any) -> Any:
        if value is None or any(type(value) is type(other) and value == other for other in neutral):
            return value
        allowed = " or ".join(json.dumps(other) for other in neutral)
        raise RequestError(
            "this field is not supported" + (f" (only {allowed} is)" if allowed else "") + ": leave it out"
        )

    return AfterValidator(check)


_Unsupported = Annotated[Any, _refuse_unless(), SkipJsonSchema()]
_Off = Annotated[Any, _refuse_unless(False), SkipJsonSchema()]
_Empty = Annotated[Any, _refuse_unless([]), SkipJsonSchema()]


def _shown_as(*kinds: Mapping[str, Any]) -> WithJsonSchema:
    """Any of these JSON schemas, in the description of the API; null stands for the default."""
    return WithJsonSchema({"anyOf": [*kinds, {"type": "null"}]})


_TEXT: Mapping[str, Any] = {"type": "string"}
_TEXTS: Mapping[str, Any] = {"type": "array", "items": {"type": "string"}}
_TOKENS: Mapping[str, Any] = {"type": "array", "items": {"type": "integer", "minimum": 0}}


class _Body(BaseModel):
    # strict: true is not a number and "1" neither. Null stands for the default, as in OpenAI's clients.
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)


class StreamOptions(_Body):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: Any = None  # ignored: padding against traffic analysis


def _check_stop(value: Any) -> Any:
    texts = [value] if isinstance(value, str) else value
    if texts is None:
        return ()
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise RequestError("stop must be a string or a list of strings")
    return tuple(texts)


def _check_early_stopping(value: Any) -> Any:
    if value is None or isinstance(value, bool) or value == "never":
        return value
    raise RequestError('early_stopping must be true, false or "never"')


def _check_logit_bias(value: Any) -> Any:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise RequestError("logit_bias must map token ids to numbers from -100 to 100")
    bias: dict[int, float] = {}
    for token, number in value.items():
        if not (token.isascii() and token.isdecimal() and len(token) < 10):
            raise RequestError(f"logit_bias names {token[:40]!r}, which is no token id")
        if isinstance(number, bool) or not isinstance(number, int | float) or not -100 <= number <= 100:
            raise RequestError(f"logit_bias must be between -100 and 100, got {str(number)[:40]} for token {token}")
        bias[int(token)] = float(number)
    return bias


class _Generation(_Body):
    """Fields that chat and text completions have in common."""

    model: str
    n: _Positive | None = None
    best_of: _Positive | None = None
    use_beam_search: bool | None = None
    length_penalty: float | None = None
    early_stopping: Annotated[bool | Literal["never"] | None, BeforeValidator(_check_early_stopping)] = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: _Int32 | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: Annotated[
        dict[int, float],
        BeforeValidator(_check_logit_bias),
        _shown_as(
            {
                "type": "object",
                "propertyNames": {"pattern": "^[0-9]{1,9}$"},
                "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
            }
        ),
    ] = Field(default_factory=dict)
    seed: int | None = None
    stop: Annotated[tuple[str, ...], BeforeValidator(_check_stop), _shown_as(_TEXT, _TEXTS)] = ()
    stop_token_ids: Annotated[list[_Count], Field(fail_fast=True)] | None = None
    bad_words: Annotated[list[str], Field(fail_fast=True)] | None = None
    max_tokens: _Positive | None = None
    min_tokens: _Count | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    priority: _Int32 | None = None
    cache_salt: Annotated[str, Field(max_length=MAX_CACHE_SALT)] | None = None

    # Harmless: accepted and ignored.
    user: Any = None
    metadata: Any = None
    store: Any = None
    service_tier: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None
    prompt_cache_retention: Any = None
    parallel_tool_calls: Any = None
    request_id: Any = None
    return_tokens_as_token_ids: _Off = None

    # Of OpenAI or vLLM, and would change the answer.
    truncate_prompt_tokens: _Unsupported = None
    prompt_logprobs: _Unsupported = None
    allowed_token_ids: _Unsupported = None
    guided_json: _Unsupported = None
    guided_regex: _Unsupported = None
    guided_choice: _Unsupported = None
    guided_grammar: _Unsupported = None
    structured_outputs: _Unsupported = None
    response_format: Annotated[Any, _refuse_unless({"type": "text"}), SkipJsonSchema()] = None
    spaces_between_special_tokens: Annotated[Any, _refuse_unless(True), SkipJsonSchema()] = None

    @model_validator(mode="after")
    def _check_stream(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise RequestError("stream_options is only allowed together with stream: true", param="stream_options")
        if self.stream and not self.use_beam_search and (self.best_of or 0) > self.num_samples:
            raise RequestError(
                "which samples are best is known at the end: best_of cannot be streamed", param="best_of"
            )
        return self

    @property
    def num_samples(self) -> int:
        return self.n or 1

    @property
    def has_usage_chunk(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def has_running_usage(self) -> bool:
        return bool(self.has_usage_chunk and self.stream_options and self.stream_options.continuous_usage_stats)

    @property
    def tokens_wanted(self) -> tuple[str, int | None]:
        """The field that says how many tokens to generate at most, and its value."""
        return "max_tokens", self.max_tokens

    @property
    def num_logprobs(self) -> tuple[str, int | None]:
        """The field that says how many alternatives to report beside each token, and its value (None: no report)."""
        raise NotImplementedError

    def sampling_params(self, max_tokens: int) -> SamplingParams:
        """The engine's parameters, with a seed drawn if none was given. Raises RequestError naming the API's field."""
        max_tokens_field, _ = self.tokens_wanted
        logprobs_field, num_logprobs = self.num_logprobs
        given: Mapping[str, Any] = {
            name: value for name in _SAME_IN_ENGINE if (value := getattr(self, name)) is not None
        }
        try:
            return SamplingParams(
                **given,
                max_tokens=max_tokens,
                logprobs=num_logprobs,
                stop_token_ids=tuple(self.stop_token_ids or ()),
                seed=secrets.randbits(63) if self.seed is None else self.seed,
            )
        except RequestError as error:
            renamed = {"max_tokens": max_tokens_field, "logprobs": logprobs_field}
            param = error.param or ""
            raise RequestError(str(error), param=renamed.get(param, param), code=error.code) from error


_SAME_IN_ENGINE = (
    "n", "best_of", "use_beam_search", "length_penalty", "early_stopping", "temperature", "top_p", "top_k", "min_p",
    "presence_penalty", "frequency_penalty", "repetition_penalty", "logit_bias", "stop", "min_tokens", "bad_words",
    "ignore_eos", "skip_special_tokens", "include_stop_str_in_output",
)  # fmt: skip


def _check_content(value: Any) -> Any:
    """A message's text: a string, or text parts, which are joined by newlines as vLLM does."""
    if value is None or isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise RequestError("content must be a string or a list of text parts")
    texts = []
    for index, part in enumerate(value):
        if not isinstance(part, dict):
            raise RequestError("a content part must be an object", param=str(index))
        kind = part.get("type", "text")
        if kind not in ("text", "input_text", "output_text"):
            raise RequestError(
                f"content parts of type {str(kind)[:40]!r} are not supported; this model reads text only",
                param=f"{index}.type",
            )
        if not isinstance(part.get("text"), str):
            raise RequestError("a text part needs its text as a string", param=f"{index}.text")
        texts.append(part["text"])
    return "\n".join(texts)


_TEXT_PARTS: Mapping[str, Any] = {
    "type": "array",
    "items": {
        "type": "object",
        "properties": {"type": {"enum": ["text", "input_text", "output_text"]}, "text": {"type": "string"}},
        "required": ["text"],
    },
}


class ChatMessage(_Body):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[str | None, BeforeValidator(_check_content), _shown_as(_TEXT, _TEXT_PARTS)] = None
    name: str | None = None
    reasoning_content: str | None = None

    # Null or empty in what the official client sends back of an answer.
    refusal: Any = None
    annotations: Any = None
    tool_call_id: Any = None
    audio: _Unsupported = None
    function_call: _Unsupported = None
    tool_calls: _Empty = None

    @model_validator(mode="after")
    def _check_has_content(self) -> Self:
        if self.content is None:
            raise RequestError(f"a message of role {self.role} needs content", param="content")
        return self

    def template_message(self) -> dict[str, str]:
        """As chat templates want it. "developer" is OpenAI's newer word for "system", which templates know."""
        fields = {
            "role": "system" if self.role == "developer" else self.role,
            "content": self.content,
            "name": self.name,
            "reasoning_content": self.reasoning_content,
        }
        return {name: value for name, value in fields.items() if value is not None}


def _check_template_kwargs(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    for name in ("messages", "tools", "add_generation_prompt"):
        if name in value:
            raise RequestError(f"{name} has a field of its own in the request", param=name)
    return value


class _ChatPrompt(BaseModel):
    """Fields from which a chat's prompt is made."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, fail_fast=True)]
    add_generation_prompt: bool | None = None
    chat_template_kwargs: Annotated[dict[str, Any] | None, BeforeValidator(_check_template_kwargs)] = None

    chat_template: _Unsupported = None
    continue_final_message: _Off = None
    documents: _Empty = None


class ChatCompletionRequest(_ChatPrompt, _Generation):
    """POST /v1/chat/completions."""

    max_completion_tokens: _Positive | None = None
    logprobs: bool | None = None
    top_logprobs: _Count | None = None
    tools: Annotated[list[dict[str, Any]], Field(fail_fast=True)] | None = None
    tool_choice: Any = None

    include_reasoning: Any = None
    add_special_tokens: _Off = None
    echo: _Off = None
    audio: _Unsupported = None
    functions: _Empty = None
    function_call: Annotated[Any, _refuse_unless("none"), SkipJsonSchema()] = None
    modalities: Annotated[Any, _refuse_unless(["text"]), SkipJsonSchema()] = None
    prediction: _Unsupported = None
    reasoning_effort: _Unsupported = None
    verbosity: _Unsupported = None
    web_search_options: _Unsupported = None

    @model_validator(mode="after")
    def _check_combinations(self) -> Self:
        if self.tools and self.tool_choice != "none":
            raise RequestError('tools are not supported: leave them out, or set tool_choice to "none"', param="tools")
        if not self.tools and self.tool_choice not in (None, "none", "auto"):
            raise RequestError("tool_choice asks for a tool, and tools are not supported", param="tool_choice")
        if self.top_logprobs and not self.logprobs:
            raise RequestError("top_logprobs needs logprobs: true", param="top_logprobs")
        return self

    @property
    def tokens_wanted(self) -> tuple[str, int | None]:
        if self.max_completion_tokens is not None:
            return "max_completion_tokens", self.max_completion_tokens
        return "max_tokens", self.max_tokens

    @property
    def num_logprobs(self) -> tuple[str, int | None]:
        return "top_logprobs", (self.top_logprobs or 0) if self.logprobs else None


def _check_prompt(value: Any) -> list[Prompt]:
    """A string, a list of strings, a list of token ids, or a list of those, as a list of prompts."""
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list):
        raise RequestError("prompt must be a string, a list of strings, token ids, or a list of token id lists")
    if not value:
        raise RequestError("prompt must not be empty")
    if _are_ids(value):
        return [value]
    if len(value) > MAX_PROMPTS:
        raise RequestError(f"prompt holds {len(value)} prompts; at most {MAX_PROMPTS} go in one request")
    if all(isinstance(item, str) for item in value) or all(isinstance(item, list) and _are_ids(item) for item in value):
        return value
    raise RequestError("prompt must hold only strings, only token ids, or only lists of token ids")


def _are_ids(value: list[Any]) -> bool:
    return all(type(item) is int for item in value)


class CompletionRequest(_Generation):
    """POST /v1/completions."""

    prompt: Annotated[
        Any,
        BeforeValidator(_check_prompt),
        WithJsonSchema({"anyOf": [_TEXT, _TEXTS, _TOKENS, {"type": "array", "items": _TOKENS}]}),
    ]
    echo: bool | None = None
    logprobs: _Count | None = None
    add_special_tokens: bool | None = None

    suffix: Annotated[Any, _refuse_unless(""), SkipJsonSchema()] = None
    prompt_embeds: _Unsupported = None

    @model_validator(mode="after")
    def _check_combinations(self) -> Self:
        if self.echo and self.logprobs is not None:
            raise RequestError("log-probabilities of an echoed prompt are not supported", param="logprobs")
        return self

    @property
    def prompts(self) -> list[Prompt]:
        prompts: list[Prompt] = self.prompt
        return prompts

    @property
    def num_logprobs(self) -> tuple[str, int | None]:
        return "logprobs", self.logprobs


class TokenizeRequest(_Body):
    """POST /tokenize with `prompt` or `messages`."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[ChatMessage], Field(min_length=1, fail_fast=True)] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    return_token_strs: bool | None = None
    chat_template_kwargs: Annotated[dict[str, Any] | None, BeforeValidator(_check_template_kwargs)] = None

    @model_validator(mode="after")
    def _check_one_input(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise RequestError("give either prompt or messages", param="prompt")
        return self


class DetokenizeRequest(_Body):
    """POST /detokenize."""

    model: str | None = None
    tokens: Annotated[list[_Count], Field(fail_fast=True)]
