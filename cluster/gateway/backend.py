"""What stands behind the routes: the protocol that they use and the model that it serves."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Protocol

from shoal.cluster.channel import GenerateCall, GroupStatus
from shoal.engine.request import RequestOutput
from shoal.engine.tokenizer import Tokenizer


class ReplicaUnavailableError(RuntimeError):
    """No replica can take or finish a call; trying again later may help. Answered with 503 and Retry-After."""

    def __init__(self, message: str = "no replica is ready to serve this model", *, retry_after_s: int = 5) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class ReplicaFailedError(ReplicaUnavailableError):
    """The replica that held a call has failed or fallen silent. The outputs so far are right; no more will come."""


class Backend(Protocol):
    """Replicas of one model."""

    def generate(self, call: GenerateCall) -> AsyncGenerator[list[RequestOutput], None]:
        """Outputs of one engine step for this call's samples at a time, until every sample has finished.

        Closing the generator, or cancelling the task that reads it, aborts what still runs. Raises RequestError for
        a call that cannot be served as asked, ReplicaUnavailableError when nobody can serve it now, and
        ReplicaFailedError, which is one, when its replica failed: no output has the finish reason ERROR.
        """
        ...

    async def groups(self) -> list[GroupStatus]:
        """Every replica group, those that are not up included."""
        ...

    async def metrics_text(self) -> str:
        """Metrics of the replicas in Prometheus' text format."""
        ...

    async def check_health(self) -> None:
        """Raise ReplicaUnavailableError if no replica is ready."""
        ...


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A model under the name that clients use. `created`: Unix time in seconds; `vocab_size`: rows of the embedding."""

    name: str
    tokenizer: Tokenizer
    max_model_len: int
    vocab_size: int
    created: int
    backend: Backend


__all__ = ["Backend", "GenerateCall", "GroupStatus", "ReplicaFailedError", "ReplicaUnavailableError", "ServedModel"]
