"""The Serve deployment of a replica: coordinator of one group. A single rank is in this process, several are actors."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from typing import Any, Final

import ray
from ray import serve

from shoal.cluster import hub
from shoal.cluster.autoscaling.signals import ReplicaSignals
from shoal.cluster.channel import CallSummary, GenerateCall, GroupStatus, ReplicaFacts
from shoal.cluster.config import LogSettings, ModelSettings, locate_model
from shoal.cluster.logs import about_request, log_to_serve
from shoal.cluster.metrics import ReplicaMetrics, Snapshot
from shoal.cluster.progress import ProgressSender
from shoal.cluster.replica.calls import Calls
from shoal.cluster.replica.kv_publisher import KVPublisher
from shoal.cluster.replica.placement import Resources
from shoal.cluster.replica.ray_launcher import RayLauncher
from shoal.cluster.replica.reporter import Reporter
from shoal.engine.config import ConfigError
from shoal.engine.executor import EngineFactory, ExecutorError
from shoal.engine.group.coordinator import group_engine
from shoal.engine.streaming import AsyncEngine

log = logging.getLogger(__name__)

ENGINE_CHECK_S: Final = 0.1
CLOSE_TIMEOUT_S: Final = 2.0
LAST_WORDS_S: Final = 0.2  # for errors on their way to gateways


class Replica:
    """One whole copy of a model. Constructing it loads the weights."""

    async def __init__(  # type: ignore[misc]  # Serve awaits constructors
        self,
        model: ModelSettings,
        rank_resources: Resources,
        progress_address: str | None = None,
        own_ip: str | None = None,
        *,
        logs: LogSettings,
    ) -> None:
        """`rank_resources`: what Ray has set aside for each rank. `own_ip`: where gateways hear of this replica; None
        is its node's address.

        Raises ConfigError, after telling it to whoever listens at `progress_address`, and ExecutorError if a rank dies
        while it starts.
        """
        started_s = time.monotonic()
        context = serve.get_replica_context()
        self._label = str(context.rank.rank)
        log_to_serve(logs.format, logs.level, replica=self._label)
        self._reporter = Reporter(lambda: self._calls.gateways)
        with ProgressSender(progress_address, model.name) as progress:
            try:
                path = await asyncio.to_thread(locate_model, model.model, on_progress=progress.send)
                self._engine = AsyncEngine(
                    self.engine_factory(model, path, rank_resources, self._label),
                    on_progress=progress.send,
                    observer=self._reporter.observe,
                )
                await self._engine.start()
            except ConfigError as error:
                progress.fail(str(error))
                raise
        self._calls = Calls(self._engine, ReplicaMetrics(usd_per_hour=model.usd_per_hour, started_s=started_s))
        self._calls.start()
        self._publisher = KVPublisher(
            own_ip or ray.util.get_node_ip_address(),
            replica=context.replica_id.unique_id,
            model=model.name,
            block_size=self._engine.config.block_size,
            num_blocks=self._engine.info.num_blocks,
        )
        self._publisher.start()
        self._reporter.start(self._publisher)
        self._watch = asyncio.create_task(self._leave_when_failed())

    @staticmethod
    def engine_factory(model: ModelSettings, path: str, rank_resources: Resources, label: str) -> EngineFactory:
        """What makes the engine, of the checkpoint at `path`. Raises ConfigError."""
        options = model.options(path)
        if options.num_ranks == 1:
            from shoal.engine.worker import local_engine  # brings torch, which the coordinator of a group does without

            return local_engine(options)
        drafts = options.speculative.model if options.speculative is not None else None
        named = ((model.model, path), (model.speculative.model if model.speculative is not None else None, drafts))
        fetched = tuple(
            hub.pinned(name, place) for name, place in named if name and place and name.startswith(hub.PREFIX)
        )
        return group_engine(options, RayLauncher(options.tensor_parallel, rank_resources, label, fetched))

    async def generate(self, call: GenerateCall, reply_to: str) -> CallSummary:
        """See `Calls.run`."""
        with about_request(call.http_request_id, call.traceparent):
            return await self._calls.run(call, reply_to)

    async def facts(self) -> ReplicaFacts:
        return ReplicaFacts(self._engine.max_model_len, self._engine.config.model.vocab_size)

    async def metrics(self) -> tuple[str, Snapshot]:
        """This replica's `engine` label and its measurements."""
        return self._label, self._calls.snapshot()

    async def status(self) -> GroupStatus:
        info, config = self._engine.info, self._engine.config
        return GroupStatus("running", self._label, info.num_blocks, config.block_size, info.ranks)

    def record_replica_metadata(self) -> dict[str, Any]:
        """Serve gives it to every router: where to follow this replica, the `engine` label of its metrics, and how
        long a request it takes.
        """
        return {**self._publisher.endpoints, "label": self._label, "max_model_len": self._engine.max_model_len}

    def record_autoscaling_stats(self) -> dict[str, float]:
        """Serve gives it to the autoscaling policy."""
        load = self._reporter.load
        return ReplicaSignals.of(load, self._calls.prompts).stats() if load is not None else {}

    def check_health(self) -> None:
        """Raises ExecutorError when the engine's thread has died or hangs; Serve then replaces the replica."""
        self._engine.check()

    async def __del__(self) -> None:
        # Serve awaits this once the replica is drained, on every orderly way out of a running replica.
        self._watch.cancel()
        await self._engine.close()
        self._calls.close()
        self._publisher.close()

    async def _leave_when_failed(self) -> None:
        """End this process once the engine has failed and its calls were told. Serve replaces a replica that is gone at
        once, and one that is unwell after three health checks. Ranks that are left go with their owner.
        """
        while True:
            await asyncio.sleep(ENGINE_CHECK_S)
            try:
                self._engine.check()
            except ExecutorError as error:
                log.error("the replica ends: %s", error)
                break
        await asyncio.wait([asyncio.create_task(self._engine.close())], timeout=CLOSE_TIMEOUT_S)
        await asyncio.sleep(LAST_WORDS_S)
        os._exit(1)
