"""What the admin port asks of the cluster, and the adapter that asks gateways through Serve."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Protocol, TypeAlias

from ray import serve
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from shoal.cluster.channel import GatewayFacts, ModelStatus
from shoal.cluster.metrics import Snapshot

GATEWAY_TIMEOUT_S: Final = 2.0  # for what a gateway knows itself
REPLICAS_TIMEOUT_S: Final = 5.0  # for what it asks its replicas, and Serve, first
NUM_TRIES: Final = 2  # of gateways, where one is enough

Decisions: TypeAlias = Mapping[str, Sequence[Mapping[str, Any]]]  # by model, newest first


@dataclass(frozen=True, slots=True)
class Measured:
    """Everybody's measurements at about one moment. What did not answer is left out.

    seconds: Unix time. replicas: by model and `engine` label. gateways: by label. num_silent: gateways that were asked
    and did not answer.
    """

    seconds: float
    replicas: Mapping[str, Mapping[str, Snapshot]] = field(default_factory=dict)
    gateways: Mapping[str, Snapshot] = field(default_factory=dict)
    num_silent: int = 0


@dataclass(frozen=True, slots=True)
class ClusterStatus:
    """The models as one of the gateways sees them, and the gateways that answer."""

    models: Sequence[ModelStatus]
    gateways: Sequence[GatewayFacts]
    num_silent: int = 0


class NoGatewayError(RuntimeError):
    """No gateway answers."""


class Cluster(Protocol):
    """All gateways together. No method waits for more than some seconds, whoever is silent."""

    async def measure(self) -> Measured: ...

    async def status(self) -> ClusterStatus:
        """Raises NoGatewayError."""
        ...

    async def decisions(self) -> Mapping[str, Decisions]:
        """The last routing decisions, by gateway. Raises NoGatewayError."""
        ...

    async def timelines(self, limit: int) -> Sequence[Mapping[str, Any]]:
        """Of up to `limit` requests of each gateway that answers, the slowest first."""
        ...

    async def timeline(self, request_id: str) -> Mapping[str, Any] | None:
        """Of one request; None where no gateway that answers knows it."""
        ...


class ServeCluster:
    """Adapter of Cluster to the gateway deployment of a Serve application."""

    def __init__(self, deployment: str, application: str) -> None:
        self._deployment = deployment
        self._application = application
        self._handle: DeploymentHandle[object] | None = None

    async def measure(self) -> Measured:
        """See `Cluster.measure`."""
        replicas, (gateways, num_silent) = await asyncio.gather(self._replica_metrics(), self._ask_all("metrics"))
        return Measured(time.time(), replicas, dict(gateways), num_silent)

    async def status(self) -> ClusterStatus:
        """See `Cluster.status`."""
        models, (gateways, num_silent) = await asyncio.gather(self._ask_one("status"), self._ask_all("facts"))
        return ClusterStatus(models, sorted(gateways, key=lambda one: one.label), num_silent)

    async def decisions(self) -> Mapping[str, Decisions]:
        """See `Cluster.decisions`."""
        answers, _ = await self._ask_all("explain")
        if not answers:
            raise NoGatewayError("no gateway answers")
        return dict(answers)

    async def timelines(self, limit: int) -> Sequence[Mapping[str, Any]]:
        """See `Cluster.timelines`."""
        answers, _ = await self._ask_all("timelines", limit)
        return [timeline for answer in answers for timeline in answer]

    async def timeline(self, request_id: str) -> Mapping[str, Any] | None:
        """See `Cluster.timeline`."""
        answers, _ = await self._ask_all("timeline", request_id)
        return next((answer for answer in answers if answer is not None), None)

    async def _replica_metrics(self) -> Mapping[str, Mapping[str, Snapshot]]:
        try:
            snapshots: Mapping[str, Mapping[str, Snapshot]] = await self._ask_one("replica_metrics")
        except NoGatewayError:
            return {}
        return snapshots

    async def _ask_one(self, method: str) -> Any:
        """What any gateway answers. Raises NoGatewayError."""
        reason: BaseException | None = None
        for _ in range(NUM_TRIES):
            try:
                handle = await self._gateways()
                return await asyncio.wait_for(_answer(handle, method), REPLICAS_TIMEOUT_S)
            except Exception as error:  # whatever it is, another gateway may do better
                reason = error
        raise NoGatewayError(f"no gateway answers: {type(reason).__name__}") from reason

    async def _ask_all(self, method: str, *args: Any) -> tuple[list[Any], int]:
        """What every gateway answers, and how many do not."""
        try:
            asked = (await self._gateways()).broadcast(method, *args)
            answers = await asyncio.to_thread(asked.results, timeout_s=GATEWAY_TIMEOUT_S, return_exceptions=True)
        except (TimeoutError, RayServeException):  # none is there
            return [], 0
        answered = [answer for answer in answers if not isinstance(answer, BaseException)]
        return answered, len(answers) - len(answered)

    async def _gateways(self) -> DeploymentHandle[object]:
        """Not before it is needed: gateways are deployed beside this process, and hold a handle to it themselves."""
        if self._handle is None:
            self._handle = await asyncio.to_thread(serve.get_deployment_handle, self._deployment, self._application)
        return self._handle


async def _answer(handle: DeploymentHandle[object], method: str) -> Any:
    return await handle.options(method_name=method).remote()
