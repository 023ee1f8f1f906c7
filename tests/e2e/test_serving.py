"""What a user of a running server sees, through the official client."""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import random
import re
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from shoal.cluster import cli, metrics
from shoal.cluster.config import EMBEDDED_MODEL, locate_model
from shoal.engine.tokenizer import Tokenizer

pytestmark = pytest.mark.slow

SUFFIX = {"gauge": "", "counter": "_total", "histogram": "_count"}
# Names in a scrape of metrics that this server has no use for: it has no keys, no price and no collector of traces.
UNUSED = {metric.name + SUFFIX[metric.kind] for metric in (*metrics.AUTH_METRICS, metrics.COST, metrics.TRACES)}
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture(scope="module")
def client(server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60) as client:
        yield client


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(locate_model(EMBEDDED_MODEL))


def ask(client: openai.OpenAI, **settings):
    return client.chat.completions.create(
        model=EMBEDDED_MODEL, messages=QUESTION, **{"temperature": 0, "max_tokens": 24, **settings}
    )


def samples(url: str) -> dict[str, float]:
    """Values of the metrics without buckets, summed over labels."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    values: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            values[sample.name] = values.get(sample.name, 0.0) + sample.value
    return values


def test_the_capital_of_france_is_paris(client: openai.OpenAI) -> None:
    answer = ask(client)
    assert answer.choices[0].message.content == "The capital of France is Paris."
    assert answer.choices[0].finish_reason == "stop"


def test_a_stream_is_the_same_text_in_pieces(client: openai.OpenAI) -> None:
    whole = ask(client).choices[0].message.content
    events = list(ask(client, stream=True, stream_options={"include_usage": True}))
    pieces = [choice.delta.content or "" for event in events for choice in event.choices]
    assert "".join(pieces) == whole
    assert sum(bool(piece) for piece in pieces) > 3
    assert events[-1].usage.completion_tokens > 3


def test_the_model_is_listed(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [EMBEDDED_MODEL]


def test_usage_counts_are_the_tokenizers(client: openai.OpenAI, tokenizer: Tokenizer) -> None:
    prompt = "Once upon a time, in 1999, there was a 猫 😀"
    answer = client.completions.create(
        model=EMBEDDED_MODEL, prompt=prompt, max_tokens=17, temperature=0, extra_body={"ignore_eos": True}
    )
    assert answer.usage.prompt_tokens == len(tokenizer.encode(prompt))
    assert answer.usage.completion_tokens == 17
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 17


def test_a_repeated_prompt_is_found_in_the_cache(client: openai.OpenAI) -> None:
    prompt = "The quick brown fox jumps over the lazy dog. " * 10
    first, second = (
        client.completions.create(model=EMBEDDED_MODEL, prompt=prompt, max_tokens=4, temperature=0) for _ in range(2)
    )
    assert second.usage.prompt_tokens_details.cached_tokens >= 64
    assert second.choices[0].text == first.choices[0].text


@pytest.mark.parametrize(
    ("settings", "status"),
    [
        ({"temperature": -1}, 400),
        ({"max_tokens": 10**9}, 400),
        ({"model": "no-such-model"}, 404),
        ({"messages": []}, 400),
        ({"messages": [{"role": "user", "content": "long " * 20_000}]}, 400),
        ({"extra_body": {"no_such_field": 1}}, 400),
    ],
)
def test_bad_input_is_refused_and_the_server_goes_on(client: openai.OpenAI, settings: dict, status: int) -> None:
    with pytest.raises(openai.APIStatusError) as error:
        client.chat.completions.create(**{"model": EMBEDDED_MODEL, "messages": QUESTION, **settings})
    assert error.value.status_code == status
    assert set(error.value.body) == {"message", "type", "param", "code"}
    assert ask(client, max_tokens=2).usage.completion_tokens == 2


async def test_clients_in_parallel_get_what_they_get_alone(server) -> None:
    async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60) as client:

        async def story(n: int) -> str:
            answer = await client.completions.create(
                model=EMBEDDED_MODEL, prompt=f"Count: {n}, {n + 1},", max_tokens=12, temperature=0.8, seed=n
            )
            return answer.choices[0].text

        alone = [await story(n) for n in range(4)]
        together = await asyncio.gather(*(story(n) for n in range(4)))
    assert together == alone


async def test_an_abort_storm_leaves_nothing_behind(server) -> None:
    chance = random.Random(0)
    async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60) as client:

        async def open_and_drop() -> None:
            await asyncio.sleep(chance.random())
            stream = await client.completions.create(
                model=EMBEDDED_MODEL,
                prompt="Tell me a story. " * chance.randint(1, 20),
                max_tokens=500,
                n=chance.randint(1, 2),
                stream=True,
                extra_body={"ignore_eos": True},
            )
            num_events = chance.randint(0, 8)
            async for _ in stream:
                num_events -= 1
                if num_events <= 0:
                    break
            await stream.close()

        await asyncio.gather(*(open_and_drop() for _ in range(40)))
    left = await asyncio.to_thread(_wait_until_idle, server.admin_url)
    assert left["vllm:kv_cache_usage_perc"] == 0
    assert left["vllm:request_success_total"] > 0


def _wait_until_idle(url: str, timeout_s: float = 10.0) -> dict[str, float]:
    """The metrics once nothing runs or waits; the last ones if that does not come."""
    deadline = time.monotonic() + timeout_s
    while True:
        values = samples(url)
        is_idle = values["vllm:num_requests_running"] == values["vllm:num_requests_waiting"] == 0
        if is_idle or time.monotonic() > deadline:
            assert is_idle, values
            return values
        time.sleep(0.05)


def test_clients_that_leave_before_the_answer_cost_the_proxy_nothing(server) -> None:
    """HAProxy, as Ray configures it, spins on such a session (cluster/commands/haproxy.py)."""
    body = {"model": EMBEDDED_MODEL, "prompt": "Count:", "max_tokens": 4000, "ignore_eos": True}
    before = haproxy_seconds(server)
    for _ in range(3):
        client = http.client.HTTPConnection("127.0.0.1", server.port)
        client.request("POST", "/v1/completions", json.dumps(body), {"content-type": "application/json"})
        time.sleep(0.3)
        client.close()
        time.sleep(0.7)
    assert haproxy_seconds(server) - before < 0.5
    assert samples(server.admin_url)["vllm:num_requests_running"] == 0


def haproxy_seconds(server) -> float:
    """Processor time that the server's HAProxy has used."""
    pids = [pid for pid, command in server.processes().items() if "/bin/haproxy " in command]
    if not pids:
        pytest.skip("this server runs without HAProxy")
    stats = [Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split() for pid in pids]
    return sum(int(fields[11]) + int(fields[12]) for fields in stats) / os.sysconf("SC_CLK_TCK")


