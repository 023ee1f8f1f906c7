"""What the autoscaler looks at: each replica's work, as numbers that travel through Ray Serve's metrics."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields

from shoal.engine.load import EngineLoad


@dataclass(slots=True)
class PromptCounter:
    """What the prompts of one replica have cost it. Only grows."""

    prompts_total: int = 0
    uncached_tokens_total: int = 0
    uncached_tokens_squared_total: int = 0

    def observe(self, num_uncached: int) -> None:
        """A prompt is computed, and so many of its tokens were not found in the cache."""
        self.prompts_total += 1
        self.uncached_tokens_total += num_uncached
        self.uncached_tokens_squared_total += num_uncached * num_uncached


@dataclass(frozen=True, slots=True)
class ReplicaSignals:
    """One replica at one moment. `_total` values only grow."""

    prefill_backlog_tokens: float  # of prompts that wait or are being computed
    prefill_tokens_per_s: float  # beside what it decodes now; 0 until it is learned
    prompts_total: float
    uncached_tokens_total: float
    uncached_tokens_squared_total: float  # each prompt's uncached tokens, squared
    kv_usage: float  # share of the KV blocks that requests hold
    slot_usage: float  # share of max_running_requests that run
    num_running: float
    num_waiting: float
    predicted_ttft_s: float  # of a prompt of mean length that comes now

    @classmethod
    def of(cls, load: EngineLoad, prompts: PromptCounter) -> ReplicaSignals:
        backlog = sum(tokens for _, tokens in load.prefills) + load.more_prefill_tokens
        token_s = load.prompt_token_s(load.step_time) if load.step_time is not None else 0.0
        rate = 1.0 / token_s if token_s > 0 else 0.0
        mean = prompts.uncached_tokens_total / prompts.prompts_total if prompts.prompts_total else 0.0
        return cls(
            prefill_backlog_tokens=backlog,
            prefill_tokens_per_s=rate,
            prompts_total=prompts.prompts_total,
            uncached_tokens_total=prompts.uncached_tokens_total,
            uncached_tokens_squared_total=prompts.uncached_tokens_squared_total,
            kv_usage=1.0 - load.num_free_blocks / load.num_blocks,
            slot_usage=load.num_running / load.max_running_requests,
            num_running=load.num_running,
            num_waiting=load.num_waiting,
            predicted_ttft_s=load.slot_wait_s() + ((backlog + mean) / rate if rate else 0.0),
        )

    @classmethod
    def from_stats(cls, stats: Mapping[str, float]) -> ReplicaSignals:
        """Back from `stats()`. Raises KeyError for one that is missing."""
        return cls(**{field.name: stats[field.name] for field in fields(cls)})

    def stats(self) -> dict[str, float]:
        """As Ray Serve wants them of `record_autoscaling_stats`."""
        return {name: float(value) for name, value in asdict(self).items()}

    @property
    def arrived_tokens(self) -> float:
        """Uncached prompt tokens that have come so far."""
        return self.uncached_tokens_total + self.prefill_backlog_tokens
