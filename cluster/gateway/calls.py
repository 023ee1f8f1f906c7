"""From a checked body to calls for a backend: prompts become token ids, here and only here."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TypeVar

from shoal.cluster.gateway.backend import GenerateCall, ServedModel
from shoal.cluster.gateway.schema import (
    DEFAULT_COMPLETION_TOKENS,
    ChatCompletionRequest,
    ChatMessage,
    CompletionRequest,
    Prompt,
)
from shoal.engine.request import RequestError
from shoal.engine.tokenizer import with_bad_words

# Encoding takes about 1 us a character; longer texts go to a thread, so that other streams do not wait.
_INLINE_CHARS = 8192

_T = TypeVar("_T")


async def chat_call(
    body: ChatCompletionRequest, model: ServedModel, request_id: str, *, session: str = ""
) -> GenerateCall:
    """The call for a chat. Its default limit is the rest of the model's length. Raises RequestError."""
    num_chars = _num_chars(body.messages)
    _check_fits(num_chars, model, "messages")
    prompt_ids = await run_by_size(
        num_chars,
        lambda: model.tokenizer.encode_chat(
            [message.template_message() for message in body.messages],
            add_generation_prompt=body.add_generation_prompt is not False,
            **(body.chat_template_kwargs or {}),
        ),
    )
    return _call(body, model, request_id, prompt_ids, param="messages", default_tokens=None, session=session)


async def completion_calls(
    body: CompletionRequest, model: ServedModel, request_id: str, *, session: str = ""
) -> list[GenerateCall]:
    """One call per prompt. Raises RequestError."""
    calls = []
    for index, prompt in enumerate(body.prompts):
        prompt_ids = await _prompt_ids(prompt, body, model)
        calls.append(
            _call(
                body,
                model,
                f"{request_id}-{index}",
                prompt_ids,
                param="prompt",
                default_tokens=DEFAULT_COMPLETION_TOKENS,
                session=session,
            )
        )
    return calls


async def run_by_size(num_chars: int, work: Callable[[], _T]) -> _T:
    """Do `work` at once when it is about a short text, in a thread otherwise."""
    return work() if num_chars <= _INLINE_CHARS else await asyncio.to_thread(work)


async def _prompt_ids(prompt: Prompt, body: CompletionRequest, model: ServedModel) -> list[int]:
    if not prompt:
        raise RequestError("prompt must not be empty", param="prompt")
    if isinstance(prompt, str):
        text = prompt
        _check_fits(len(text), model, "prompt")
        return await run_by_size(
            len(text),
            lambda: model.tokenizer.encode(text, add_special_tokens=body.add_special_tokens is not False),
        )
    for token in prompt:
        if not 0 <= token < model.vocab_size:
            raise RequestError(
                f"prompt holds token {token}; this model has tokens 0 to {model.vocab_size - 1}", param="prompt"
            )
    return prompt


def _call(
    body: ChatCompletionRequest | CompletionRequest,
    model: ServedModel,
    request_id: str,
    prompt_ids: list[int],
    *,
    param: str,
    default_tokens: int | None,
    session: str,
) -> GenerateCall:
    num_prompt = len(prompt_ids)
    room = model.max_model_len - num_prompt
    field, wanted = body.tokens_wanted
    if num_prompt == 0:
        raise RequestError("the prompt is empty", param=param)
    if room < 1 or (wanted or 0) > room:
        asked = f"{num_prompt} in the {param}" + (f", {wanted} in the completion" if wanted else "")
        raise RequestError(
            f"This model's maximum context length is {model.max_model_len} tokens. However, you requested "
            f"{num_prompt + (wanted or 1)} tokens ({asked}). Please reduce the length of the {param}"
            + (f" or {field}." if room >= 1 else "."),
            param=param if room < 1 else field,
            code="context_length_exceeded",
        )
    max_tokens = wanted or min(room, default_tokens or room)
    params = with_bad_words(body.sampling_params(max_tokens), model.tokenizer)
    params.check_vocab(model.vocab_size)
    return GenerateCall(
        request_id=request_id,
        prompt_ids=tuple(prompt_ids),
        params=params,
        priority=body.priority or 0,
        cache_salt=body.cache_salt or "",
        session=session,
    )


def _check_fits(num_chars: int, model: ServedModel, param: str) -> None:
    """Refuse a text that cannot fit whatever its tokens are, before spending seconds on encoding it."""
    fewest = num_chars // model.tokenizer.max_token_bytes
    if fewest > model.max_model_len:
        raise RequestError(
            f"This model's maximum context length is {model.max_model_len} tokens. However, your {param} hold "
            f"{num_chars} characters, at least {fewest} tokens. Please reduce the length of the {param}.",
            param=param,
            code="context_length_exceeded",
        )


def _num_chars(messages: list[ChatMessage]) -> int:
    return sum(len(message.content or "") for message in messages)
