"""What headers ask of a gateway, and what its answers' headers say."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from shoal.cluster.gateway.admission import Admission, Objectives
from shoal.cluster.gateway.backend import Placement, Prediction, ServedModel
from shoal.cluster.gateway.routes import build_app

CHAT: dict[str, Any] = {"model": "smollm2", "messages": [{"role": "user", "content": "What is the capital of France?"}]}
TEXT: dict[str, Any] = {"model": "smollm2", "prompt": "The capital of France is", "max_tokens": 8}
SLOW = Prediction(ttft_s=7.3, tpot_s=0.2, wait_s=0.0)


def post_to(app: Any) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://gateway")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("path", "body"), [("/v1/chat/completions", CHAT), ("/v1/completions", TEXT)])
async def test_every_answer_says_where_it_came_from_and_what_was_found_there(client, backend, path, body, stream):
    backend.placed = Placement("replica-3", 48, 0.0125)
    backend.num_cached_tokens = 32
    answer = await client.post(path, json=body | {"stream": stream})
    assert answer.status_code == 200
    assert {name: value for name, value in answer.headers.items() if name.startswith("x-shoal-")} == {
        "x-shoal-replica": "replica-3",
        "x-shoal-matched-tokens": "48",
        "x-shoal-cached-tokens": "32",
        "x-shoal-predicted-ttft-ms": "12.5",
        "x-shoal-queue-ms": "0.0",
    }


async def test_prompts_in_one_request_are_listed_in_their_order(client, backend) -> None:
    backend.placed = Placement("0", 16, None)
    backend.num_cached_tokens = 16
    answer = await client.post("/v1/completions", json=TEXT | {"prompt": ["a", "b", "c"]})
    assert answer.headers["x-shoal-replica"] == "0,0,0"
    assert answer.headers["x-shoal-cached-tokens"] == "16,16,16"
    assert "x-shoal-predicted-ttft-ms" not in answer.headers, "nothing is known of it"


@pytest.mark.parametrize("stream", [False, True])
async def test_an_objective_out_of_reach_is_a_429_that_says_when_to_come_back(client, backend, stream) -> None:
    backend.prediction = SLOW
    answer = await client.post("/v1/chat/completions", json=CHAT | {"stream": stream}, headers={"x-slo-ttft-ms": "250"})
    assert answer.status_code == 429
    assert answer.headers["retry-after"] == "8"  # 7.05 s, in whole seconds
    error = answer.json()["error"]
    assert (error["type"], error["code"], error["param"]) == ("rate_limit_error", "objective_unreachable", None)
    assert "7300 ms" in error["message"]
    assert "250 ms" in error["message"]
    assert not backend.calls


async def test_the_models_objectives_hold_where_a_request_names_none(served: ServedModel, backend) -> None:
    backend.prediction = SLOW
    admission = Admission(backend, objectives=Objectives(ttft_s=1.0))
    async with post_to(build_app({"smollm2": served}, admissions={"smollm2": admission})) as client:
        assert (await client.post("/v1/completions", json=TEXT)).status_code == 429
        patient = await client.post("/v1/completions", json=TEXT, headers={"x-slo-ttft-ms": "60000"})
        assert patient.status_code == 200
    values = {(point.metric, point.labels): point.value for point in admission.snapshot("smollm2")}
    assert values["shoal:requests_refused", ("smollm2", "objective_unreachable")] == 1.0
    assert values["shoal:gateway_waiting", ("smollm2",)] == 0.0


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("x-slo-ttft-ms", "soon"),
        ("x-slo-tpot-ms", "-1"),
        ("x-session-id", "x" * 257),
        ("x-gateway-inference-fairness-id", "x" * 257),
    ],
)
async def test_a_bad_header_is_a_400_that_names_it(client, backend, name, value) -> None:
    answer = await client.post("/v1/completions", json=TEXT, headers={name: value})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == name
    assert name in answer.json()["error"]["message"]
    assert not backend.calls


async def test_a_call_knows_the_session_it_belongs_to(client, backend) -> None:
    await client.post("/v1/completions", json=TEXT | {"prompt": ["a", "b"]}, headers={"x-session-id": "s-1"})
    await client.post("/v1/chat/completions", json=CHAT)
    assert [call.session for call in backend.calls] == ["s-1", "s-1", ""]
