"""With keys: who gets in, what is another tenant's stays so, what is spent is counted, and no key is ever shown."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from shoal.cluster.gateway.admission import RefusedError
from shoal.cluster.gateway.auth import Auth, start_auth
from shoal.cluster.gateway.backend import ReplicaUnavailableError
from shoal.cluster.gateway.errors import ApiError
from shoal.cluster.gateway.inbox import StepInbox
from shoal.cluster.gateway.key_ring import KeyRing
from shoal.cluster.gateway.limits import Limits
from shoal.cluster.gateway.routes import build_app
from shoal.cluster.keys import KEY_PREFIX, NewKey, hash_key, new_key
from shoal.cluster.metrics import Point
from shoal.cluster.routing.mirror import Mirror

MODEL = "smollm2"
CHAT: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}]}
TEXT: dict[str, Any] = {"model": MODEL, "prompt": [1, 2, 3, 4]}
NOW = 1_800_000_000.0


class Gate:
    """A gateway with these keys."""

    def __init__(self, folder: Path, served: Any) -> None:
        self.served = served
        self.path = folder / "keys.yaml"
        self.made: dict[str, NewKey] = {}
        self.write()
        self.now = 0.0
        self.ring = KeyRing(self.path)
        self.auth = Auth(self.ring, self.limits("g0"), clock=lambda: NOW)

    def limits(self, name: str) -> Limits:
        def limits_of(key: str) -> Any:
            entry = self.ring.entry(key)
            return entry.limits if entry is not None else None

        return Limits(name, limits_of, clock=lambda: self.now)

    def write(self) -> None:
        self.path.write_text("keys: []\n" if not self.made else "keys:\n" + "".join(m.yaml for m in self.made.values()))

    def add(self, tenant: str = "acme", *, revoked: bool = False, **fields: Any) -> str:
        made = new_key(tenant, **fields)
        if revoked:
            made = NewKey(made.entry.model_copy(update={"revoked": True}), made.key)
        self.made[made.key] = made
        self.write()
        self.ring.refresh()
        return made.key

    def id_of(self, key: str) -> str:
        return self.made[key].entry.id

    @asynccontextmanager
    async def client(self, key: str | None = None, **options: Any) -> AsyncIterator[httpx.AsyncClient]:
        other = replace(self.served, name="other")
        app = build_app({MODEL: self.served, "other": other}, auth=self.auth, **options)
        headers = {"authorization": f"Bearer {key}"} if key else {}
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://gateway", headers=headers) as client:
            yield client

    def counted(self, name: str) -> dict[tuple[str, ...], float]:
        return {p.labels: p.value for p in self.auth.snapshot() if p.metric == name and isinstance(p, Point)}  # type: ignore[misc]


@pytest.fixture
def gate(tmp_path: Path, served: Any) -> Gate:
    return Gate(tmp_path, served)


async def until(condition: Callable[[], bool]) -> None:
    for _ in range(5000):
        if condition():
            return
        await asyncio.sleep(0.001)
    raise AssertionError("it took too long")


def error_of(answer: httpx.Response, status: int, code: str) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    error: dict[str, Any] = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["code"] == code
    assert "x-request-id" in answer.headers
    return error


@pytest.mark.parametrize("path", ["/health", "/ping", "/version", "/openapi.json"])
async def test_some_routes_need_no_key(gate: Gate, path: str) -> None:
    async with gate.client() as client:
        assert (await client.get(path)).status_code == 200


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/v1/chat/completions"), ("POST", "/v1/completions"), ("GET", "/v1/models"), ("POST", "/tokenize"),
        ("GET", f"/v1/models/{MODEL}"), ("POST", "/detokenize"), ("GET", "/metrics"), ("GET", "/status"),
        ("GET", "/debug/routing"), ("GET", "/no/such/route"), ("DELETE", "/v1/completions"), ("GET", "//health"),
        ("GET", "/health/../v1/models"), ("OPTIONS", "/v1/completions"), ("GET", "/HEALTH"),
    ],
)  # fmt: skip
async def test_all_others_do_and_their_body_is_not_read(gate: Gate, backend: Any, method: str, path: str) -> None:
    async def endless() -> AsyncIterator[bytes]:
        raise AssertionError("the body was read")
        yield b""

    async with gate.client() as client:
        answer = await client.request(method, path, content=endless() if method == "POST" else None)
    error = error_of(answer, 401, "invalid_api_key")
    assert error["type"] == "authentication_error"
    assert answer.headers["www-authenticate"].startswith("Bearer")
    assert not backend.calls


@pytest.mark.parametrize(
    "present",
    [
        lambda key: {"authorization": f"Bearer {key}"},
        lambda key: {"authorization": f"bearer   {key} "},
        lambda key: {"x-api-key": key},
        lambda key: {"x-api-key": key, "authorization": "Basic dTpw"},
    ],
)
async def test_a_key_may_be_presented_in_two_headers(gate: Gate, present: Callable[[str], dict[str, str]]) -> None:
    key = gate.add()
    async with gate.client() as client:
        assert (await client.post("/v1/completions", json=TEXT, headers=present(key))).status_code == 200


async def test_what_is_no_key_is_refused_by_its_reason(gate: Gate) -> None:
    good, revoked = gate.add(), gate.add(revoked=True)
    expired = gate.add(expires="2020-01-01")
    wrong = {
        "unknown": [good[:-1], good + "x", hash_key(good), "Bearer", "ä" * 10, "x" * 5000],
        "revoked": [revoked], "expired": [expired],
    }  # fmt: skip
    async with gate.client() as client:
        for reason, keys in wrong.items():
            for key in keys:
                header = f"Bearer {key}".encode()
                answer = await client.post("/v1/completions", json=TEXT, headers={b"authorization": header})
                error_of(answer, 401, "invalid_api_key")
            assert gate.counted("shoal:auth_refusals")[reason,] == len(keys)
        assert (await client.get("/v1/models", headers={"authorization": f"Basic {good}"})).status_code == 401


async def test_a_key_that_is_revoked_gets_nothing_more_while_its_open_stream_goes_on(gate: Gate, backend: Any) -> None:
    key = gate.add()
    async with gate.client(key) as client:
        assert (await client.get("/v1/models")).status_code == 200
        backend.hangs_after = 1
        open_request = asyncio.create_task(client.post("/v1/completions", json=TEXT))
        await until(lambda: backend.num_steps > 0)
        gate.made[key] = NewKey(gate.made[key].entry.model_copy(update={"revoked": True}), key)
        gate.write()
        gate.ring.refresh()
        assert (await client.get("/v1/models")).status_code == 401
        assert not open_request.done()
        open_request.cancel()


async def test_models_that_a_key_may_not_ask_are_403_and_not_listed(gate: Gate, backend: Any) -> None:
    key = gate.add(models=["other", "gone"])
    async with gate.client(key) as client:
        assert [card["id"] for card in (await client.get("/v1/models")).json()["data"]] == ["other"]
        assert (await client.get("/v1/models/other")).status_code == 200
        for answer in (
            await client.get(f"/v1/models/{MODEL}"),
            await client.post("/v1/chat/completions", json=CHAT),
            await client.post("/v1/completions", json=TEXT),
            await client.post("/tokenize", json={"model": MODEL, "prompt": "a"}),
            await client.post("/detokenize", json={"model": MODEL, "tokens": [1]}),
        ):
            error = error_of(answer, 403, "model_not_allowed")
            assert error["param"] == "model"
        unknown = error_of(await client.post("/v1/completions", json=TEXT | {"model": "x"}), 404, "model_not_found")
        assert MODEL not in unknown["message"]
        assert (await client.post("/tokenize", json={"prompt": "a"})).status_code == 200  # the first it may ask
        assert (await client.post("/v1/completions", json=TEXT | {"model": "other"})).status_code == 200
    assert len(backend.calls) == 1
    assert gate.counted("shoal:auth_refusals")["model",] == 5
    nothing = gate.add(models=["gone"])
    async with gate.client(nothing) as client:
        error_of(await client.post("/tokenize", json={"prompt": "a"}), 403, "model_not_allowed")


async def test_tenants_never_share_a_prefix_and_none_can_name_anothers(gate: Gate, backend: Any) -> None:
    keys = {name: gate.add(name) for name in ("a", "b")} | {"a2": gate.add("a")}
    shared = gate.add("a", shared_cache=True)
    salts: dict[tuple[str, str], str] = {}
    for name, key in [*keys.items(), ("shared", shared)]:
        async with gate.client(key) as client:
            for salt in ("", "b", "b:", ":b", "a:"):
                headers = {"x-gateway-inference-fairness-id": "b"}
                answer = await client.post("/v1/completions", json=TEXT | {"cache_salt": salt}, headers=headers)
                assert answer.status_code == 200
                salts[name, salt] = backend.calls[-1].cache_salt
    for salt in ("", "b", "b:", ":b", "a:"):
        assert salts["a", salt] == salts["a2", salt]
    by_owner = [{s for (name, _), s in salts.items() if name in names} for names in (("a", "a2"), ("b",), ("shared",))]
    assert [len(one) for one in by_owner] == [5, 5, 5]
    assert len(set.union(*by_owner)) == 15


async def test_the_tenant_of_the_key_is_whose_turn_it_is_whatever_the_headers_say(
    gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    from shoal.cluster.gateway import routes

    visit = routes.Visit
    monkeypatch.setattr(routes, "Visit", lambda call, tenant, *rest: seen.append(tenant) or visit(call, tenant, *rest))
    async with gate.client(gate.add("acme")) as client:
        await client.post("/v1/completions", json=TEXT, headers={"x-gateway-inference-fairness-id": "umbrella"})
        await client.post("/v1/completions", json=TEXT, headers={"x-gateway-inference-fairness-id": "u" * 1000})
    assert seen == ["acme", "acme"]


async def test_requests_over_the_limit_are_429_until_it_comes_back(gate: Gate) -> None:
    key = gate.add(limits={"requests_per_minute": 2})
    async with gate.client(key) as client:
        first = await client.post("/v1/completions", json=TEXT)
        assert first.headers["x-ratelimit-limit-requests"] == "2"
        assert first.headers["x-ratelimit-remaining-requests"] == "1"
        assert first.headers["x-ratelimit-reset-requests"] == "30s"
        assert "x-ratelimit-limit-tokens" not in first.headers
        assert (await client.post("/tokenize", json={"prompt": "a"})).status_code == 200
        answer = await client.post("/v1/completions", json=TEXT)
        error = error_of(answer, 429, "rate_limit_exceeded")
        assert error["type"] == "rate_limit_error"
        assert answer.headers["retry-after"] == "30"
        assert answer.headers["x-ratelimit-remaining-requests"] == "0"
        assert answer.headers["x-ratelimit-reset-requests"] == "1m0s"
        assert (await client.get("/v1/models")).status_code == 200  # counts for nothing
        gate.now += 30
        assert (await client.post("/v1/completions", json=TEXT)).status_code == 200
    refusals = gate.counted("shoal:auth_refusals")
    assert {reason: n for (reason,), n in refusals.items() if n} == {"requests": 1.0}
    assert len(refusals) == 8
    assert gate.counted("shoal:tenant_requests") == {("acme",): 3.0}


@pytest.mark.parametrize("stream", [False, True])
async def test_tokens_are_charged_as_they_were_used(gate: Gate, backend: Any, stream: bool) -> None:
    key = gate.add(limits={"tokens_per_minute": 600})
    backend.num_cached_tokens = 2
    async with gate.client(key) as client:
        body = TEXT | {"n": 2, "max_tokens": 3, "stream": stream}
        answer = await client.post("/v1/completions", json=body)
        assert answer.status_code == 200
        assert answer.headers["x-ratelimit-limit-tokens"] == "600"
    assert gate.auth.limits.standing(gate.id_of(key))["tokens"].remaining == 600 - 4 - 2 * 3
    assert gate.counted("shoal:tenant_tokens") == {
        ("acme", MODEL, "prompt"): 4.0, ("acme", MODEL, "cached"): 2.0, ("acme", MODEL, "generated"): 6.0,
    }  # fmt: skip


async def test_tokens_past_the_limit_are_a_debt(gate: Gate) -> None:
    key = gate.add(limits={"tokens_per_minute": 5})
    async with gate.client(key) as client:
        assert (await client.post("/v1/completions", json=TEXT | {"max_tokens": 6})).status_code == 200
        answer = await client.post("/v1/completions", json=TEXT)
        error_of(answer, 429, "rate_limit_exceeded")
        assert answer.headers["retry-after"] == "72"  # 10 of 5 a minute are used, and 4 must be left


@pytest.mark.parametrize(
    "error", [RefusedError("busy", code="queue_full", retry_after_s=1), ReplicaUnavailableError("none")]
)
async def test_what_was_not_served_costs_no_tokens(gate: Gate, backend: Any, error: Exception) -> None:
    key = gate.add(limits={"tokens_per_minute": 600})
    backend.error = error
    async with gate.client(key) as client:
        assert (await client.post("/v1/completions", json=TEXT)).status_code in (429, 503)
    assert gate.auth.limits.standing(gate.id_of(key))["tokens"].remaining == 600
    assert gate.counted("shoal:tenant_tokens") == {}


async def test_a_request_holds_its_place_to_the_end_of_its_answer_however_that_comes(gate: Gate, backend: Any) -> None:
    key = gate.add(limits={"max_concurrent_requests": 1})
    backend.hangs_after = 1
    async with gate.client(key) as client:
        for stream in (True, False):
            before = backend.num_steps
            hanging = asyncio.create_task(client.post("/v1/completions", json=TEXT | {"stream": stream}))
            await until(lambda before=before: backend.num_steps > before)
            error_of(await client.post("/v1/completions", json=TEXT), 429, "rate_limit_exceeded")
            hanging.cancel()
            await asyncio.gather(hanging, return_exceptions=True)
            assert gate.auth.limits.num_open(gate.id_of(key)) == 0
        backend.hangs_after = None
        bad: list[Callable[[], Awaitable[httpx.Response]]] = [
            lambda: client.post("/v1/completions", content=b"{"),
            lambda: client.post("/v1/completions", json=TEXT | {"model": "x"}),
            lambda: client.post("/v1/completions", json=TEXT),
            lambda: client.post("/v1/completions", json=TEXT | {"stream": True}),
        ]
        for ask in bad:
            assert (await ask()).status_code in (200, 400, 404)
            assert gate.auth.limits.num_open(gate.id_of(key)) == 0
        backend.error = RuntimeError("broken")
        assert (await client.post("/v1/completions", json=TEXT)).status_code == 500
    assert gate.auth.limits.num_open(gate.id_of(key)) == 0


async def test_one_request_is_held_to_its_tokens(gate: Gate, backend: Any) -> None:
    key = gate.add(limits={"max_tokens_per_request": 20})
    async with gate.client(key) as client:
        wanted = await client.post("/v1/completions", json=TEXT | {"max_tokens": 17})
        assert error_of(wanted, 400, "max_tokens_per_request_exceeded")["param"] == "max_tokens"
        samples = await client.post("/v1/completions", json=TEXT | {"max_tokens": 9, "n": 2})
        error_of(samples, 400, "max_tokens_per_request_exceeded")
        long = await client.post("/v1/completions", json=TEXT | {"prompt": [1] * 20})
        error_of(long, 400, "max_tokens_per_request_exceeded")
        assert not backend.calls
        assert (await client.post("/v1/completions", json=TEXT | {"max_tokens": 16})).status_code == 200
        # Who does not say how many gets what there is room for.
        assert (await client.post("/v1/completions", json=TEXT | {"n": 3})).status_code == 200
        assert backend.calls[-1].params.max_tokens == 5
        backend.ends_with_eos = False
        assert (await client.post("/v1/completions", json=TEXT | {"prompt": [[1, 2], [1, 2]]})).status_code == 200
        assert [call.params.max_tokens for call in backend.calls[-2:]] == [8, 8]


async def test_a_key_is_in_no_log_no_answer_and_no_repr(
    gate: Gate, backend: Any, caplog: pytest.LogCaptureFixture
) -> None:
    good, revoked = gate.add(limits={"requests_per_minute": 6}), gate.add(revoked=True)
    unknown = KEY_PREFIX + "unknown-unknown-unknown-unknown-unknown"
    answers = []
    with caplog.at_level(logging.DEBUG):
        for key in (good, revoked, unknown):
            async with gate.client(key) as client:
                answers += [await client.get("/v1/models"), await client.post("/v1/completions", json=TEXT)]
                answers += [await client.get("/debug/routing"), await client.get("/status")]
                answers += [
                    await client.post("/v1/completions", json=TEXT | {"model": "x"}, headers={"x-api-key": key})
                ]
        backend.error = RuntimeError("broken")
        async with gate.client(good) as client:
            answers += [await client.post("/v1/completions", json=TEXT) for _ in range(5)]
    assert {answer.status_code for answer in answers} >= {200, 401, 404, 429, 500}
    shown = caplog.text + "".join(answer.text + repr(answer.headers) for answer in answers)
    shown += repr(gate.auth.snapshot()) + repr(vars(gate.auth)) + repr(gate.ring.file) + repr(vars(gate.ring))
    for key in (good, revoked, unknown):
        assert key not in shown
        assert key[len(KEY_PREFIX) :] not in shown


async def test_pages_of_other_sites_may_ask_only_where_the_configuration_says_so(gate: Gate) -> None:
    preflight = {"origin": "https://a.example", "access-control-request-method": "POST",
                 "access-control-request-headers": "authorization"}  # fmt: skip
    async with gate.client() as client:
        answer = await client.options("/v1/completions", headers=preflight)
        assert answer.status_code == 401
        assert not [name for name in answer.headers if name.startswith("access-control")]
    async with gate.client(cors_origins=["https://a.example"]) as client:
        answer = await client.options("/v1/completions", headers=preflight)
        assert answer.status_code == 200
        assert answer.headers["access-control-allow-origin"] == "https://a.example"
        refused = await client.post("/v1/completions", json=TEXT, headers={"origin": "https://a.example"})
        assert refused.status_code == 401
        assert refused.headers["access-control-allow-origin"] == "https://a.example"
        other = await client.options("/v1/completions", headers=preflight | {"origin": "https://b.example"})
        assert "access-control-allow-origin" not in other.headers


async def test_gateways_count_together_over_their_sockets(tmp_path: Path) -> None:
    """As the deployment puts them together: inbox, mirror and keys of two gateways."""
    made = new_key("acme", limits={"requests_per_minute": 3, "max_concurrent_requests": 2})
    (tmp_path / "keys.yaml").write_text("keys:\n" + made.yaml)
    heard: list[list[Any]] = [[], []]
    inboxes = [StepInbox("127.0.0.1", heard[0].append), StepInbox("127.0.0.1", heard[1].append)]
    mirrors = [Mirror(inbox.address) for inbox in inboxes]
    gateways = [
        start_auth(str(tmp_path / "keys.yaml"), i.address, m.tell) for i, m in zip(inboxes, mirrors, strict=True)
    ]
    try:
        for inbox, mirror in zip(inboxes, mirrors, strict=True):
            inbox.start()
            mirror.start()
            mirror.meet([other.address for other in inboxes])
        one, two = gateways
        one.enter(made.entry)
        one.enter(made.entry)
        await until(lambda: len(heard[1]) == 2)
        for message in heard[1]:
            two.limits.take(message)
        with pytest.raises(ApiError, match="2 requests at once"):
            two.enter(made.entry)
        one.limits.leave(made.entry.id)
        await until(lambda: len(heard[1]) == 3)
        two.limits.take(heard[1][-1])
        two.enter(made.entry)
        await until(lambda: len(heard[0]) == 1)
        one.limits.take(heard[0][-1])
        two.limits.leave(made.entry.id)
        await until(lambda: len(heard[0]) == 2)
        one.limits.take(heard[0][-1])
        with pytest.raises(ApiError, match="3 requests a minute"):
            one.enter(made.entry)
    finally:
        for part in (*gateways, *mirrors, *inboxes):
            part.close()
