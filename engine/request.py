"""A request: what one user generation asks for, and how far it has come. Standard library only."""

from __future__ import annotations

import enum
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from operator import add
from typing import Literal, NamedTuple, NewType

from shoal.engine.spans import Obstacle, Span, Tally, Trace

RequestId = NewType("RequestId", str)
BlockId = NewType("BlockId", int)
BlockHash = NewType("BlockHash", bytes)

MAX_LOGPROBS = 20  # OpenAI's limit for top_logprobs
MAX_STOPS = 16
MAX_BAD_WORDS = 256
MAX_N = 64
MAX_BEAMS = 10  # so that MAX_LOGPROBS tokens of each beam hold all that can go on or end


class RequestError(ValueError):
    """A request that cannot be served as asked. `param` is the field's name in the API."""

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.code = code


class FinishReason(enum.Enum):
    STOP = "stop"  # end of text, a stop token or a stop string
    LENGTH = "length"  # max_tokens or max_model_len reached
    ABORT = "abort"  # the client went away
    ERROR = "error"  # the replica failed


# What changes the probabilities or the text that beam search looks for, with the values that do not.
_NEUTRAL_FOR_BEAMS: Mapping[str, tuple[object, ...]] = {
    "temperature": (0.0, 1.0),
    "top_k": (0, -1),
    "top_p": (1.0,),
    "min_p": (0.0,),
    "min_tokens": (0,),
    "presence_penalty": (0.0,),
    "frequency_penalty": (0.0,),
    "repetition_penalty": (1.0,),
    "logit_bias": ({},),
    "stop": ((),),
    "bad_words": ((),),
    "bad_words_token_ids": ((),),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How tokens are chosen and when a generation ends. Field meanings follow OpenAI's and vLLM's APIs.

    max_tokens: None means up to the model's length. temperature 0 is greedy. top_k 0 and top_p 1 are off.
    repetition_penalty divides (or multiplies, when negative) the logits of tokens seen in prompt or output;
    presence and frequency penalties look at the output only. logprobs: how many alternatives to report beside the
    sampled token; None reports nothing. Log-probabilities are of the model's own distribution, before penalties,
    bias, temperature and truncation. seed None: drawn when the request enters.

    bad_words: texts that are not generated; bad_words_token_ids: the same as tokens, of each of which the last one is
    banned where the others were generated just before. Fronts, which have a tokenizer, add those of bad_words.

    best_of: samples that are generated, of which the `n` with the highest mean log-probability per token are answered,
    best first. use_beam_search: the `n` best of `best_of` beams instead, as transformers' `generate` finds them with
    num_beams=best_of. Either answers at its end only. Hypotheses are ranked by log-probability / tokens **
    length_penalty. early_stopping: True ends the search with the first `best_of` hypotheses, False where no beam would
    be among the best `best_of` if it ended now, "never" where none can get there.
    """

    max_tokens: int | None = 16
    min_tokens: int = 0
    n: int = 1
    best_of: int | None = None
    use_beam_search: bool = False
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    stop: Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    bad_words: Sequence[str] = ()
    bad_words_token_ids: Sequence[Sequence[int]] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False

    def __post_init__(self) -> None:
        # Lists and single strings are what users write; the frozen value keeps tuples.
        object.__setattr__(self, "stop", (self.stop,) if isinstance(self.stop, str) else tuple(self.stop))
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))
        words = (self.bad_words,) if isinstance(self.bad_words, str) else tuple(self.bad_words)
        object.__setattr__(self, "bad_words", words)
        object.__setattr__(self, "bad_words_token_ids", tuple(map(tuple, self.bad_words_token_ids)))
        object.__setattr__(self, "logit_bias", dict(self.logit_bias))
        self._check()

    def _check(self) -> None:
        bounds: tuple[tuple[str, float, float], ...] = (
            ("min_tokens", 0, math.inf),
            ("n", 1, MAX_N),
            ("length_penalty", -10.0, 10.0),
            ("temperature", 0.0, 100.0),
            ("top_p", 0.0, 1.0),
            ("min_p", 0.0, 1.0),
            ("presence_penalty", -2.0, 2.0),
            ("frequency_penalty", -2.0, 2.0),
            ("top_k", -1, 2**31 - 1),
        )
        for name, low, high in bounds:
            value = getattr(self, name)
            if not low <= value <= high:  # also false for NaN
                raise RequestError(f"{name} must be between {low:g} and {high:g}, got {value}", param=name)
        if self.top_p <= 0.0:
            raise RequestError(f"top_p must be above 0, got {self.top_p}", param="top_p")
        if self.max_tokens is not None and self.max_tokens < 1:
            raise RequestError(f"max_tokens must be at least 1, got {self.max_tokens}", param="max_tokens")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise RequestError(
                f"min_tokens {self.min_tokens} is more than max_tokens {self.max_tokens}", param="min_tokens"
            )
        if not 0.0 < self.repetition_penalty <= 100.0:
            raise RequestError(
                f"repetition_penalty must be above 0 and at most 100, got {self.repetition_penalty}",
                param="repetition_penalty",
            )
        if self.logprobs is not None and not 0 <= self.logprobs <= MAX_LOGPROBS:
            raise RequestError(f"logprobs must be between 0 and {MAX_LOGPROBS}, got {self.logprobs}", param="logprobs")
        if len(self.stop) > MAX_STOPS or any(not s for s in self.stop):
            raise RequestError(f"stop takes at most {MAX_STOPS} non-empty strings", param="stop")
        if len(self.bad_words) > MAX_BAD_WORDS or not all(word.strip() for word in self.bad_words):
            raise RequestError(f"bad_words takes at most {MAX_BAD_WORDS} texts that are not blank", param="bad_words")
        if not all(self.bad_words_token_ids):
            raise RequestError("bad_words_token_ids holds a word without tokens", param="bad_words_token_ids")
        if self.seed is not None and not -(2**63) <= self.seed < 2**64:
            raise RequestError(f"seed must fit in 64 bits, got {self.seed}", param="seed")
        for token, bias in self.logit_bias.items():
            if not -100.0 <= bias <= 100.0:
                raise RequestError(
                    f"logit_bias must be between -100 and 100, got {bias} for token {token}",
                    param="logit_bias",
                )
        if self.best_of is not None and not self.n <= self.best_of <= MAX_N:
            raise RequestError(
                f"best_of must be at least n, which is {self.n}, and at most {MAX_N}, got {self.best_of}",
                param="best_of",
            )
        if not isinstance(self.early_stopping, bool) and self.early_stopping != "never":
            raise RequestError(
                f'early_stopping must be false, true or "never", got {self.early_stopping!r}', param="early_stopping"
            )
        if self.use_beam_search:
            self._check_beams()
        elif self.length_penalty != 1.0 or self.early_stopping is not False:
            name = "length_penalty" if self.length_penalty != 1.0 else "early_stopping"
            raise RequestError(f"{name} is for beam search: set use_beam_search, or leave it out", param=name)

    def _check_beams(self) -> None:
        if self.width > MAX_BEAMS:
            name = self.width_field
            raise RequestError(f"{name} is {self.width}; beam search has at most {MAX_BEAMS} beams", param=name)
        for name, neutral in _NEUTRAL_FOR_BEAMS.items():
            if getattr(self, name) not in neutral:
                raise RequestError(
                    f"beam search looks for what the model itself finds most likely: leave {name} out", param=name
                )

    def check_vocab(self, vocab_size: int) -> None:
        """Raise RequestError if a token id lies outside the vocabulary."""
        words = chain.from_iterable(self.bad_words_token_ids)
        for name, ids in (
            ("logit_bias", self.logit_bias),
            ("stop_token_ids", self.stop_token_ids),
            ("bad_words_token_ids", words),
        ):
            for token in ids:
                if not 0 <= token < vocab_size:
                    raise RequestError(
                        f"{name} names token {token}; this model has tokens 0 to {vocab_size - 1}", param=name
                    )

    @property
    def width(self) -> int:
        """Samples or beams from which the n that are answered are chosen."""
        return self.n if self.best_of is None else self.best_of

    @property
    def width_field(self) -> str:
        return "n" if self.best_of is None else "best_of"

    @property
    def num_samples(self) -> int:
        """Generations that the engine gives for a prompt: it chooses among beams, but not among samples, whose text may
        end earlier than their tokens.
        """
        return self.n if self.use_beam_search else self.width

    @property
    def chooses_samples(self) -> bool:
        """Whether fewer samples are answered than are generated (`best_samples`)."""
        return self.width > self.n and not self.use_beam_search

    @property
    def num_reported(self) -> int | None:
        """Alternatives that the ranks report beside each token, None for no report: what `logprobs` asks for, or what
        it takes to choose.
        """
        if self.use_beam_search:
            return MAX_LOGPROBS
        if self.best_of is None or self.best_of == self.n:
            return self.logprobs
        return self.logprobs or 0

    @property
    def is_greedy(self) -> bool:
        return self.temperature < 1e-5 or self.use_beam_search

    @property
    def has_penalties(self) -> bool:
        return bool(self.presence_penalty or self.frequency_penalty or self.repetition_penalty != 1.0)


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log-probability of a sampled token and of the most likely ones (natural logarithm)."""

    logprob: float
    rank: int  # 1 is the most likely token
    top_ids: tuple[int, ...]
    top_logprobs: tuple[float, ...]


def best_samples(logprobs: Sequence[Sequence[float]], n: int) -> list[int]:
    """Which n of some samples have the highest mean log-probability per token, best first, the first of equal ones.

    logprobs[i] are those of the tokens of sample i that count. By the mean, as OpenAI defines best_of, because by the
    sum the shortest would win.
    """
    means = [math.fsum(sample) / max(len(sample), 1) for sample in logprobs]
    return sorted(range(len(means)), key=lambda index: -means[index])[:n]


@dataclass(frozen=True, slots=True)
class DraftCounts:
    """What became of speculative drafts. accepted_at[i] counts the steps that accepted at least i + 1 drafts."""

    num_steps: int = 0  # in which a request had drafts
    num_drafted: int = 0  # tokens that were guessed and verified
    accepted_at: tuple[int, ...] = ()

    @property
    def num_accepted(self) -> int:
        return sum(self.accepted_at)

    def __add__(self, other: DraftCounts) -> DraftCounts:
        longer, shorter = sorted((self.accepted_at, other.accepted_at), key=len, reverse=True)
        accepted_at = tuple(map(add, longer, shorter)) + longer[len(shorter) :]
        return DraftCounts(self.num_steps + other.num_steps, self.num_drafted + other.num_drafted, accepted_at)

    def plus(self, output: RequestOutput) -> DraftCounts:
        """With what a step gave one request."""
        num_drafted = output.num_drafted
        if not num_drafted:
            return self
        num_accepted = min(num_drafted, len(output.token_ids) - 1)
        return self + DraftCounts(1, num_drafted, (1,) * num_accepted + (0,) * (num_drafted - num_accepted))


NO_DRAFTS = DraftCounts()


@dataclass(frozen=True, slots=True)
class RequestTimes:
    """When a finished request passed each point (time.monotonic() seconds of its replica), and what it used."""

    arrival_s: float
    admitted_s: float | None  # first admission; None if it never got that far
    first_token_s: float | None
    finished_s: float
    num_prompt_tokens: int
    num_output_tokens: int
    num_cached_tokens: int
    num_preemptions: int
    max_tokens: int | None
    spans: tuple[Span, ...] = ()  # what it did in between, by time


@dataclass(frozen=True, slots=True)
class EngineStats:
    """A replica at one moment. `_total` values only grow."""

    num_running: int = 0
    num_waiting: int = 0
    num_blocks: int = 0  # usable KV blocks
    num_free_blocks: int = 0  # free or evictable
    block_size: int = 0
    max_model_len: int = 0
    steps_total: int = 0
    step_seconds_total: float = 0.0
    prompt_tokens_total: int = 0
    cached_tokens_total: int = 0  # of the prompt tokens, found in the prefix cache
    generation_tokens_total: int = 0
    preemptions_total: int = 0
    requests_finished_total: int = 0
    drafts: DraftCounts = NO_DRAFTS
    num_deferred: int = 0  # of those that wait, samples that wait for the prompt that another one computes
    held_seconds_total: Mapping[Obstacle, float] = field(default_factory=dict)  # see `SpanRecorder.held_s`

    @property
    def kv_usage(self) -> float:
        """Share of KV blocks held by running requests, 0 to 1."""
        return 1.0 - self.num_free_blocks / self.num_blocks if self.num_blocks else 0.0


class RequestOutput(NamedTuple):
    """What one step gave one request. Deltas: concatenating `token_ids` gives the whole generation.

    A beam search says with an empty one that its prompt is computed, and all else at its end.
    """

    request_id: RequestId
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] = ()
    finish_reason: FinishReason | None = None
    num_cached_tokens: int = 0  # prompt tokens found in the prefix cache at first admission
    error: str | None = None
    times: RequestTimes | None = None  # with the last output
    num_drafted: int = 0  # drafts that the step verified; it accepted one less than there are token_ids