def test_every_metric_is_there(server, client: openai.OpenAI) -> None:
    ask(client, max_tokens=4)
    found = samples(server.admin_url)
    names = {metric.name + SUFFIX[metric.kind] for metric in metrics.METRICS.values()}
    assert names - found.keys() == UNUSED
    assert found["vllm:generation_tokens_total"] >= 4
    assert found["vllm:time_to_first_token_seconds_count"] >= 1


def test_dashboards_and_rules_ask_for_what_it_has(server, client: openai.OpenAI) -> None:
    ask(client, max_tokens=4)
    found = samples(server.admin_url)
    deploy = Path(__file__).resolve().parents[2] / "deploy"
    boards = [json.loads(path.read_text()) for path in (deploy / "grafana/dashboards").glob("*.json")]
    queries = [target["expr"] for board in boards for panel in board["panels"] for target in panel.get("targets", ())]
    queries += [
        rule["expr"]
        for file in ("rules.yaml", "alerts.yaml")
        for group in yaml.safe_load((deploy / "prometheus" / file).read_text())["groups"]
        for rule in group["rules"]
    ]
    asked = {name for query in queries for name in re.findall(r"(?:vllm|shoal):\w+(?![\w:])", query)}
    assert len(asked) > 60
    assert asked - found.keys() == UNUSED


