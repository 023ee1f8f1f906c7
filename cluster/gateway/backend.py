"""What stands behind the routes: the protocol that they use and the model that it serves."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from shoal.cluster.channel import GenerateCall
from shoal.engine.request import RequestOutput
from shoal.engine.tokenizer import Tokenizer


class ReplicaUnavailableError(RuntimeError):
    """No replica can take or finish a call; trying again later may help. Answered with 503 and Retry-After."""

    def __init__(self, message: str = "no replica is ready to serve this model", *, retry_after_s: int = 5) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class ReplicaFailedError(ReplicaUnavailableError):
    """The replica that held a call has failed or fallen silent. The outputs so far are right; no more will come."""


@dataclass(frozen=True, slots=True)
class Prediction:
    """What a call would meet at the replica that is best for it now, in seconds.

    retry_after_s: when it would wait for nobody, if nothing more came, and one of those that generate there has ended.
    """

    ttft_s: float
    tpot_s: float  # from token to token
    retry_after_s: float = 0.0
    wait_s: float = 0.0  # of ttft_s, before its own prompt is computed
    num_replicas: int = 1  # that take calls


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a call went, and what was foreseen of it there. `replica`: the `engine` label of its metrics."""

    replica: str
    num_matched_tokens: int  # of the prompt, in its prefix cache as far as was known
    predicted_ttft_s: float | None  # None while no replica's speed is known
    decided_s: float | None = None  # time.monotonic()
    # The best replicas of that decision, best first: "replica", "num_matched_tokens", "ttft_s" and "cost_s".
    candidates: tuple[Mapping[str, Any], ...] = ()


class Backend(Protocol):
    """Replicas of one model."""

    async def predict(self, call: GenerateCall) -> Prediction | None:
        """None where nobody can know: no replica is up, or none has computed enough yet."""
        ...

    def placement(self, call: GenerateCall) -> Placement | None:
        """Known from the moment the call is on its way until it is over."""
        ...

    def generate(self, call: GenerateCall) -> AsyncGenerator[list[RequestOutput], None]:
        """Outputs of an engine step, or of several, for this call's samples, until every sample has finished.

        Closing the generator, or cancelling the task that reads it, aborts what still runs. Raises RequestError for
        a call that cannot be served as asked, ReplicaUnavailableError when nobody can serve it now, and
        ReplicaFailedError, which is one, when its replica failed: no output has the finish reason ERROR.
        """
        ...

    async def check_health(self) -> None:
        """Raise ReplicaUnavailableError if no replica is ready."""
        ...


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A model under the name that clients use. `created`: Unix time in seconds; `vocab_size`: rows of the embedding;
    `is_speculative`: its replicas draft."""

    name: str
    tokenizer: Tokenizer
    max_model_len: int
    vocab_size: int
    created: int
    backend: Backend
    is_speculative: bool = False


__all__ = [
    "Backend",
    "GenerateCall",
    "Placement",
    "Prediction",
    "ReplicaFailedError",
    "ReplicaUnavailableError",
    "ServedModel",
]
