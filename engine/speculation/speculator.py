"""How many guesses are worth their time: as many as raise tokens per second. Standard library only."""

from __future__ import annotations

import time
from collections.abc import Sequence

from shoal.engine.config import SpeculativeOptions
from shoal.engine.request import Request, RequestId
from shoal.engine.speculation.acceptance import Acceptance
from shoal.engine.speculation.draft_model import DraftModelProposer, DraftRounds
from shoal.engine.speculation.proposer import Draft, Proposer
from shoal.engine.step_time import StepTime, StepTimeFit, StepWork

MARGIN = 1.1  # what a draft must be worth: the estimates are not exact, and a loss is worse than a gain missed
# Before it was measured: what one more token costs, of a step without any.
NOMINAL_TOKEN_COST = 0.1
NOMINAL = StepTime(base=1.0, per_prefill_token=0.0, per_decode_token=NOMINAL_TOKEN_COST, per_context_token=0.0)
DECODE_INPUT = StepWork._fields.index("num_decode")
DRAFT_ROUND_INPUT = StepWork._fields.index("num_draft_rounds")
PATIENCE = 8  # steps without a draft worth its time, after which steps are planned ahead again
CHEAP = 0.01  # of a step
PROPOSE_MEMORY = 32  # steps
PROBE_PERIOD = 64  # steps planned ahead, after which one is not, to see whether drafts would be worth it