def test_chat_and_status_talk_to_it(server, capsys: pytest.CaptureFixture[str]) -> None:
    message = str(QUESTION[0]["content"])
    assert cli.main(["chat", "--url", server.url, "-m", message, "--temperature", "0", "--max-tokens", "24"]) == 0
    assert "Paris" in capsys.readouterr().out
    assert cli.main(["status", "--url", server.admin_url]) == 0
    assert f"{EMBEDDED_MODEL} (up to 8192 tokens): 1 replica(s)" in capsys.readouterr().out


@pytest.mark.parametrize("path", ["/metrics", "/status", "/debug/routing", "/debug/requests"])
def test_what_is_for_operators_is_on_the_admin_port_only(server, path: str) -> None:
    with urllib.request.urlopen(f"{server.admin_url}{path}", timeout=30) as answer:
        assert answer.status == 200
    with pytest.raises(urllib.error.HTTPError) as error:
        urllib.request.urlopen(f"{server.url}{path}", timeout=30)
    assert error.value.code == 404


def test_the_playgrounds_way_is_that_of_any_client(server) -> None:
    body = {"model": EMBEDDED_MODEL, "messages": QUESTION, "temperature": 0, "max_tokens": 24}
    headers = {"content-type": "application/json", "origin": server.admin_url}
    request = urllib.request.Request(f"{server.admin_url}/v1/chat/completions", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=60) as answer:
        assert json.load(answer)["choices"][0]["message"]["content"] == "The capital of France is Paris."
        assert answer.headers["x-shoal-replica"] == "0"


def test_an_answer_has_one_request_id_and_the_admin_port_tells_where_its_time_went(server) -> None:
    body = {"model": EMBEDDED_MODEL, "messages": QUESTION, "max_tokens": 8}
    for given in ("mine-7", None):
        request = urllib.request.Request(
            f"{server.url}/v1/chat/completions",
            json.dumps(body).encode(),
            {"content-type": "application/json", **({"x-request-id": given} if given else {})},
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            (request_id,) = answer.headers.get_all("x-request-id")
        assert given in (None, request_id)
        with urllib.request.urlopen(f"{server.admin_url}/debug/requests/{request_id}", timeout=20) as answer:
            timeline = json.load(answer)
        names = {span["name"] for span in timeline["spans"]}
        assert {"read", "call"} <= names, timeline
        assert timeline["explanation"], timeline


def test_a_killed_admin_disturbs_no_stream_and_comes_back(server, client: openai.OpenAI) -> None:
    stream = client.completions.create(
        model=EMBEDDED_MODEL, prompt="Count:", max_tokens=200, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    server.kill_one("ray::ServeReplica:shoal:admin")
    assert client.models.list().data[0].id == EMBEDDED_MODEL
    *_, last = stream
    assert last.choices[0].finish_reason == "length"
    deadline = time.monotonic() + 60
    while True:
        try:
            with urllib.request.urlopen(f"{server.admin_url}/health", timeout=5) as answer:
                if json.load(answer)["gateways"] == 1:
                    return
        except OSError:
            pass
        assert time.monotonic() < deadline
        time.sleep(0.2)


def test_a_killed_replica_fails_its_calls_at_once_and_comes_back(server, client: openai.OpenAI) -> None:
    stream = client.completions.create(
        model=EMBEDDED_MODEL, prompt="Count:", max_tokens=4000, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    server.kill_one("ray::ServeReplica:shoal:replica")
    killed = time.monotonic()
    with pytest.raises(openai.APIError, match="failed"):
        for _ in stream:
            pass
    assert time.monotonic() - killed < 5
    assert _wait_until_answering(client, timeout_s=90) <= {503}  # none, where the call waited for the new replica


def _wait_until_answering(client: openai.OpenAI, timeout_s: float) -> set[int]:
    """Until a question is answered; the statuses of the refusals before that."""
    deadline = time.monotonic() + timeout_s
    refusals: set[int] = set()
    while True:
        try:
            ask(client, max_tokens=2)
        except openai.APIStatusError as error:
            refusals.add(error.status_code)
        else:
            return refusals
        assert time.monotonic() < deadline, refusals
        time.sleep(0.5)
