"""Every wrong request is answered 4xx in OpenAI's form, naming the field, and the gateway goes on serving."""

from __future__ import annotations

import asyncio
import json
import string
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shoal.cluster.gateway.routes import build_app

CHAT: dict[str, Any] = {"model": "smollm2", "messages": [{"role": "user", "content": "Hi"}]}
TEXT: dict[str, Any] = {"model": "smollm2", "prompt": "Hi"}
HUGE = 10**30


def said(*messages: Any) -> dict[str, Any]:
    return {"messages": list(messages)}


def asked(**fields: Any) -> dict[str, Any]:
    return said({"role": "user", "content": "Hi"} | fields)


BAD_SAMPLING = [
    ({"temperature": -0.1}, "temperature"),
    ({"temperature": 1e9}, "temperature"),
    ({"temperature": "hot"}, "temperature"),
    ({"temperature": True}, "temperature"),
    ({"temperature": [1]}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"top_p": 1.01}, "top_p"),
    ({"top_k": -2}, "top_k"),
    ({"top_k": 1.5}, "top_k"),
    ({"top_k": HUGE}, "top_k"),
    ({"min_p": -1}, "min_p"),
    ({"presence_penalty": 2.1}, "presence_penalty"),
    ({"frequency_penalty": -2.1}, "frequency_penalty"),
    ({"repetition_penalty": 0}, "repetition_penalty"),
    ({"n": 0}, "n"),
    ({"n": -1}, "n"),
    ({"n": 65}, "n"),
    ({"n": HUGE}, "n"),
    ({"n": True}, "n"),
    ({"n": "2"}, "n"),
    ({"n": 2.0}, "n"),
    ({"seed": 2**64}, "seed"),
    ({"seed": "x"}, "seed"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": -5}, "max_tokens"),
    ({"max_tokens": HUGE}, "max_tokens"),
    ({"max_tokens": 513}, "max_tokens"),
    ({"min_tokens": -1}, "min_tokens"),
    ({"min_tokens": 9, "max_tokens": 8}, "min_tokens"),
    ({"stop": ""}, "stop"),
    ({"stop": ["a", 1]}, "stop"),
    ({"stop": {"a": 1}}, "stop"),
    ({"stop": ["a"] * 17}, "stop"),
    ({"stop_token_ids": [-1]}, "stop_token_ids.0"),
    ({"stop_token_ids": [49152]}, "stop_token_ids"),
    ({"stop_token_ids": 3}, "stop_token_ids"),
    ({"logit_bias": {"a": 1}}, "logit_bias"),
    ({"logit_bias": {"5": 101}}, "logit_bias"),
    ({"logit_bias": {"5": True}}, "logit_bias"),
    ({"logit_bias": {"99999999": 1}}, "logit_bias"),
    ({"logit_bias": [1]}, "logit_bias"),
    ({"ignore_eos": 1}, "ignore_eos"),
    ({"stream": "yes"}, "stream"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"stream": True, "stream_options": {"include_usag": True}}, "stream_options.include_usag"),
    ({"stream": True, "stream_options": 1}, "stream_options"),
    ({"priority": "high"}, "priority"),
    ({"cache_salt": "x" * 257}, "cache_salt"),
    ({"model": None}, "model"),
    ({"model": 7}, "model"),
    ({"response_format": {"type": "json_object"}}, "response_format"),
    ({"n": 3, "best_of": 2}, "best_of"),
    ({"best_of": 0}, "best_of"),
    ({"best_of": 65}, "best_of"),
    ({"best_of": 2, "stream": True}, "best_of"),
    ({"use_beam_search": 1}, "use_beam_search"),
    ({"length_penalty": 2.0}, "length_penalty"),
    ({"early_stopping": True}, "early_stopping"),
    ({"early_stopping": "sometimes"}, "early_stopping"),
    ({"use_beam_search": True, "early_stopping": 1}, "early_stopping"),
    ({"use_beam_search": True, "length_penalty": 11}, "length_penalty"),
    ({"use_beam_search": True, "best_of": 11}, "best_of"),
    ({"use_beam_search": True, "n": 11}, "n"),
    ({"use_beam_search": True, "temperature": 0.7}, "temperature"),
    ({"use_beam_search": True, "top_k": 5}, "top_k"),
    ({"use_beam_search": True, "top_p": 0.9}, "top_p"),
    ({"use_beam_search": True, "min_p": 0.1}, "min_p"),
    ({"use_beam_search": True, "min_tokens": 1}, "min_tokens"),
    ({"use_beam_search": True, "presence_penalty": 1.0}, "presence_penalty"),
    ({"use_beam_search": True, "frequency_penalty": 1.0}, "frequency_penalty"),
    ({"use_beam_search": True, "repetition_penalty": 1.1}, "repetition_penalty"),
    ({"use_beam_search": True, "logit_bias": {"5": 1}}, "logit_bias"),
    ({"use_beam_search": True, "stop": "."}, "stop"),
    ({"guided_regex": "a+"}, "guided_regex"),
    ({"prompt_logprobs": 1}, "prompt_logprobs"),
    ({"temprature": 1}, "temprature"),
]
BAD_CHAT = [
    ({"messages": []}, "messages"),
    ({"messages": "Hi"}, "messages"),
    ({"messages": [1]}, "messages.0"),
    (said({"role": "user"}), "messages.0.content"),
    (said({"content": "Hi"}), "messages.0.role"),
    (said({"role": "robot", "content": "Hi"}), "messages.0.role"),
    (asked(content=5), "messages.0.content"),
    (asked(content=None), "messages.0.content"),
    (asked(content=[{"type": "text"}]), "messages.0.content.0.text"),
    (asked(content=["Hi"]), "messages.0.content.0"),
    (asked(content=[{"type": "image_url", "image_url": {"url": "data:"}}]), "messages.0.content.0.type"),
    (asked(content=[{"type": "input_audio"}]), "messages.0.content.0.type"),
    (asked(nmae="x"), "messages.0.nmae"),
    (asked(tool_calls=[{"id": "1"}]), "messages.0.tool_calls"),
    (asked(content="word " * 600), "messages"),
    (asked(content="x" * 400_000), "messages"),
    ({"tools": [{"type": "function"}]}, "tools"),
    ({"tools": [{"type": "function"}], "tool_choice": "auto"}, "tools"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"functions": [{"name": "f"}]}, "functions"),
    ({"modalities": ["text", "audio"]}, "modalities"),
    ({"audio": {"voice": "x"}}, "audio"),
    ({"reasoning_effort": "high"}, "reasoning_effort"),
    ({"logprobs": 3}, "logprobs"),
    ({"top_logprobs": 3}, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": -1}, "top_logprobs"),
    ({"max_completion_tokens": 0}, "max_completion_tokens"),
    ({"max_completion_tokens": 512}, "max_completion_tokens"),
    ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs.messages"),
    ({"chat_template": "{{ 1 }}"}, "chat_template"),
    ({"prompt": "Hi"}, "prompt"),
]
BAD_TEXT = [
    ({"prompt": ""}, "prompt"),
    ({"prompt": []}, "prompt"),
    ({"prompt": [""]}, "prompt"),
    ({"prompt": [[]]}, "prompt"),
    ({"prompt": None}, "prompt"),
    ({"prompt": 5}, "prompt"),
    ({"prompt": {"a": 1}}, "prompt"),
    ({"prompt": [1, "a"]}, "prompt"),
    ({"prompt": [True, False]}, "prompt"),
    ({"prompt": [-1]}, "prompt"),
    ({"prompt": [49152]}, "prompt"),
    ({"prompt": [HUGE]}, "prompt"),
    ({"prompt": [1] * 512}, "prompt"),
    ({"prompt": ["a"] * 257}, "prompt"),
    ({"logprobs": True}, "logprobs"),
    ({"logprobs": 21}, "logprobs"),
    ({"echo": True, "logprobs": 1}, "logprobs"),
    ({"echo": "yes"}, "echo"),
    ({"suffix": "end"}, "suffix"),
    ({"messages": []}, "messages"),
]


