"""Readiness that many probes may ask for, and draining, seen over HTTP."""

from __future__ import annotations

import asyncio

import httpx
import pytest

from shoal.cluster.gateway.backend import ReplicaUnavailableError
from shoal.cluster.gateway.readiness import READY_FOR_S, DrainableApp, Readiness
from shoal.cluster.gateway.routes import build_app


class Looked:
    """A backend that counts how often it is looked at."""

    def __init__(self) -> None:
        self.num_looks = 0
        self.error: Exception | None = None
        self.hangs = False

    async def check_health(self) -> None:
        self.num_looks += 1
        await asyncio.sleep(3600 if self.hangs else 0.01)
        if self.error is not None:
            raise self.error


async def test_one_look_answers_every_probe_of_a_second() -> None:
    now = 0.0
    backend = Looked()
    readiness = Readiness(lambda: [backend], clock=lambda: now)  # type: ignore[list-item]
    await asyncio.gather(*(readiness.check() for _ in range(50)))
    await readiness.check()
    assert backend.num_looks == 1
    now = READY_FOR_S
    backend.error = ReplicaUnavailableError("gone")
    with pytest.raises(ReplicaUnavailableError, match="gone"):
        await readiness.check()
    with pytest.raises(ReplicaUnavailableError, match="gone"):
        await readiness.check()
    assert backend.num_looks == 2


async def test_a_probe_that_leaves_takes_nobody_elses_look_with_it() -> None:
    backend = Looked()
    readiness = Readiness(lambda: [backend])  # type: ignore[list-item]
    first, second = asyncio.create_task(readiness.check()), asyncio.create_task(readiness.check())
    await asyncio.sleep(0)
    first.cancel()
    await second
    assert backend.num_looks == 1


async def test_replicas_that_hang_are_not_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shoal.cluster.gateway.readiness.LOOK_TIMEOUT_S", 0.05)
    backend = Looked()
    backend.hangs = True
    with pytest.raises(ReplicaUnavailableError, match="have not answered"):
        await Readiness(lambda: [backend]).check()  # type: ignore[list-item]


async def test_draining_refuses_what_is_new_and_finishes_what_is_open(served, backend) -> None:
    app = DrainableApp(build_app({served.name: served}))
    body = {"model": "smollm2", "prompt": "The capital", "max_tokens": 8}
    backend.hangs_after = 1
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://gateway") as client:
        open_one = asyncio.create_task(client.post("/v1/completions", json=body))
        await backend.has_begun.wait()
        app.is_draining = True
        for answer in (await client.post("/v1/completions", json=body), await client.get("/health")):
            assert answer.status_code == 503
            assert answer.json()["error"]["code"] == "draining"
            assert int(answer.headers["retry-after"]) > 0
            assert answer.headers["connection"] == "close"
        assert (await client.get("/ping")).status_code == 200
        assert app.num_open == 1
        app.cut_off()
        with pytest.raises(asyncio.CancelledError):
            await open_one
    assert app.num_open == 0
    assert backend.num_closed == 1


async def test_ping_is_liveness_and_health_is_readiness(client, backend) -> None:
    backend.error = ReplicaUnavailableError(retry_after_s=7)
    assert (await client.get("/ping")).status_code == 200
    answer = await client.get("/health")
    assert answer.status_code == 503
    assert answer.headers["retry-after"] == "7"
