"""The admin port: one answer of many gateways' and replicas' answers, and what a stranger's page cannot do."""

from __future__ import annotations

import asyncio
import re
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from shoal.cluster.admin.join import join_decisions, join_timelines
from shoal.cluster.admin.page import read_page
from shoal.cluster.admin.proxy import Proxy
from shoal.cluster.admin.routes import build_admin_app
from shoal.cluster.admin.server import PortTakenError, bind
from shoal.cluster.channel import GatewayFacts

CHAT = {"model": "smollm2", "messages": [{"role": "user", "content": "hi"}], "stream": True}


async def test_metrics_have_each_replica_once_and_each_gateway_under_its_label(client: Any, admin: Any) -> None:
    for http in admin.cluster.gateways.values():
        http.observe(handler="/v1/models", method="GET", status=200, seconds=0.1)
    admin.cluster.num_silent = 1
    answer = await client.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    samples = [one for family in text_string_to_metric_families(answer.text) for one in family.samples]

    def labels(name: str) -> list[tuple[str, ...]]:
        return sorted(tuple(one.labels.values()) for one in samples if one.name == name)

    assert labels("vllm:num_requests_running") == sorted([("0", "smollm2"), ("1", "smollm2"), ("0", EVIL)])
    assert labels("shoal:http_requests_total") == [(label, "/v1/models", "GET", "200") for label in "01"]
    totals = {(one.name, one.labels.get("model_name")): one.value for one in samples}
    assert totals["shoal:replicas_reporting", "smollm2"] == 2
    assert totals["shoal:gateways_reporting", None] == 2
    assert totals["shoal:gateways_silent", None] == 1


EVIL = "<img src=x onerror=window.hacked=1>"


async def test_without_any_gateway_it_is_alive_and_says_so(client: Any, admin: Any) -> None:
    assert (await client.get("/health")).json() == {
        "status": "ok", "gateways": 2, "gateways_silent": 0, "replicas": {"smollm2": 2, EVIL: 1},
    }  # fmt: skip
    admin.cluster.is_gone = True
    assert (await client.get("/health")).json() == {
        "status": "ok", "gateways": 0, "gateways_silent": 2, "replicas": {},
    }  # fmt: skip
    assert "shoal:gateways_reporting 0.0" in (await client.get("/metrics")).text
    for path in ("/status", "/debug/routing"):
        answer = await client.get(path)
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "no_gateway")


async def test_status_has_every_group_and_gateway(client: Any) -> None:
    status = (await client.get("/status")).json()
    model = status["models"][0]
    assert [group["state"] for group in model["groups"]] == ["running", "running", "starting"]
    assert model["groups"][1]["ranks"][1]["first_layer"] == 15
    assert [gateway["label"] for gateway in status["gateways"]] == ["0", "1"]
    assert GatewayFacts(**status["gateways"][0]).node == "10.0.0.1"


async def test_decisions_of_all_gateways_are_told_newest_first(client: Any) -> None:
    first, _ = (await client.get("/debug/routing")).json()["models"]
    told = [(one["seconds_ago"], one["gateway"]) for one in first["decisions"]]
    assert told == [(3.0, "0"), (5.0, "1"), (9.0, "0")]
    (one,) = (await client.get("/debug/routing", params={"model": "smollm2", "limit": 1})).json()["models"]
    assert len(one["decisions"]) == 1
    assert (await client.get("/debug/routing?model=none")).status_code == 404


def test_the_slowest_and_the_last_requests_are_those_of_all_gateways() -> None:
    def told(start: float, seconds: float) -> dict[str, float]:
        return {"started_unix_s": start, "seconds": seconds}

    early, late, long = told(1.0, 2.0), told(9.0, 1.0), told(2.0, 5.0)
    one = {"recent": [late, early], "slowest": [early, late]}
    other = {"recent": [long], "slowest": [long]}
    joined = join_timelines([one, other], limit=2)
    assert joined == {"recent": [late, long], "slowest": [long, early]}


