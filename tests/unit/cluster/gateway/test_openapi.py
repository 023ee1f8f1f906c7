"""The description of the API is true: whatever a client makes of it is answered as it says, and never with a 5xx."""

from __future__ import annotations

import json
from typing import Any

import httpx
import jsonschema
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from shoal.cluster.gateway.openapi import description
from shoal.cluster.gateway.routes import build_app
from shoal.cluster.gateway.schema import ChatCompletionRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest

CHECKS = [
    not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance,
    response_headers_conformance,
]  # fmt: skip
DOCUMENT = description("1.0", has_keys=True)
OPERATIONS = [(method.upper(), path) for path, item in DOCUMENT["paths"].items() for method in item]
BODIES = {"ChatCompletionRequest": ChatCompletionRequest, "CompletionRequest": CompletionRequest,
          "TokenizeRequest": TokenizeRequest, "DetokenizeRequest": DetokenizeRequest}  # fmt: skip


def play(served: Any, method: str, path: str, num_examples: int, *, is_drawing_anew: bool = False) -> set[int]:
    """Ask so many things of one operation, right and wrong ones; answers the statuses that were seen."""
    app = build_app({"smollm2": served}, max_body_bytes=2**20)
    operation = schemathesis.openapi.from_asgi("/openapi.json", app)[path][method]
    wanted = operation.as_strategy(GenerationMode.POSITIVE)
    if method == "POST":  # what takes nothing cannot be asked wrongly
        wanted |= operation.as_strategy(GenerationMode.NEGATIVE)
    seen: set[int] = set()

    @settings(
        max_examples=num_examples,
        deadline=None,
        derandomize=not is_drawing_anew,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.explicit, Phase.generate],
    )
    @given(case=wanted, has_known_model=st.integers(0, 3))
    def ask(case: Any, has_known_model: int) -> None:
        if has_known_model and isinstance(case.body, dict) and "model" in case.body:
            case.body["model"] = "smollm2"
        if has_known_model and case.path_parameters:
            case.path_parameters["name"] = "smollm2"
        seen.add(case.call_and_validate(checks=CHECKS).status_code)

    ask()
    return seen


@pytest.mark.parametrize(("method", "path"), OPERATIONS)
def test_every_answer_is_as_described(served: Any, method: str, path: str) -> None:
    seen = play(served, method, path, 50 if method == "POST" else 5)
    assert 200 in seen, seen
    if method == "POST":
        assert 400 in seen, seen


@pytest.mark.soak
@pytest.mark.parametrize(("method", "path"), OPERATIONS)
def test_thousands_of_answers_are_as_described(served: Any, method: str, path: str) -> None:
    play(served, method, path, 2000 if method == "POST" else 100, is_drawing_anew=True)


async def test_every_example_of_the_description_is_answered(client: httpx.AsyncClient) -> None:
    for method, path in OPERATIONS:
        if method != "POST":
            continue
        operation = DOCUMENT["paths"][path]["post"]
        asked = operation["requestBody"]["content"]["application/json"]["example"]
        answer = await client.post(path, json=asked | ({"model": "smollm2"} if "model" in asked else {}))
        assert answer.status_code == 200, answer.text
        shown = operation["responses"]["200"]["content"]["application/json"]["example"]
        assert set(answer.json()) == set(shown)


@pytest.mark.parametrize(
    ("path", "kind", "body"),
    [
        ("/v1/chat/completions", "ChatCompletionChunk", {"messages": [{"role": "user", "content": "Hi"}],
                                                         "logprobs": True, "top_logprobs": 2}),
        ("/v1/completions", "TextCompletionChunk", {"prompt": "Hi", "logprobs": 2}),
    ],
)  # fmt: skip
async def test_every_chunk_of_a_stream_is_as_described(
    client: httpx.AsyncClient, path: str, kind: str, body: dict[str, Any]
) -> None:
    usage = {"include_usage": True, "continuous_usage_stats": True}
    answer = await client.post(path, json={"model": "smollm2", "stream": True, "n": 2, "stream_options": usage} | body)
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = [line.removeprefix("data: ") for line in answer.text.split("\n\n") if line]
    assert events.pop() == "[DONE]"
    assert len(events) > 4
    schema = {"$ref": f"#/components/schemas/{kind}", "components": DOCUMENT["components"]}
    for event in events:
        jsonschema.validate(json.loads(event), schema)


def test_every_field_that_is_served_is_described_and_no_other() -> None:
    for name, kind in BODIES.items():
        described = DOCUMENT["components"]["schemas"][name]["properties"]
        assert set(described) <= set(kind.model_fields)
        assert "guided_json" not in described
    assert {"messages", "stop", "temperature", "max_completion_tokens"} <= set(
        DOCUMENT["components"]["schemas"]["ChatCompletionRequest"]["properties"]
    )


async def test_only_a_server_with_keys_asks_for_one(client: httpx.AsyncClient) -> None:
    assert (await client.get("/openapi.json")).json()["security"] == []
    assert DOCUMENT["security"] == [{"bearer": []}, {"header": []}]
    assert [path for path, item in DOCUMENT["paths"].items() if item.get("get", {}).get("security") == []] == [
        "/health", "/ping", "/version", "/openapi.json",
    ]  # fmt: skip


def test_the_document_is_openapi() -> None:
    """Every reference leads somewhere, and every operation has an id of its own."""
    text = json.dumps(DOCUMENT)
    for part in text.split('"$ref": "#/')[1:]:
        found: Any = DOCUMENT
        for step in part.partition('"')[0].split("/"):
            found = found[step]
    ids = [operation["operationId"] for item in DOCUMENT["paths"].values() for operation in item.values()]
    assert len(ids) == len(set(ids))