@dataclass(slots=True, eq=False)
class Request:
    """One user generation on its way through a replica: known tokens, and how many of them have KV.

    `fork_of` names a request with the same prompt: once that one has computed the prompt, this one shares its blocks
    instead of computing the prompt again (parallel sampling). `stream` separates the random numbers of such siblings.
    """

    request_id: RequestId
    prompt_ids: tuple[int, ...]
    params: SamplingParams
    seed: int
    arrival_s: float  # time.monotonic()
    priority: int = 0  # lower goes first
    stream: int = 0
    cache_salt: str = ""
    fork_of: RequestId | None = None
    hypothesis_ids: tuple[RequestId, ...] = ()  # of a beam search: what its n results go by; its own id is the first

    output_ids: list[int] = field(default_factory=list)
    num_known: int = 0  # prompt and output tokens
    num_computed: int = 0  # leading known tokens that have KV
    num_planned: int = 0  # leading tokens that have KV once the steps in flight are over; cached ones while it waits
    num_expected: int = 0  # known tokens, and those that steps in flight sample
    num_sent: int = 0  # leading tokens that the ranks know: they were told, or sampled them for a step that uses them
    arrived_after: int = 0  # prompt tokens to be computed that had come to its scheduler before it
    num_slots: int = 0  # tokens that its blocks have room for
    block_hashes: list[BlockHash] = field(default_factory=list)  # of leading full blocks, as far as they were needed
    last_step: int = 0  # the last step it was planned in
    max_known: int = 0  # ends when this many tokens are known
    end_ids: frozenset[int] = frozenset()  # tokens that end it, once min_tokens are there
    num_cached_tokens: int = 0
    num_preemptions: int = 0
    admitted_s: float | None = None
    first_token_s: float | None = None
    finish_reason: FinishReason | None = None
    mark: Tally | None = None  # where its decoding began; None while what comes before its next token is computed
    trace: Trace = field(default_factory=Trace)

    def __post_init__(self) -> None:
        self.num_known = self.num_expected = len(self.prompt_ids) + len(self.output_ids)

    @property
    def result_ids(self) -> tuple[RequestId, ...]:
        """The ids under which its outputs come."""
        return self.hypothesis_ids or (self.request_id,)

    @property
    def is_finished(self) -> bool:
        return self.finish_reason is not None

    @property
    def num_remaining(self) -> int:
        """Tokens to compute until nothing is left to do but to draw the next one."""
        return self.num_expected - self.num_planned

    @property
    def is_prompt_computed(self) -> bool:
        return self.num_planned >= len(self.prompt_ids)

    def known_ids(self, start: int, end: int) -> tuple[int, ...]:
        """Known tokens in positions [start, end)."""
        split = len(self.prompt_ids)
        if end <= split:
            return self.prompt_ids[start:end]
        if start >= split:
            return tuple(self.output_ids[start - split : end - split])
        return self.prompt_ids[start:] + tuple(self.output_ids[: end - split])


def requests_of(
    sample_ids: tuple[RequestId, ...],
    prompt_ids: tuple[int, ...],
    params: SamplingParams,
    *,
    seed: int,
    arrival_s: float,
    priority: int = 0,
    cache_salt: str = "",
) -> list[Request]:
    """What an engine is given for `params.num_samples` generations of one prompt that go by these ids: a request for
    each, of which the later ones share the first one's prompt blocks, or one for all if it is a beam search.
    """
    request_ids = sample_ids[:1] if params.use_beam_search else sample_ids
    return [
        Request(
            request_id=request_id,
            prompt_ids=prompt_ids,
            params=params,
            seed=seed,
            arrival_s=arrival_s,
            priority=priority,
            stream=stream,
            cache_salt=cache_salt,
            fork_of=sample_ids[0] if stream else None,
            hypothesis_ids=sample_ids if params.use_beam_search else (),
        )
        for stream, request_id in enumerate(request_ids)
    ]
