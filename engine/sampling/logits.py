"""Logits processors: what a request's settings do to its row of logits before the draw."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from shoal.engine.request import SamplingParams

_ANY, _NONE = -1, -2  # where a bad word is shorter than others, and where nothing was generated yet


@dataclass(slots=True)
class TokenCounts:
    """What the penalties need to know of a request's tokens. Columns are the rank's part of the vocabulary."""

    start: int  # the token id of the first column
    in_prompt: Tensor  # [columns] bool
    in_output: Tensor  # [columns] float32 counts

    @classmethod
    def of(cls, token_ids: Sequence[int], num_prompt: int, vocab: range, device: torch.device) -> TokenCounts:
        """Of known tokens, the first `num_prompt` of which are the prompt."""
        columns = np.asarray(token_ids, np.int64) - vocab.start  # [known tokens]
        is_here = (columns >= 0) & (columns < len(vocab))
        in_prompt = np.zeros(len(vocab), np.bool_)
        in_prompt[columns[:num_prompt][is_here[:num_prompt]]] = True
        in_output = np.bincount(columns[num_prompt:][is_here[num_prompt:]], minlength=len(vocab)).astype(np.float32)
        return cls(vocab.start, torch.from_numpy(in_prompt).to(device), torch.from_numpy(in_output).to(device))

    def add(self, tokens: Tensor, times: int = 1) -> None:
        """tokens [n] int64, on the device of the counts, which is not waited for."""
        columns = tokens - self.start
        last = len(self.in_output) - 1
        nearest = columns.clamp(0, last)
        self.in_output.index_add_(0, nearest, (nearest == columns).to(torch.float32), alpha=times)


class BadWords:
    """Bans the last token of each word, a sequence of tokens, where the others were generated just before."""

    def __init__(
        self, words: Sequence[Sequence[int]], output_ids: Sequence[int], vocab: range, device: torch.device
    ) -> None:
        """output_ids: what was generated. Columns of the logits are the part `vocab` of the vocabulary."""
        self._num_recent = max(map(len, words)) - 1
        own = [word for word in words if word[-1] in vocab]
        rows = [[_ANY] * (self._num_recent + 1 - len(word)) + list(word[:-1]) for word in own]
        self._before = torch.tensor(rows, dtype=torch.int64, device=device)
        self._before = self._before.view(len(own), self._num_recent)  # [words, recent]
        self._last = torch.tensor([word[-1] - vocab.start for word in own], dtype=torch.int64, device=device)  # [words]
        recent = ([_NONE] * self._num_recent + list(output_ids))[len(output_ids) :]
        self.recent = torch.tensor(recent, dtype=torch.int64, device=device)  # [recent] tokens, the latest at the end

    def apply(self, logits: Tensor) -> None:
        """logits [columns] float32, in place."""
        is_near = ((self._before == _ANY) | (self._before == self.recent)).all(dim=1)  # [words]
        logits.index_add_(0, self._last, torch.where(is_near, -torch.inf, 0.0))

    def add(self, tokens: Tensor) -> None:
        """tokens [n] int64 come next."""
        self.recent = torch.cat((self.recent, tokens))[len(tokens) :]


class LogitsProcessor:
    """Bias, penalties, bad words and the tokens banned until min_tokens, for one request that needs any of it.

    It sees the part `vocab` of the vocabulary, which may end past it. Its state is that after the known tokens; along a
    draft it is advanced by `suppose`, and goes back with `drop_guesses`.
    """

    def __init__(
        self,
        params: SamplingParams,
        eos_token_ids: tuple[int, ...],
        token_ids: Sequence[int],
        num_prompt: int,
        vocab: range,
        device: torch.device,
    ) -> None:
        """token_ids: known tokens, with `num_prompt` prompt tokens in front. Logits will be on `device`."""
        self._params = params
        self._num_counted = len(token_ids)
        self._guesses: list[Tensor] = []  # [1] each
        self._device = device
        self._counts = TokenCounts.of(token_ids, num_prompt, vocab, device) if params.has_penalties else None
        self._bad_words = (
            BadWords(params.bad_words_token_ids, token_ids[num_prompt:], vocab, device)
            if params.bad_words_token_ids
            else None
        )
        self._recent: Tensor | None = None  # before what is supposed
        bias = {token - vocab.start: value for token, value in params.logit_bias.items() if token in vocab}
        self._biased = torch.tensor(list(bias), dtype=torch.int64, device=device)  # [biased] columns
        self._bias = torch.tensor(list(bias.values()), dtype=torch.float32, device=device)  # [biased]
        early = set(params.stop_token_ids) | (set() if params.ignore_eos else set(eos_token_ids))
        columns = sorted(token - vocab.start for token in early if token in vocab)
        self._early = torch.tensor(columns, dtype=torch.int64, device=device)  # [banned] until min_tokens

    @staticmethod
    def is_needed(params: SamplingParams) -> bool:
        return bool(params.has_penalties or params.logit_bias or params.min_tokens or params.bad_words_token_ids)

    def apply(self, logits: Tensor, num_output: int) -> None:
        """Change `logits` [columns] float32 in place; `num_output` tokens have been generated before this one."""
        if self._counts is not None:
            self._penalise(logits, self._counts)
        if len(self._bias):
            logits.index_add_(0, self._biased, self._bias)
        if num_output < self._params.min_tokens:
            logits.index_fill_(0, self._early, float("-inf"))
        if self._bad_words is not None:
            self._bad_words.apply(logits)

    def count(self, token: Tensor) -> None:
        """token [1] int64 was drawn."""
        self._num_counted += 1
        self._add(token)

    def suppose(self, token: int) -> None:
        """The next token is a guess."""
        if not self._guesses and self._bad_words is not None:
            self._recent = self._bad_words.recent
        self._guesses.append(torch.tensor([token], device=self._device))
        self._add(self._guesses[-1])

    def drop_guesses(self) -> None:
        """Back to the known tokens."""
        if not self._guesses:
            return
        if self._counts is not None:
            self._counts.add(torch.cat(self._guesses), -1)
        if self._bad_words is not None and self._recent is not None:
            self._bad_words.recent = self._recent
        self._guesses.clear()

    def learn(self, start: int, token_ids: Sequence[int]) -> None:
        """Known tokens from position `start` on; those that were counted when they were drawn are passed over."""
        if new := token_ids[max(0, self._num_counted - start) :]:
            self._num_counted += len(new)
            self._add(torch.tensor(new, dtype=torch.int64, device=self._device))

    def _add(self, tokens: Tensor) -> None:
        if self._counts is not None:
            self._counts.add(tokens)
        if self._bad_words is not None:
            self._bad_words.add(tokens)

    def _penalise(self, logits: Tensor, counts: TokenCounts) -> None:
        params = self._params
        if params.repetition_penalty != 1.0:  # CTRL (Keskar et al. 2019, arXiv 1909.05858)
            seen = counts.in_prompt | (counts.in_output > 0)  # [columns]
            scaled = torch.where(logits > 0, logits / params.repetition_penalty, logits * params.repetition_penalty)
            logits.copy_(torch.where(seen, scaled, logits))
        if params.frequency_penalty:
            logits.sub_(counts.in_output, alpha=params.frequency_penalty)
        if params.presence_penalty:
            logits.sub_((counts.in_output > 0).to(logits.dtype), alpha=params.presence_penalty)
