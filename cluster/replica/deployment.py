"""The Serve deployment of a replica: coordinator of one group, with its engine in this process."""

from __future__ import annotations

from ray import serve

from shoal.cluster.channel import CallSummary, GenerateCall, ReplicaFacts
from shoal.cluster.config import ModelSettings, locate_model
from shoal.cluster.logs import adopt_serve_handlers
from shoal.cluster.metrics import Snapshot
from shoal.cluster.progress import ProgressSender
from shoal.cluster.replica.calls import Calls
from shoal.engine.config import ConfigError
from shoal.engine.streaming import AsyncEngine
from shoal.engine.worker import local_engine


class Replica:
    """One whole copy of a model. Constructing it loads the weights."""

    async def __init__(  # type: ignore[misc]  # Serve awaits constructors
        self, model: ModelSettings, progress_address: str | None = None
    ) -> None:
        """Raises ConfigError, after telling it to whoever listens at `progress_address`."""
        adopt_serve_handlers()
        self._label = str(serve.get_replica_context().rank.rank)
        with ProgressSender(progress_address, model.name) as progress:
            try:
                options = model.engine.options(locate_model(model.model))
                self._engine = AsyncEngine(local_engine(options), on_progress=progress.send)
                await self._engine.start()
            except ConfigError as error:
                progress.fail(str(error))
                raise
        self._calls = Calls(self._engine)

    async def generate(self, call: GenerateCall, reply_to: str) -> CallSummary:
        """See `Calls.run`."""
        return await self._calls.run(call, reply_to)

    async def facts(self) -> ReplicaFacts:
        return ReplicaFacts(self._engine.max_model_len, self._engine.config.model.vocab_size)

    async def metrics(self) -> tuple[str, Snapshot]:
        """This replica's `engine` label and its measurements."""
        return self._label, self._calls.snapshot()

    def check_health(self) -> None:
        """Raises ExecutorError when the engine's thread has died or hangs; Serve then replaces the replica."""
        self._engine.check()

    async def __del__(self) -> None:
        # Serve awaits this once the replica is drained, on every orderly way out of a running replica.
        await self._engine.close()
        self._calls.close()