async def check_refused(client: httpx.AsyncClient, path: str, body: dict[str, Any], param: str) -> dict[str, Any]:
    answer = await client.post(path, json=body)
    assert answer.status_code == 400, answer.text
    error: dict[str, Any] = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param
    assert error["message"]
    return error


@pytest.mark.parametrize(("fields", "param"), BAD_SAMPLING + BAD_CHAT)
async def test_chat_names_the_wrong_field(client, backend, fields, param) -> None:
    await check_refused(client, "/v1/chat/completions", CHAT | fields, param)
    assert not backend.calls


@pytest.mark.parametrize(("fields", "param"), BAD_SAMPLING + BAD_TEXT)
async def test_completions_name_the_wrong_field(client, backend, fields, param) -> None:
    await check_refused(client, "/v1/completions", TEXT | fields, param)
    assert not backend.calls


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": [{"role": "user", "content": "a"}]}, "prompt"),
        ("/tokenize", {"prompt": 3}, "prompt"),
        ("/tokenize", {"messages": []}, "messages"),
        ("/tokenize", {"prompt": "a", "add_special_token": True}, "add_special_token"),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": ["a"]}, "tokens.0"),
        ("/detokenize", {"tokens": [-1]}, "tokens.0"),
        ("/detokenize", {"tokens": [1, 49152]}, "tokens.1"),
    ],
)
async def test_token_routes_name_the_wrong_field(client, path, body, param) -> None:
    await check_refused(client, path, body, param)


