"""The gateway's way to the replicas of one model: a Serve call for the life of a request, tokens beside it."""

from __future__ import annotations

import asyncio
from collections import Counter, OrderedDict
from collections.abc import AsyncGenerator
from dataclasses import replace
from typing import Any, Final

from ray import serve
from ray.serve.context import _set_request_context
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle, DeploymentResponse
from ray.serve.schema import DeploymentStatus, DeploymentStatusOverview

from shoal.cluster.channel import CallSummary, GenerateCall, GroupStatus, ReplicaFacts
from shoal.cluster.gateway.admission import RefusedError
from shoal.cluster.gateway.backend import Placement, Prediction, ReplicaFailedError, ReplicaUnavailableError
from shoal.cluster.gateway.inbox import CallInbox, StepInbox, TokensLostError
from shoal.cluster.metrics import Snapshot
from shoal.cluster.routing.model_routing import ModelRouting
from shoal.cluster.routing.policies import RoutedRequest
from shoal.engine.request import RequestError, RequestOutput

# How long the last tokens of a call may be behind the replica's word that the call is done.
LAST_TOKENS_TIMEOUT_S: Final = 10.0
ASK_TIMEOUT_S: Final = 2.0
# Prompts up to this length are hashed in the event loop, 0.5 ms; longer ones in a thread.
MAX_INLINE_TOKENS: Final = 8192
# Calls that were asked about and are not on their way yet; of older ones the prompt is hashed again.
MAX_DESCRIBED: Final = 256


class ReplicaBackend:
    """Adapter of the gateway's Backend protocol to a replica deployment."""

    def __init__(
        self, model_name: str, handle: DeploymentHandle[object], inbox: StepInbox, routing: ModelRouting
    ) -> None:
        """`routing`: that of the handle's deployment in this process, which Serve's router uses too."""
        self._model_name = model_name
        self._handle = handle
        self._inbox = inbox
        self._routing = routing
        self._described: OrderedDict[str, RoutedRequest] = OrderedDict()
        self._watches: set[asyncio.Task[None]] = set()  # the event loop keeps weak references only

    @property
    def max_model_len(self) -> int | None:
        """That every replica takes which runs now; None while none does."""
        return self._routing.max_model_len

    async def facts(self) -> ReplicaFacts:
        """Wait until a replica is ready and ask it about the model."""
        facts: ReplicaFacts = await self._handle.facts.remote()
        return facts

    async def predict(self, call: GenerateCall) -> Prediction | None:
        """See `Backend.predict`."""
        request = await self._describe(call)
        foresight = self._routing.foresee(request) if request is not None else None
        if foresight is None:
            return None
        return Prediction(
            ttft_s=foresight.ttft_s,
            tpot_s=foresight.tpot_s,
            retry_after_s=max(foresight.wait_s, foresight.next_end_s),
            wait_s=foresight.wait_s,
            num_replicas=foresight.num_replicas,
        )

    def placement(self, call: GenerateCall) -> Placement | None:
        """See `Backend.placement`."""
        placed = self._routing.placement(call)
        if placed is None:
            return None
        label, estimate, decision = placed
        return Placement(
            label,
            estimate.num_matched,
            estimate.ttft_s if decision.is_known else None,
            decision.decided_s,
            self._routing.candidates(decision),
        )

    async def generate(self, call: GenerateCall) -> AsyncGenerator[list[RequestOutput], None]:
        """The call's outputs, those of each engine step or of several. Closing the generator aborts the call.

        Raises RequestError where the engine refuses the call, ReplicaUnavailableError where no replica takes it,
        ReplicaFailedError where its replica fails, dies or falls silent, or tokens did not arrive.
        """
        request = await self._describe(call)
        self._described.pop(call.request_id, None)
        num_tokens = 0
        with self._inbox.open(call.sample_ids) as inbox:
            self._routing.open(call, request)
            # Serve 2.60 gives all calls of one HTTP request the same internal id, and its router knows the last one of
            # each id only: of two calls at once the first would never be sent.
            _set_request_context(_internal_request_id=call.request_id)
            response = self._handle.generate.remote(call, self._inbox.address)
            watch = asyncio.create_task(self._watch(response, inbox))
            self._watches.add(watch)
            watch.add_done_callback(self._watches.discard)
            try:
                while not inbox.is_finished:
                    outputs = await inbox.next()
                    if num_tokens == 0:
                        self._routing.settle(call)
                    num_tokens += sum(len(output.token_ids) for output in outputs)
                    yield outputs
            finally:
                self._routing.close_call(call, num_tokens // call.params.num_samples if inbox.is_finished else None)
                if not inbox.is_finished:
                    response.cancel()

    async def groups(self) -> list[GroupStatus]:
        """Every replica group: those that answer, and of the others what Serve says of them."""
        views = self._routing.views()
        answered: list[GroupStatus] = await self._ask_all("status")
        answers = [replace(group, routing=views.get(group.label)) for group in answered]
        others = await asyncio.to_thread(self._states)
        others["RUNNING"] -= len(answers)
        silent = [GroupStatus("not answering")] * others.pop("RUNNING")
        return answers + silent + [GroupStatus(state.lower()) for state in others.elements()]

    async def snapshots(self) -> dict[str, Snapshot]:
        """Measurements of the replicas that answer, by their `engine` label."""
        answers: list[tuple[str, Snapshot]] = await self._ask_all("metrics")
        return dict(answers)

    def explain(self) -> list[dict[str, Any]]:
        """The last routing decisions, newest first, as plain data with each replica's cost."""
        return self._routing.explain()

    def routing_snapshot(self) -> Snapshot:
        """What this gateway has counted of its routing to this model."""
        return self._routing.snapshot(self._model_name)

    async def check_health(self) -> None:
        """Raise ReplicaUnavailableError if no replica answers. Full queues are no reason to fail, nor is it that the
        autoscaler has none running: a request brings one back.
        """
        if not await self._ask_all("facts") and not await asyncio.to_thread(self._is_scaled_to_zero):
            raise ReplicaUnavailableError(f"no replica of {self._model_name} answers")

    async def _describe(self, call: GenerateCall) -> RoutedRequest | None:
        """The call as the router sees it, made once."""
        known = self._described.get(call.request_id)
        if known is not None:
            return known
        if len(call.prompt_ids) <= MAX_INLINE_TOKENS:
            request = self._routing.describe(call)
        else:
            request = await asyncio.to_thread(self._routing.describe, call)
        if request is not None:
            self._described[call.request_id] = request
            if len(self._described) > MAX_DESCRIBED:
                self._described.popitem(last=False)
        return request

    def _states(self) -> Counter[str]:
        """Number of replicas by Serve's name of their state."""
        deployment = self._deployment()
        return Counter(deployment.replica_states if deployment is not None else ())

    def _is_scaled_to_zero(self) -> bool:
        """Or on the way there or back."""
        deployment = self._deployment()
        if deployment is None or deployment.replica_states.get("RUNNING"):
            return False
        return deployment.status in (
            DeploymentStatus.HEALTHY, DeploymentStatus.UPSCALING, DeploymentStatus.DOWNSCALING,
        )  # fmt: skip

    def _deployment(self) -> DeploymentStatusOverview | None:
        app = serve.status().applications.get(self._handle.app_name)
        return app.deployments.get(self._handle.deployment_name) if app is not None else None

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
            message = f"{self._model_name} has too many calls waiting: {error.message}"
            inbox.fail(RefusedError(message, code="queue_full", retry_after_s=1))
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