def test_a_model_that_one_gateway_does_not_know_yet_is_told() -> None:
    joined = join_decisions({"0": {"a": []}, "1": {"a": [], "b": [{"seconds_ago": 1.0}]}})
    assert [model["name"] for model in joined] == ["a", "b"]


async def test_requests_are_found_by_their_id(client: Any, admin: Any, make_timeline: Any) -> None:
    assert (await client.get("/debug/requests")).json() == {"recent": [], "slowest": []}
    admin.cluster.requests = [make_timeline("c", 1.0), make_timeline("a/b", 2.0)]
    (slowest,) = (await client.get("/debug/requests?limit=1")).json()["slowest"]
    assert slowest["request_id"] == "a/b"
    assert (await client.get("/debug/requests/a/b")).json()["request_id"] == "a/b"
    missing = await client.get("/debug/requests/d")
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "request_not_found")


async def test_limits_that_are_none_are_refused(client: Any) -> None:
    for query in ("limit=0", "limit=x", "limit=1001", "limit=nan"):
        assert (await client.get(f"/debug/requests?{query}")).status_code == 400


async def test_history_goes_on_from_where_the_reader_is(client: Any, admin: Any) -> None:
    admin.live(5)
    whole = (await client.get("/api/history")).json()
    assert len(whole["points"]) == 4
    rest = (await client.get("/api/history", params={"since": whole["points"][1]["seconds"]})).json()
    assert rest["points"] == whole["points"][2:]
    assert (await client.get("/api/history?since=x")).status_code == 400


# -- the playground's way ----------------------------------------------------------------------------------------------


async def test_a_stream_comes_through_as_it_is_made(client: Any, admin: Any) -> None:
    headers = {"authorization": "Bearer sk-1", "x-request-id": "mine", "x-slo-ttft-ms": "9", "cookie": "a=b"}
    arrivals = []
    async with client.stream("POST", "/v1/chat/completions", json=CHAT, headers=headers) as answer:
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith("text/event-stream")
        assert answer.headers["x-shoal-replica"] == "1"
        assert answer.headers.get_list("x-request-id") == ["mine"]
        async for part in answer.aiter_raw():
            arrivals.append(part)
    assert len(arrivals) > 1
    assert b"".join(arrivals).endswith(b"data: [DONE]\n\n")
    (sent,) = admin.gateway.headers
    assert (sent["authorization"], sent["x-request-id"], sent["x-slo-ttft-ms"]) == ("Bearer sk-1", "mine", "9")
    assert "cookie" not in sent
    assert admin.gateway.bodies == [CHAT]


async def test_a_client_that_leaves_ends_the_gateways_request(client: Any, admin: Any) -> None:
    admin.gateway.pieces = ["word"] * 10_000
    async with client.stream("POST", "/v1/chat/completions", json=CHAT) as answer:
        await anext(answer.aiter_raw())
        assert admin.gateway.num_open == 1
    async with asyncio.timeout(10):
        while admin.gateway.num_open:  # noqa: ASYNC110  (it is in another event loop)
            await asyncio.sleep(0.01)


async def test_the_gateways_refusals_come_through(client: Any, admin: Any) -> None:
    admin.gateway.key = "sk-2"
    answer = await client.post("/v1/chat/completions", json=CHAT)
    assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer")
    assert answer.json()["error"]["message"] == "this server wants an API key"
    assert [model["id"] for model in (await client.get("/v1/models")).json()["data"]] == ["smollm2", EVIL]


async def test_a_body_beyond_the_limit_never_gets_to_a_gateway(client: Any, admin: Any) -> None:
    answer = await client.post("/v1/chat/completions", json=CHAT | {"user": "x" * 2**17})
    assert answer.status_code == 413
    assert admin.gateway.bodies == []


async def test_other_routes_of_the_gateway_are_not_passed_on(client: Any) -> None:
    assert (await client.post("/v1/completions", json=CHAT)).status_code == 404
    assert (await client.get("/v1/chat/completions")).status_code == 405