class Speculator:
    """Chooses drafts so that the expected tokens of a step over its expected seconds are the most.

    A draft that is right with probability s (if it and all before it are) brings s tokens and costs the time c of one
    more token in the step. With E tokens and T seconds so far it pays if s / c > E / T; as s only falls along a draft,
    taking drafts by falling s until one does not pay is optimal. With E = (1 - a^(g+1)) / (1 - a) for a constant chance
    a this is the known trade-off of Leviathan et al. 2023 (arXiv:2211.17192), over a batch that shares one step.

    All proposals are compared with what came, those that were not verified too. So acceptance is known without trying.
    Proposing takes time as well, of the thread that plans. It is measured, and what drafts gain has to outweigh it;
    where they have not for a while and it takes more than a hundredth of a step, it is only tried now and then.
    """

    def __init__(
        self,
        options: SpeculativeOptions,
        proposer: Proposer,
        step_time: StepTimeFit,
        draft_round_cost: float = 0.0,
    ) -> None:
        """draft_round_cost: of a step, what one token of the draft model costs before that was measured."""
        self._options = options
        self._proposer = proposer
        self._step_time = step_time
        self._draft_round_cost = draft_round_cost
        self._drafted = proposer if isinstance(proposer, DraftModelProposer) else None
        self._rounds = DraftRounds(options.num_speculative_tokens)
        self._acceptance = Acceptance()
        self._proposed: dict[RequestId, Draft] = {}  # in the last step of each request
        self._num_idle = 0  # steps since drafts were worth their time
        self._propose_s = 0.0  # for a request, of late

    @property
    def wants_tokens(self) -> bool:
        """Whether the next plan should wait until the tokens are known that it has to guess from."""
        return self._drafted is not None or self._is_hopeful

    @property
    def _is_hopeful(self) -> bool:
        return self._num_idle < PATIENCE or self._num_idle % PROBE_PERIOD == 0

    def choose(self, requests: Sequence[Request], num_decode: int, most: int) -> dict[RequestId, tuple[int, ...]]:
        """Drafts for those of `requests` for which they pay, `most` tokens in all. `requests` are planned for one token
        in this step, which is known, and so are others: `num_decode` in all.
        """
        if num_decode == 0:
            return {}
        self._num_idle += 1
        plain_seconds, cost = self._costs(num_decode, requests)
        price = self._propose_s * len(requests) if self._options.adaptive else 0.0
        if cost * num_decode > plain_seconds or (price > CHEAP * plain_seconds and not self._is_hopeful):
            return {}  # not even a certain draft would pay, or it is too unlikely
        start = time.perf_counter()
        guesses = self._guesses(requests, least=cost * num_decode / plain_seconds if plain_seconds else 0.0)
        if requests:
            self._propose_s += ((time.perf_counter() - start) / len(requests) - self._propose_s) / PROPOSE_MEMORY
        seconds, tokens = plain_seconds, float(num_decode)
        counts: dict[RequestId, int] = {}
        for negative, index, request_id in sorted(guesses)[:most]:
            if -negative * seconds < cost * tokens:
                break
            counts[request_id] = index + 1
            tokens -= negative
            seconds += cost
        if not counts or tokens * plain_seconds < num_decode * (seconds + price):
            return {}
        self._num_idle = 0
        return {request_id: self._proposed[request_id].token_ids[:count] for request_id, count in counts.items()}

    def _guesses(self, requests: Sequence[Request], least: float) -> list[tuple[float, int, RequestId]]:
        """What is proposed, as (-survival, index in the draft, request), where the survival is at least `least`."""
        guesses = []
        for request in requests:
            limit = min(self._options.num_speculative_tokens, request.max_known - request.num_known - 1)
            draft = self._proposer.propose(request, limit)
            if not draft.token_ids:
                continue
            self._proposed[request.request_id] = draft
            survival = 1.0
            for index, chance in enumerate(self._acceptance.chances(request.request_id, draft.levels)):
                survival *= chance
                if survival < least:
                    break
                guesses.append((-survival, index, request.request_id))
        return guesses

    def _costs(self, num_decode: int, requests: Sequence[Request]) -> tuple[float, float]:
        """Seconds of a step with `num_decode` tokens, and of a token more in it. Both 0: all drafts pay."""
        if not self._options.adaptive:
            return 0.0, 0.0
        step = self._step_time.estimate() or NOMINAL
        num_context = sum([request.num_known for request in requests])
        if not (seconds := step.seconds(0, num_decode, num_context)):  # all that was seen is explained by prompts
            step, seconds = NOMINAL, NOMINAL.seconds(0, num_decode, num_context)
        if step is NOMINAL or self._step_time.has_varied(DECODE_INPUT):
            return seconds, MARGIN * step.per_decode_token
        return seconds, MARGIN * seconds * NOMINAL_TOKEN_COST / (1.0 + NOMINAL_TOKEN_COST * num_decode)

    def choose_rounds(self, requests: Sequence[Request]) -> dict[RequestId, int]:
        """How many tokens the draft model shall guess behind what this step samples, for those of `requests`, which all
        sample, for which that pays. Nothing without a draft model.
        """
        if self._drafted is None or not requests:
            return {}
        if not self._options.adaptive:
            most = self._options.num_speculative_tokens
            limits = {each.request_id: min(most, each.max_known - each.num_known - 2) for each in requests}
            return {request_id: limit for request_id, limit in limits.items() if limit > 0}
        seconds, token_cost = self._costs(len(requests), requests)
        step = self._step_time.estimate()
        has_varied = step is not None and self._step_time.has_varied(DRAFT_ROUND_INPUT)
        round_cost = step.per_draft_round if step is not None and has_varied else self._draft_round_cost * seconds
        return self._rounds.choose(requests, self._acceptance, seconds, token_cost, MARGIN * round_cost)

    def take_guesses(self, request: Request, draft_ids: tuple[int, ...]) -> None:
        """Those of the draft model, to follow the known tokens of a request that goes on."""
        if self._drafted is not None:
            self._drafted.take(request, draft_ids)

    def observe(self, request: Request, token_ids: Sequence[int]) -> None:
        """A step gave these tokens to a request that `choose` saw when it was planned."""
        draft = self._proposed.pop(request.request_id, None)
        if draft is not None:
            self._acceptance.observe(request.request_id, draft, token_ids)

    def forget(self, request: Request) -> None:
        """The request is over."""
        self._proposed.pop(request.request_id, None)
        self._acceptance.forget(request.request_id)
        self._proposer.forget(request)
