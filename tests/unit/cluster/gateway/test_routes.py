"""What each route answers, seen over HTTP."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from typing import Any

import httpx
import pytest

from shoal.cluster.gateway.backend import ReplicaFailedError, ReplicaUnavailableError, ServedModel
from shoal.cluster.gateway.routes import build_app
from shoal.engine.request import FinishReason, RequestError
from shoal.engine.tokenizer import Tokenizer

CHAT: dict[str, Any] = {"model": "smollm2", "messages": [{"role": "user", "content": "What is the capital of France?"}]}
TEXT: dict[str, Any] = {"model": "smollm2", "prompt": "The capital of France is", "max_tokens": 32}


async def post(client: httpx.AsyncClient, path: str, body: dict[str, Any], **fields: Any) -> dict[str, Any]:
    answer = await client.post(path, json=body | fields)
    assert answer.status_code == 200, answer.text
    return answer.json()


async def stream(client: httpx.AsyncClient, path: str, body: dict[str, Any], **fields: Any) -> list[dict[str, Any]]:
    """Events of a stream, which must end with [DONE]."""
    answer = await client.post(path, json=body | fields | {"stream": True})
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = [line.removeprefix("data: ") for line in answer.text.split("\n\n") if line]
    assert events.pop() == "[DONE]"
    return [json.loads(event) for event in events]


async def test_chat_answers_with_usage_of_the_tokenizer(client, backend, tokenizer) -> None:
    backend.num_cached_tokens = 16
    answer = await post(client, "/v1/chat/completions", CHAT)
    assert answer["object"] == "chat.completion"
    assert answer["choices"] == [
        {
            "index": 0,
            "message": {"content": backend.text, "role": "assistant", "refusal": None},
            "logprobs": None,
            "finish_reason": "stop",
        }
    ]
    num_prompt = len(tokenizer.encode_chat(CHAT["messages"]))
    num_generated = len(tokenizer.encode(backend.text)) + 1  # end of text counts
    assert answer["usage"] == {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_generated,
        "total_tokens": num_prompt + num_generated,
        "prompt_tokens_details": {"cached_tokens": 16},
    }


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
async def test_usage_says_what_became_of_drafts(served, backend, path) -> None:
    backend.num_drafted = 3  # and two tokens a step: the first is accepted
    body = CHAT if "chat" in path else TEXT
    app = build_app({"smollm2": replace(served, is_speculative=True)}, max_body_bytes=2**20)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://gateway") as client:
        whole = await post(client, path, body, n=2)
        events = await stream(client, path, body, n=2, stream_options={"include_usage": True})
    assert whole["usage"]["completion_tokens_details"] == {
        "accepted_prediction_tokens": 8,
        "rejected_prediction_tokens": 16,
        "accepted_per_position": [8, 0, 0],
    }
    assert events[-1]["usage"] == whole["usage"]


async def test_chat_prompt_is_the_template_without_a_second_bos(client, backend, tokenizer) -> None:
    await post(client, "/v1/chat/completions", CHAT)
    (call,) = backend.calls
    assert tokenizer.decode(call.prompt_ids, skip_special_tokens=False) == tokenizer.render_chat(CHAT["messages"])
    assert call.params.max_tokens == 512 - len(call.prompt_ids)
    assert isinstance(call.params.seed, int)


async def test_chat_stream_has_one_event_per_step_and_adds_up(client, backend) -> None:
    events = await stream(client, "/v1/chat/completions", CHAT)
    assert len(events) == backend.num_steps
    assert [event["choices"][0]["delta"].get("role") for event in events] == ["assistant"] + [None] * (len(events) - 1)
    assert "".join(event["choices"][0]["delta"].get("content", "") for event in events) == backend.text
    assert [event["choices"][0]["finish_reason"] for event in events] == [None] * (len(events) - 1) + ["stop"]
    assert {event["object"] for event in events} == {"chat.completion.chunk"}
    assert len({event["id"] for event in events}) == 1
    assert all("usage" not in event for event in events)


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
async def test_streamed_usage_equals_the_whole_answer(client, path) -> None:
    body = CHAT if "chat" in path else TEXT
    whole = await post(client, path, body)
    events = await stream(client, path, body, stream_options={"include_usage": True})
    assert events[-1]["choices"] == []
    assert events[-1]["usage"] == whole["usage"]
    assert all(event["usage"] is None for event in events[:-1])


async def test_running_usage_grows_to_the_final_one(client) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    events = await stream(client, "/v1/completions", TEXT, stream_options=options)
    counts = [event["usage"]["completion_tokens"] for event in events]
    assert counts == sorted(counts)
    assert counts[0] == 2
    assert counts[-1] == counts[-2]


async def test_samples_are_choices(client, backend) -> None:
    answer = await post(client, "/v1/chat/completions", CHAT, n=3)
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
    assert {choice["message"]["content"] for choice in answer["choices"]} == {backend.text}
    (call,) = backend.calls
    assert call.params.n == 3
    assert answer["usage"]["prompt_tokens"] == len(call.prompt_ids)


async def test_the_best_samples_are_choices_and_all_of_them_are_paid_for(client, backend) -> None:
    backend.sample_logprobs = [-0.9, -0.1, -0.7, -0.4]
    (plain,) = (await post(client, "/v1/completions", TEXT))["choices"]
    answer = await post(client, "/v1/completions", TEXT, prompt=["One", "Two"], n=2, best_of=4, logprobs=0, stop=" is")
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    assert [choice["logprobs"]["token_logprobs"][0] for choice in answer["choices"]] == [-0.1, -0.4] * 2
    num_tokens = len(answer["choices"][0]["logprobs"]["tokens"])
    assert answer["usage"]["completion_tokens"] == 8 * num_tokens
    for path, body in (("/v1/completions", TEXT), ("/v1/chat/completions", CHAT)):
        (choice,) = (await post(client, path, body, best_of=3))["choices"]
        assert choice["logprobs"] is None
    assert plain["logprobs"] is None
    assert len(backend.calls[-1].sample_ids) == 3


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
async def test_beams_are_choices(client, backend, path) -> None:
    body = CHAT if "chat" in path else TEXT
    fields = {"n": 2, "best_of": 4, "use_beam_search": True, "length_penalty": 0.5, "early_stopping": "never"}
    answer = await post(client, path, body, **fields)
    assert [choice["index"] for choice in answer["choices"]] == [0, 1]
    (call,) = backend.calls
    assert (call.params.width, call.params.length_penalty, call.params.early_stopping) == (4, 0.5, "never")
    assert len(call.sample_ids) == 2
    (request,) = call.requests(arrival_s=0.0)
    assert request.result_ids == call.sample_ids
    events = await stream(client, path, body, **fields)
    assert {choice["index"] for event in events for choice in event["choices"]} == {0, 1}


async def test_prompts_times_samples_are_numbered_prompt_first(client, backend, tokenizer) -> None:
    prompts = ["One", "Two and more"]
    answer = await post(client, "/v1/completions", TEXT, prompt=prompts, n=2, echo=True)
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    texts = [choice["text"] for choice in answer["choices"]]
    assert texts == [prompt + backend.text for prompt in prompts for _ in range(2)]
    assert answer["usage"]["prompt_tokens"] == sum(len(tokenizer.encode(prompt)) for prompt in prompts)
    assert len({call.request_id for call in backend.calls}) == 2


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("Hi", ["Hi"]),
        (["Hi", "Ho"], ["Hi", "Ho"]),
        ([26843, 28], ["Hello,"]),
        ([[26843, 28], [19556]], ["Hello,", "Hello"]),
    ],
)
async def test_every_form_of_prompt(client, backend, tokenizer, prompt, expected) -> None:
    ids = {"Hello,": [26843, 28], "Hello": [19556]}
    await post(client, "/v1/completions", TEXT, prompt=prompt)
    want = [tuple(ids.get(text) or tokenizer.encode(text)) for text in expected]
    assert sorted(call.prompt_ids for call in backend.calls) == sorted(want)


async def test_merged_streams_of_prompts_are_complete(client, backend) -> None:
    events = await stream(client, "/v1/completions", TEXT, prompt=["a", "b", "c"])
    texts = ["", "", ""]
    for event in events:
        texts[event["choices"][0]["index"]] += event["choices"][0]["text"]
    assert texts == [backend.text] * 3
    assert backend.num_closed == 3


async def test_completion_defaults_to_16_tokens_and_says_length(client, backend) -> None:
    backend.text = "word " * 40
    body = {"model": "smollm2", "prompt": "Say"}
    answer = await post(client, "/v1/completions", body)
    assert answer["usage"]["completion_tokens"] == 16
    assert answer["choices"][0]["finish_reason"] == "length"


async def test_stop_string_cuts_counts_and_aborts(client, backend, tokenizer) -> None:
    backend.text = "one two three four five six seven eight nine ten"
    backend.tokens_per_step = 1
    answer = await post(client, "/v1/completions", TEXT, stop=["e four"])
    assert answer["choices"][0]["text"] == "one two thre"
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert answer["usage"]["completion_tokens"] == len(tokenizer.encode("one two three four"))
    assert backend.num_closed == 1
    assert backend.num_steps == 4  # it was not carried past the stop string


async def test_stop_string_can_be_kept(client, backend) -> None:
    answer = await post(client, "/v1/completions", TEXT, stop="France", include_stop_str_in_output=True)
    assert answer["choices"][0]["text"] == "The capital of France"


async def test_special_tokens_are_shown_on_request(client, backend) -> None:
    backend.text = "a<|im_start|>b"
    hidden = await post(client, "/v1/completions", TEXT)
    shown = await post(client, "/v1/completions", TEXT, skip_special_tokens=False)
    assert hidden["choices"][0]["text"] == "ab"
    assert shown["choices"][0]["text"] == "a<|im_start|>b"


async def test_chat_logprobs_have_text_bytes_and_alternatives(client, backend, tokenizer) -> None:
    backend.text = "Paris 🎉"
    answer = await post(client, "/v1/chat/completions", CHAT, logprobs=True, top_logprobs=3)
    content = answer["choices"][0]["logprobs"]["content"]
    shown = [token for token in content if token["token"] != "<|im_end|>"]
    assert b"".join(bytes(token["bytes"]) for token in shown).decode() == "Paris 🎉"
    assert shown[0]["token"] == "Paris"
    assert shown[-1]["token"].startswith("bytes:\\x")
    assert shown[0]["logprob"] == -0.5
    assert [top["logprob"] for top in shown[0]["top_logprobs"]] == [-0.5, -1.5, -9999.0]
    assert shown[0]["top_logprobs"][1]["token"] == tokenizer.token_str(100)


async def test_completion_logprobs_offsets_point_into_the_text(client, backend) -> None:
    answer = await post(client, "/v1/completions", TEXT, logprobs=2)
    choice = answer["choices"][0]
    reported = choice["logprobs"]
    for token, offset in zip(reported["tokens"][:-1], reported["text_offset"][:-1], strict=True):
        assert choice["text"][offset:].startswith(token)
    assert reported["token_logprobs"] == [-0.5] * len(reported["tokens"])
    assert all(token in top for token, top in zip(reported["tokens"], reported["top_logprobs"], strict=True))


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
async def test_streamed_logprobs_equal_the_whole_ones(client, path) -> None:
    body = CHAT | {"logprobs": True, "top_logprobs": 1} if "chat" in path else TEXT | {"logprobs": 1}
    whole = (await post(client, path, body))["choices"][0]["logprobs"]
    parts = [event["choices"][0]["logprobs"] for event in await stream(client, path, body)]
    for name in ("content",) if "chat" in path else ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
        assert [item for part in parts for item in part[name]] == whole[name]


async def test_parameters_reach_the_engine(client, backend) -> None:
    await post(
        client, "/v1/chat/completions", CHAT, temperature=0.5, top_p=0.9, top_k=7, min_p=0.1, seed=-3,
        presence_penalty=1, frequency_penalty=-1, repetition_penalty=1.5, logit_bias={"42": 3, "7": -100},
        min_tokens=2, max_completion_tokens=9, ignore_eos=True, stop=["a", "b"], stop_token_ids=[5],
        priority=-2, cache_salt="tenant",
    )  # fmt: skip
    (call,) = backend.calls
    params = call.params
    assert (params.temperature, params.top_p, params.top_k, params.min_p, params.seed) == (0.5, 0.9, 7, 0.1, -3)
    assert (params.presence_penalty, params.frequency_penalty, params.repetition_penalty) == (1, -1, 1.5)
    assert params.logit_bias == {42: 3.0, 7: -100.0}
    assert (params.min_tokens, params.max_tokens, params.ignore_eos) == (2, 9, True)
    assert (params.stop, params.stop_token_ids) == (("a", "b"), (5,))
    assert (call.priority, call.cache_salt) == (-2, "tenant")


async def test_null_and_harmless_fields_are_ignored(client) -> None:
    nulls = dict.fromkeys(("n", "stop", "seed", "tools", "response_format", "logit_bias", "max_tokens", "stream"))
    await post(
        client, "/v1/chat/completions", CHAT | nulls, user="me", metadata={"a": "b"}, store=False,
        service_tier="auto", parallel_tool_calls=True, response_format={"type": "text"}, modalities=["text"],
        tools=[{"type": "function"}], tool_choice="none",
    )  # fmt: skip


async def test_text_parts_and_developer_role_reach_the_template(client, backend, tokenizer) -> None:
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
    ]
    await post(client, "/v1/chat/completions", CHAT, messages=messages)
    want = tokenizer.encode_chat([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "a\nb"}])
    assert list(backend.calls[0].prompt_ids) == want


async def test_a_long_text_is_encoded_in_a_thread_to_the_same_ids(client, served, backend, tokenizer) -> None:
    long_model = ServedModel(**{name: getattr(served, name) for name in served.__slots__} | {"max_model_len": 10**6})
    transport = httpx.ASGITransport(build_app({"smollm2": long_model}))
    text = "hello 42 " * 4000
    async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as long_client:
        await post(long_client, "/v1/completions", TEXT, prompt=text)
    assert list(backend.calls[0].prompt_ids) == tokenizer.encode(text)


async def test_models(client) -> None:
    models = (await client.get("/v1/models")).json()
    assert models["object"] == "list"
    assert [(card["id"], card["max_model_len"]) for card in models["data"]] == [("smollm2", 512)]
    assert (await client.get("/v1/models/smollm2")).json() == models["data"][0]
    missing = await client.get("/v1/models/org/other")
    assert missing.status_code == 404
    assert missing.json()["error"]["code"] == "model_not_found"


async def test_tokenize_and_detokenize_are_inverse(client, tokenizer) -> None:
    text = "1234 + 99 = 你好 <|im_end|>"
    answer = await post(client, "/tokenize", {"prompt": text, "return_token_strs": True})
    assert answer["tokens"] == tokenizer.encode(text)
    assert answer["count"] == len(answer["tokens"])
    assert answer["max_model_len"] == 512
    assert answer["token_strs"][:5] == ["1", "2", "3", "4", "Ġ+"]
    assert (await post(client, "/detokenize", {"tokens": answer["tokens"]})) == {"prompt": text}


async def test_tokenize_messages_as_chat_does(client, tokenizer) -> None:
    answer = await post(client, "/tokenize", {"model": "smollm2", "messages": CHAT["messages"]})
    assert answer["tokens"] == tokenizer.encode_chat(CHAT["messages"])


async def test_health_follows_the_backend(client, backend) -> None:
    assert (await client.get("/health")).status_code == 200
    backend.error = ReplicaUnavailableError(retry_after_s=7)
    assert (await client.get("/ping")).status_code == 200


async def test_the_version_is_told(client) -> None:
    assert (await client.get("/version")).json()["version"]


@pytest.mark.parametrize("path", ["/metrics", "/status", "/debug/routing", "/debug/requests", "/api/history"])
async def test_what_is_for_operators_is_not_on_the_public_port(client, path) -> None:
    answer = await client.get(path)
    assert answer.status_code == 404
    assert "admin port" in answer.json()["error"]["message"]


async def test_request_id_is_echoed_or_made(client) -> None:
    named = await client.get("/v1/models", headers={"x-request-id": "mine-1"})
    assert named.headers["x-request-id"] == "mine-1"
    made = (await client.get("/v1/models")).headers["x-request-id"]
    too_long = (await client.get("/nowhere", headers={"x-request-id": "x" * 500})).headers["x-request-id"]
    assert len(made) == len(too_long) == 32


async def test_no_replica_is_503_with_retry_after(client, backend) -> None:
    backend.error = ReplicaUnavailableError(retry_after_s=3)
    for fields in ({}, {"stream": True}):
        answer = await client.post("/v1/chat/completions", json=CHAT | fields)
        assert answer.status_code == 503
        assert answer.headers["retry-after"] == "3"
        assert answer.json()["error"]["code"] == "no_replica"


async def test_a_refusal_by_the_engine_is_400(client, backend) -> None:
    backend.error = RequestError("the prompt needs 9 blocks, the pool has 4", param="messages")
    answer = await client.post("/v1/chat/completions", json=CHAT | {"stream": True})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "messages"


@pytest.mark.parametrize("is_stream", [False, True])
async def test_a_crash_is_500_with_the_request_id_and_no_internals(client, backend, is_stream) -> None:
    backend.error = RuntimeError("secret path /home/x")
    answer = await client.post(
        "/v1/chat/completions", json=CHAT | {"stream": is_stream}, headers={"x-request-id": "r-77"}
    )
    assert answer.status_code == 500
    assert "r-77" in answer.json()["error"]["message"]
    assert "secret" not in answer.text
    backend.error = None
    await post(client, "/v1/chat/completions", CHAT)


@pytest.mark.parametrize("prompt", ["one", ["one", "two", "three"]])
async def test_an_error_in_mid_stream_is_an_event_and_the_stream_ends(client, backend, prompt) -> None:
    backend.error, backend.error_after = RuntimeError("secret"), 2
    events = await stream(client, "/v1/completions", TEXT, prompt=prompt)
    assert events[0]["choices"][0]["text"]
    assert events[-1]["error"]["code"] == "internal_error"
    assert "secret" not in json.dumps(events)
    assert backend.num_closed == len(backend.calls)


@pytest.mark.parametrize("after", [0, 2])
async def test_a_failed_replica_is_named_in_answers_and_in_streams(client, backend, after) -> None:
    backend.error, backend.error_after = ReplicaFailedError("rank 1 was killed by signal 9"), after
    answer = await client.post("/v1/completions", json=TEXT)
    named = answer.json()["error"]
    assert (answer.status_code, named["code"], named["type"]) == (503, "replica_failed", "service_unavailable_error")
    assert "rank 1 was killed by signal 9" in named["message"]
    assert int(answer.headers["retry-after"]) > 0
    if after:
        assert (await stream(client, "/v1/completions", TEXT))[-1]["error"] == named


async def test_an_aborted_request_says_so(client, backend) -> None:
    backend.finish = FinishReason.ABORT
    answer = await post(client, "/v1/completions", TEXT)
    assert answer["choices"][0]["finish_reason"] == "abort"


@pytest.mark.parametrize(
    "fields", [{}, {"stream": True}, {"prompt": ["a", "b"]}, {"prompt": ["a", "b"], "stream": True}]
)
@pytest.mark.parametrize("hangs_after", [0, 1])
async def test_a_disconnect_closes_the_generator(served, backend, fields, hangs_after) -> None:
    backend.hangs_after = hangs_after
    app = build_app({"smollm2": served})
    body = json.dumps(TEXT | fields).encode()
    gone = asyncio.Event()
    messages = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> Any:
        if messages:
            return messages.pop()
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        pass

    scope = {
        "type": "http", "method": "POST", "path": "/v1/completions", "raw_path": b"/v1/completions",
        "query_string": b"", "headers": [], "asgi": {"version": "3.0"}, "http_version": "1.1", "scheme": "http",
        "server": ("gateway", 80), "client": ("client", 1), "root_path": "",
    }  # fmt: skip
    answering = asyncio.create_task(app(scope, receive, send))
    num_prompts = len(fields.get("prompt", "x"))
    async with asyncio.timeout(5):
        while len(backend.calls) < num_prompts or backend.num_steps < hangs_after * num_prompts:  # noqa: ASYNC110
            await asyncio.sleep(0)
        assert backend.num_closed == 0
        gone.set()
        await answering
    assert backend.num_closed == num_prompts


async def test_a_tokenizer_without_template_points_to_completions(served, tokenizer: Tokenizer, monkeypatch) -> None:
    monkeypatch.setattr(tokenizer, "_chat_template", None)
    transport = httpx.ASGITransport(build_app({"smollm2": served}))
    async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as client:
        answer = await client.post("/v1/chat/completions", json=CHAT)
    assert answer.status_code == 400
    assert "/v1/completions" in answer.json()["error"]["message"]
