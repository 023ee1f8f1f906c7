"""Logits processors: what a request's settings do to its row of logits before the draw."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from shoal.engine.request import SamplingParams


@dataclass(slots=True)
class TokenCounts:
    """What the penalties need to know of a request's tokens."""

    in_prompt: Tensor  # [vocab] bool
    in_output: Tensor  # [vocab] float32 counts

    @classmethod
    def of(cls, token_ids: Tensor, num_prompt_tokens: int, vocab_size: int) -> TokenCounts:
        """token_ids: [known tokens] int64."""
        device = token_ids.device
        in_prompt = torch.zeros(vocab_size, dtype=torch.bool, device=device)
        in_prompt[token_ids[:num_prompt_tokens]] = True
        counts = torch.bincount(token_ids[num_prompt_tokens:], minlength=vocab_size).to(torch.float32)
        return cls(in_prompt, counts)

    def add(self, token: int) -> None:
        self.in_output[token] += 1


class LogitsProcessor:
    """Bias, penalties and the tokens banned until min_tokens, for one request. Made only for requests that need it."""

    def __init__(
        self,
        params: SamplingParams,
        eos_token_ids: tuple[int, ...],
        token_ids: Tensor,
        num_prompt: int,
        vocab: int,
    ) -> None:
        """token_ids: [known tokens] int64, with `num_prompt` prompt tokens in front."""
        self._params = params
        self.counts = TokenCounts.of(token_ids, num_prompt, vocab) if params.has_penalties else None
        device = token_ids.device
        self._bias_ids = torch.tensor(list(params.logit_bias), dtype=torch.int64, device=device)  # [biased]
        self._bias = torch.tensor(list(params.logit_bias.values()), dtype=torch.float32, device=device)  # [biased]
        early = set(params.stop_token_ids) | (set() if params.ignore_eos else set(eos_token_ids))
        # [banned] tokens that must not come before min_tokens
        self._early_ids = torch.tensor(sorted(early), dtype=torch.int64, device=device)

    @staticmethod
    def is_needed(params: SamplingParams) -> bool:
        return bool(params.has_penalties or params.logit_bias or params.min_tokens)

    def apply(self, logits: Tensor, num_output: int) -> None:
        """Change `logits` [vocab] float32 in place; `num_output` tokens have been generated before this one."""
        params = self._params
        if self.counts is not None:
            self._penalise(logits, self.counts)
        if len(self._bias):
            logits.index_add_(0, self._bias_ids, self._bias)
        if num_output < params.min_tokens:
            logits.index_fill_(0, self._early_ids, float("-inf"))

    def _penalise(self, logits: Tensor, counts: TokenCounts) -> None:
        params = self._params
        if params.repetition_penalty != 1.0:  # CTRL (Keskar et al. 2019, arXiv 1909.05858)
            seen = counts.in_prompt | (counts.in_output > 0)  # [vocab]
            scaled = torch.where(logits > 0, logits / params.repetition_penalty, logits * params.repetition_penalty)
            logits.copy_(torch.where(seen, scaled, logits))
        if params.frequency_penalty:
            logits.sub_(counts.in_output, alpha=params.frequency_penalty)
        if params.presence_penalty:
            logits.sub_((counts.in_output > 0).to(logits.dtype), alpha=params.presence_penalty)