async def test_messages_name_the_limit_and_the_nearest_field(client) -> None:
    unknown = await check_refused(client, "/v1/chat/completions", CHAT | {"temprature": 1}, "temprature")
    assert "did you mean 'temperature'?" in unknown["message"]
    nested = await check_refused(client, "/v1/chat/completions", CHAT | asked(contnet="x"), "messages.0.contnet")
    assert "did you mean 'content'?" in nested["message"]
    limit = await check_refused(client, "/v1/chat/completions", CHAT | {"top_p": 1.5}, "top_p")
    assert "between 0 and 1" in limit["message"]


async def test_a_prompt_too_long_names_limit_and_count(client, tokenizer) -> None:
    prompt = "word " * 600
    error = await check_refused(client, "/v1/completions", TEXT | {"prompt": prompt}, "prompt")
    assert error["code"] == "context_length_exceeded"
    assert "maximum context length is 512 tokens" in error["message"]
    assert f"{len(tokenizer.encode(prompt))} in the prompt" in error["message"]


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b"null", b"[]", b"3", b'"text"', b"\xff\xfe", b'{"model": "\xff"}', b"{'model': 1}",
        b'{"model": "smollm2", "prompt": "\\ud800"}', b'{"model": "smollm2", "prompt": "a", "temperature": NaN}',
        b'{"model": "smollm2", "prompt": "a", "temperature": Infinity}',
        b'{"model": "smollm2", "prompt": "a", "temperature": 1e999}',
        b'{"model": "smollm2", "prompt": ' + b"[" * 5000 + b"]" * 5000 + b"}",
        b'{"model": "smollm2", "prompt": "a", "seed": ' + b"9" * 5000 + b"}",
    ],
)  # fmt: skip
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"])
async def test_a_body_that_is_no_request_is_400(client, path, body) -> None:
    answer = await client.post(path, content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 400
    assert answer.json()["error"]["type"] == "invalid_request_error"


async def test_an_oversized_body_is_413_declared_or_not(client) -> None:
    async def pieces() -> Any:
        for _ in range(40):
            yield b" " * 2**15

    for content in (b" " * (2**20 + 1), pieces()):
        answer = await client.post("/v1/completions", content=content)
        assert answer.status_code == 413
        assert str(2**20) in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/", 404),
        ("POST", "/v1/embeddings", 404),
        ("GET", "/v1/chat/completions", 405),
        ("DELETE", "/v1/models", 405),
        ("POST", "/health", 405),
    ],
)
async def test_unknown_routes_and_methods_answer_in_the_same_form(client, method, path, status) -> None:
    answer = await client.request(method, path)
    assert answer.status_code == status
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


async def test_an_unknown_model_is_404_naming_those_there_are(client) -> None:
    for path, body in (("/v1/chat/completions", CHAT), ("/v1/completions", TEXT), ("/tokenize", {"prompt": "a"})):
        answer = await client.post(path, json=body | {"model": "gpt-4"})
        assert answer.status_code == 404
        error = answer.json()["error"]
        assert (error["param"], error["code"]) == ("model", "model_not_found")
        assert "smollm2" in error["message"]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
FIELDS = sorted({name for fields, _ in BAD_SAMPLING + BAD_CHAT + BAD_TEXT for name in fields} | {"role", "tools"})
BODIES = st.dictionaries(st.sampled_from(FIELDS) | st.text(string.ascii_lowercase, max_size=6), JSON, max_size=5)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(fields=BODIES, path=st.sampled_from(["/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize"]))
def test_no_body_brings_the_gateway_down(served, fields, path) -> None:
    body = {"/v1/chat/completions": CHAT, "/v1/completions": TEXT}.get(path, {}) | fields

    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(build_app({"smollm2": served}))
        async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as client:
            return await client.post(path, content=json.dumps(body).encode())

    answer = asyncio.run(ask())
    assert answer.status_code in (200, 400, 404), answer.text
    if answer.status_code != 200:
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
