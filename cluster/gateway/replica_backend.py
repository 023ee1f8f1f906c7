"""The gateway's way to the replicas of one model: a Serve call for the life of a request, tokens beside it."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator
from typing import Any, Final

from ray import serve
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle, DeploymentResponse

from shoal.cluster.channel import CallSummary, GenerateCall, GroupStatus, ReplicaFacts
from shoal.cluster.gateway.backend import ReplicaFailedError, ReplicaUnavailableError
from shoal.cluster.gateway.inbox import CallInbox, StepInbox, TokensLostError
from shoal.cluster.metrics import Snapshot, render
from shoal.engine.request import RequestError, RequestOutput

# How long the last tokens of a call may be behind the replica's word that the call is done.
LAST_TOKENS_TIMEOUT_S: Final = 10.0
ASK_TIMEOUT_S: Final = 2.0


class ReplicaBackend:
    """Adapter of the gateway's Backend protocol to a replica deployment."""

    def __init__(self, model_name: str, handle: DeploymentHandle[object], inbox: StepInbox) -> None:
        self._model_name = model_name
        self._handle = handle
        self._inbox = inbox
        self._watches: set[asyncio.Task[None]] = set()  # the event loop keeps weak references only

    async def facts(self) -> ReplicaFacts:
        """Wait until a replica is ready and ask it about the model."""
        facts: ReplicaFacts = await self._handle.facts.remote()
        return facts

    async def generate(self, call: GenerateCall) -> AsyncGenerator[list[RequestOutput], None]:
        """The call's outputs, an item per engine step. Closing the generator aborts the call.

        Raises RequestError where the engine refuses the call, ReplicaUnavailableError where no replica takes it,
        ReplicaFailedError where its replica fails, dies or falls silent, or tokens did not arrive.
        """
        with self._inbox.open(call.sample_ids) as inbox:
            response = self._handle.generate.remote(call, self._inbox.address)
            watch = asyncio.create_task(self._watch(response, inbox))
            self._watches.add(watch)
            watch.add_done_callback(self._watches.discard)
            try:
                while not inbox.is_finished:
                    yield await inbox.next()
            finally:
                if not inbox.is_finished:
                    response.cancel()

    async def groups(self) -> list[GroupStatus]:
        """Those that answer, and of the others what Serve says of them."""
        answers: list[GroupStatus] = await self._ask_all("status")
        others = await asyncio.to_thread(self._states)
        others["RUNNING"] -= len(answers)
        silent = [GroupStatus("not answering")] * others.pop("RUNNING")
        return answers + silent + [GroupStatus(state.lower()) for state in others.elements()]

    async def snapshots(self) -> dict[tuple[str, str], Snapshot]:
        """Measurements of the replicas that answer, by (model_name, engine)."""
        answers: list[tuple[str, Snapshot]] = await self._ask_all("metrics")
        return {(self._model_name, label): snapshot for label, snapshot in answers}

    async def metrics_text(self) -> str:
        """Measurements of this model's replicas in Prometheus' text format."""
        return render(await self.snapshots())

    async def check_health(self) -> None:
        """Raise ReplicaUnavailableError if no replica answers. Full queues are no reason to fail."""
        if not await self._ask_all("facts"):
            raise ReplicaUnavailableError(f"no replica of {self._model_name} answers")

    def _states(self) -> Counter[str]:
        """Number of replicas by Serve's name of their state."""
        app = serve.status().applications.get(self._handle.app_name)
        deployment = app.deployments.get(self._handle.deployment_name) if app is not None else None
        return Counter(deployment.replica_states if deployment is not None else ())

    async def _ask_all(self, method: str) -> list[Any]:
        """What every replica answers, past their queues; without those that fail or are too late."""
        asked = self._handle.broadcast(method)
        try:
            # Not results_async: that one is all or nothing in time, and a replica that is cut off answers nobody.
            answers = await asyncio.to_thread(asked.results, timeout_s=ASK_TIMEOUT_S, return_exceptions=True)
        except (TimeoutError, DeploymentUnavailableError):
            return []
        return [answer for answer in answers if not isinstance(answer, BaseException)]

    async def _watch(self, response: DeploymentResponse[CallSummary], inbox: CallInbox) -> None:
        """Turn the end of the Serve call into the end of the inbox: no way may leave a client waiting."""
        try:
            summary = await response
            summary.check()
        except RequestError as error:
            inbox.fail(error)
        except asyncio.CancelledError:
            inbox.fail(ReplicaUnavailableError(f"the call to {self._model_name} was cancelled"))
        except BackPressureError as error:
            inbox.fail(ReplicaUnavailableError(f"{self._model_name} has too many calls waiting: {error.message}"))
        except Exception as error:
            lost = ReplicaFailedError(f"the replica of {self._model_name} failed: {type(error).__name__}")
            lost.__cause__ = error
            inbox.fail(lost)
        else:
            num_tokens = sum(summary.num_tokens)
            inbox.fail_after(
                LAST_TOKENS_TIMEOUT_S,
                TokensLostError(f"the last of {num_tokens} tokens of a call to {self._model_name} were lost"),
            )
