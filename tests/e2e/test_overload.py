"""More than a real server can do in time: what is refused, and what is not."""

from __future__ import annotations

import asyncio
import time

import httpx
import pytest

from shoal.cluster.config import EMBEDDED_MODEL

pytestmark = pytest.mark.slow

BODY = {"model": EMBEDDED_MODEL, "max_tokens": 8, "temperature": 0, "ignore_eos": True}


@pytest.fixture(scope="module")
def url(server) -> str:
    """Of a server that has seen enough to predict."""
    with httpx.Client(base_url=server.url, timeout=60) as client:
        for number in range(12):
            answer = client.post("/v1/completions", json=BODY | {"prompt": [number + 1] * 200})
            assert answer.status_code == 200, answer.text
            if "x-shoal-predicted-ttft-ms" in answer.headers and number > 3:
                break
        assert "x-shoal-predicted-ttft-ms" in answer.headers
    return server.url


def prompt(number: int, length: int = 200) -> list[int]:
    return [100 + (number * 7919 + place * 31) % 40_000 for place in range(length)]


async def test_what_cannot_be_in_time_is_refused_at_once_and_the_rest_is_finished(url: str, server) -> None:
    async with httpx.AsyncClient(base_url=url, timeout=120) as client:

        async def ask(number: int, headers: dict[str, str]) -> tuple[httpx.Response, float]:
            start = time.monotonic()
            answer = await client.post("/v1/completions", json=BODY | {"prompt": prompt(number)}, headers=headers)
            return answer, time.monotonic() - start

        patient = [asyncio.create_task(ask(number, {})) for number in range(24)]
        await asyncio.sleep(0.3)
        hasty = await asyncio.gather(*(ask(100 + number, {"x-slo-ttft-ms": "5"}) for number in range(8)))
        num_open = sum(not task.done() for task in patient)
        finished = await asyncio.gather(*patient)
        metrics = (await client.get(f"{server.admin_url}/metrics")).text

    assert num_open > 0, "the server was busy all the time"
    for answer, seconds in hasty:
        assert answer.status_code == 429, answer.text
        assert answer.json()["error"]["code"] == "objective_unreachable"
        assert int(answer.headers["retry-after"]) >= 1
        assert seconds < finished[-1][1]
    for answer, _ in finished:
        assert answer.status_code == 200, answer.text
        assert answer.json()["usage"]["completion_tokens"] == 8
    name = f'shoal:requests_refused_total{{gateway="0",model_name="{EMBEDDED_MODEL}",reason="objective_unreachable"}}'
    assert f"{name} 8.0" in metrics


async def test_a_second_ask_of_the_same_prompt_says_what_was_cached(url: str) -> None:
    async with httpx.AsyncClient(base_url=url, timeout=60) as client:
        asked = BODY | {"prompt": prompt(999, 320)}
        first = await client.post("/v1/completions", json=asked)
        second = await client.post("/v1/completions", json=asked | {"stream": True})
    assert first.headers["x-shoal-cached-tokens"] == "0"
    assert int(second.headers["x-shoal-cached-tokens"]) >= 256
    assert second.headers["x-shoal-replica"] == first.headers["x-shoal-replica"]


async def test_several_prompts_in_one_request_are_all_answered(url: str) -> None:
    async with httpx.AsyncClient(base_url=url, timeout=60) as client:
        answer = await client.post("/v1/completions", json=BODY | {"prompt": [prompt(n, 40) for n in range(5)]})
    assert answer.status_code == 200, answer.text
    assert [choice["index"] for choice in answer.json()["choices"]] == [0, 1, 2, 3, 4]
    assert answer.headers["x-shoal-replica"].count(",") == 4
