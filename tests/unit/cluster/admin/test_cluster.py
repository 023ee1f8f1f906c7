"""Asking gateways that may be silent, through handles that play Serve's part."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import pytest
from ray.serve.exceptions import DeploymentUnavailableError

from shoal.cluster.admin.cluster import GATEWAY_TIMEOUT_S, NoGatewayError, ServeCluster
from shoal.cluster.channel import GatewayFacts

FACTS = {label: GatewayFacts(label, "10.0.0.1", 7) for label in "01"}


class PlayedHandle:
    """A handle whose deployment answers `one` to a call and `all` to a broadcast; exceptions are raised or returned."""

    def __init__(self, one: Sequence[Any] = (), all: Sequence[Any] | BaseException = ()) -> None:
        self._one = iter(one)
        self._all = all
        self.asked: list[tuple[str, tuple[Any, ...]]] = []

    def broadcast(self, method: str, *args: Any) -> PlayedHandle:
        self.asked.append((method, args))
        return self

    def results(self, *, timeout_s: float, return_exceptions: bool) -> list[Any]:
        assert (timeout_s, return_exceptions) == (GATEWAY_TIMEOUT_S, True)
        if isinstance(self._all, BaseException):
            raise self._all
        return list(self._all)

    def options(self, *, method_name: str) -> Any:
        class Bound:
            remote: Callable[[], Awaitable[Any]] = self._answer

        return Bound

    async def _answer(self) -> Any:
        answer = next(self._one)
        if isinstance(answer, BaseException):
            raise answer
        return answer


def cluster(handle: PlayedHandle) -> ServeCluster:
    found = ServeCluster("gateway", "shoal")
    found._handle = handle  # type: ignore[assignment]
    return found


async def test_a_silent_gateway_is_left_out_and_counted() -> None:
    handle = PlayedHandle(one=[{"m": {"0": ()}}], all=[("1", ()), TimeoutError()])
    measured = await cluster(handle).measure()
    assert (dict(measured.gateways), measured.num_silent, dict(measured.replicas)) == ({"1": ()}, 1, {"m": {"0": ()}})


async def test_where_one_gateway_is_enough_another_one_is_asked_if_it_fails() -> None:
    handle = PlayedHandle(one=[RuntimeError("gone"), ["a model"]], all=[FACTS["1"], FACTS["0"]])
    status = await cluster(handle).status()
    assert status.models == ["a model"]
    assert [gateway.label for gateway in status.gateways] == ["0", "1"]


@pytest.mark.parametrize("error", [TimeoutError(), DeploymentUnavailableError("gateway")])
async def test_without_gateways_there_are_no_measurements_and_status_says_why(error: Exception) -> None:
    measured = await cluster(PlayedHandle(one=[error] * 2, all=error)).measure()
    assert (measured.gateways, measured.replicas, measured.num_silent) == ({}, {}, 0)
    with pytest.raises(NoGatewayError, match=f"no gateway answers: {type(error).__name__}"):
        await cluster(PlayedHandle(one=[error] * 2, all=error)).status()
    with pytest.raises(NoGatewayError):
        await cluster(PlayedHandle(all=error)).decisions()


async def test_a_request_is_known_to_one_of_the_gateways() -> None:
    handle = PlayedHandle(all=[None, {"request_id": "a"}, TimeoutError()])
    assert await cluster(handle).timeline("a") == {"request_id": "a"}
    assert handle.asked == [("timeline", ("a",))]
    assert await cluster(PlayedHandle(all=[None, None])).timeline("b") is None
    assert await cluster(PlayedHandle(all=[[{"request_id": "a"}], []])).timelines(5) == [{"request_id": "a"}]