# -- browsers ----------------------------------------------------------------------------------------------------------


async def test_a_name_that_a_stranger_may_own_is_refused(client: Any) -> None:
    for host in ("evil.com:8001", "evil.com", "127.0.0.1.evil.com", "localhost.evil.com", ""):
        for path in ("/", "/metrics", "/status", "/v1/models"):
            answer = await client.get(path, headers={"host": host})
            assert answer.status_code in (400, 421), host
            assert "smollm2" not in answer.text


async def test_addresses_names_of_the_network_and_listed_names_are_known(client: Any) -> None:
    known = ("127.0.0.1:8001", "[::1]:8001", "10.0.0.7", "localhost", "head:8001", "shoal.svc", "shoal.example.com")
    for host in known:
        assert (await client.get("/health", headers={"host": host})).status_code == 200, host


async def test_another_sites_post_is_refused(client: Any, admin: Any) -> None:
    for headers in (
        {"origin": "http://evil.com"},
        {"origin": "null"},
        {"origin": "http://127.0.0.1:1"},
        {"sec-fetch-site": "cross-site"},
        {"sec-fetch-site": "same-site"},
        {"content-type": "text/plain"},
        {"content-type": "application/x-www-form-urlencoded"},
    ):
        answer = await client.post("/v1/chat/completions", json=CHAT, headers=headers)
        assert answer.status_code in (403, 415), headers
        assert "access-control-allow-origin" not in answer.headers
    assert admin.gateway.bodies == []


async def test_the_pages_own_post_is_let_through(client: Any, admin: Any) -> None:
    headers = {"origin": admin.url, "sec-fetch-site": "same-origin"}
    assert (await client.post("/v1/chat/completions", json=CHAT, headers=headers)).status_code == 200


async def test_every_answer_tells_browsers_to_trust_nothing_else(client: Any) -> None:
    for path in ("/", "/status", "/metrics", "/v1/models", "/nowhere"):
        headers = (await client.get(path)).headers
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["x-frame-options"] == "DENY"
        assert headers["cross-origin-resource-policy"] == "same-origin"
        assert "default-src 'none'" in headers["content-security-policy"]
        assert "unsafe" not in headers["content-security-policy"]
        assert "access-control-allow-origin" not in headers


def test_the_page_is_one_file_that_loads_nothing_and_writes_no_markup() -> None:
    page, headers = read_page()
    text = page.decode()
    assert not re.findall(r"""(?:src|href)=["'](?!data:|#)""", text)
    assert not re.findall(r"https?://(?!www\.w3\.org)", text)
    for dangerous in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "localStorage"):
        assert dangerous not in text
    assert not re.findall(r"\s(?:style|on\w+)=", re.sub(r"<script>.*</script>", "", text, flags=re.DOTALL))
    assert "'sha256-" in headers["content-security-policy"]


# -- the port ----------------------------------------------------------------------------------------------------------


async def test_a_port_is_waited_for_and_named_where_nobody_leaves_it() -> None:
    holder = await bind("127.0.0.1", 0, timeout_s=0)
    port = holder.getsockname()[1]
    with pytest.raises(PortTakenError, match=rf"cannot listen on 127.0.0.1:{port} .*admin\.port"):
        await bind("127.0.0.1", port, timeout_s=0.3)
    waiting = asyncio.create_task(bind("127.0.0.1", port, timeout_s=10))
    await asyncio.sleep(0.05)
    assert not waiting.done()
    holder.close()
    (await waiting).close()


async def test_a_gateway_that_is_not_there_is_an_error_in_words(admin: Any) -> None:
    proxy = Proxy("http://127.0.0.1:9", max_body_bytes=1024, body_timeout_s=5.0)
    app = build_admin_app(admin.cluster, admin.history, proxy)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://127.0.0.1") as other:
        answer = await other.post("/v1/chat/completions", json=CHAT)
    await proxy.close()
    assert (answer.status_code, answer.json()["error"]["code"]) == (502, "no_gateway")
