"""The official client, unmodified, against the gateway."""

from __future__ import annotations

from collections.abc import AsyncIterator

import openai
import pytest

from shoal.cluster.gateway.routes import build_app

try:  # the client's own HTTP library: httpx up to version 2, httpx2 since
    import httpx2 as httpx
except ImportError:
    import httpx


@pytest.fixture
async def openai_client(served) -> AsyncIterator[openai.AsyncOpenAI]:
    http = httpx.AsyncClient(transport=httpx.ASGITransport(build_app({"smollm2": served})))
    async with openai.AsyncOpenAI(
        base_url="http://gateway/v1", api_key="none", http_client=http, max_retries=0
    ) as client:
        yield client


QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


async def test_chat(openai_client, backend) -> None:
    answer = await openai_client.chat.completions.create(
        model="smollm2", messages=QUESTION, n=2, logprobs=True, top_logprobs=2, seed=1, stop=["\n\n"]
    )
    assert [choice.message.content for choice in answer.choices] == [backend.text] * 2
    assert answer.choices[0].finish_reason == "stop"
    content = answer.choices[0].logprobs.content
    assert b"".join(bytes(token.bytes) for token in content[:-1]).decode() == backend.text
    assert len(content[0].top_logprobs) == 2
    assert answer.usage.prompt_tokens_details.cached_tokens == 0


async def test_chat_stream(openai_client, backend) -> None:
    stream = await openai_client.chat.completions.create(
        model="smollm2", messages=QUESTION, n=2, stream=True, logprobs=True, stream_options={"include_usage": True}
    )
    texts, reasons, usage = ["", ""], [None, None], None
    async for chunk in stream:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            reasons[choice.index] = choice.finish_reason
            assert choice.logprobs.content
    assert texts == [backend.text] * 2
    assert reasons == ["stop", "stop"]
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens


async def test_chat_stream_helper_accumulates(openai_client, backend) -> None:
    async with openai_client.chat.completions.stream(model="smollm2", messages=QUESTION) as stream:
        final = await stream.get_final_completion()
    assert final.choices[0].message.content == backend.text


async def test_answer_can_be_sent_back_as_history(openai_client, backend) -> None:
    answer = await openai_client.chat.completions.create(model="smollm2", messages=QUESTION)
    history = [*QUESTION, answer.choices[0].message.model_dump(), {"role": "user", "content": "Sure?"}]
    await openai_client.chat.completions.create(model="smollm2", messages=history)
    assert len(backend.calls) == 2
    assert len(backend.calls[1].prompt_ids) > len(backend.calls[0].prompt_ids)


async def test_completion_and_its_stream(openai_client, backend) -> None:
    whole = await openai_client.completions.create(model="smollm2", prompt=["a", "b"], max_tokens=32, logprobs=1, n=2)
    assert [choice.index for choice in whole.choices] == [0, 1, 2, 3]
    assert whole.choices[0].logprobs.text_offset[0] == 0
    text = ""
    async for chunk in await openai_client.completions.create(model="smollm2", prompt="a", max_tokens=32, stream=True):
        text += chunk.choices[0].text
    assert text == backend.text


async def test_models(openai_client) -> None:
    assert [model.id async for model in openai_client.models.list()] == ["smollm2"]
    assert (await openai_client.models.retrieve("smollm2")).owned_by == "shoal"


async def test_errors_become_the_client_s_own(openai_client, backend) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        await openai_client.chat.completions.create(model="gpt-4", messages=QUESTION)
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as long:
        await openai_client.completions.create(model="smollm2", prompt="word " * 600)
    assert long.value.code == "context_length_exceeded"
    backend.error, backend.error_after = RuntimeError("lost"), 1
    stream = await openai_client.chat.completions.create(model="smollm2", messages=QUESTION, stream=True)
    with pytest.raises(openai.APIError):
        async for _ in stream:
            pass
