"""How a choice looks in either API, whole and as a chunk, with its log-probabilities."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Literal, Protocol

from shoal.cluster.gateway.generation import ChoiceDelta, TokenReport
from shoal.cluster.gateway.responses import (
    ChatAnswer,
    ChatChoice,
    ChatChunkChoice,
    ChatDelta,
    ChatLogprobs,
    CompletionChoice,
    CompletionLogprobs,
    TokenLogprob,
    TopLogprob,
)
from shoal.engine.tokenizer import Tokenizer

# JSON has no infinity; OpenAI shows this for a token that cannot come.
_LEAST_LOGPROB = -9999.0


class Format(Protocol):
    """One API's way to write choices."""

    id_prefix: str
    object: Literal["chat.completion", "text_completion"]
    chunk_object: str

    def choice(self, whole: ChoiceDelta) -> ChatChoice | CompletionChoice: ...

    def chunk_choice(self, delta: ChoiceDelta) -> ChatChunkChoice | CompletionChoice: ...


class ChatFormat:
    """Choices of /v1/chat/completions."""

    id_prefix: str = "chatcmpl-"
    object: Literal["chat.completion", "text_completion"] = "chat.completion"
    chunk_object: str = "chat.completion.chunk"

    def __init__(self, tokenizer: Tokenizer, *, has_logprobs: bool) -> None:
        self._tokenizer: Final = tokenizer
        self._has_logprobs: Final = has_logprobs

    def choice(self, whole: ChoiceDelta) -> ChatChoice:
        assert whole.finish_reason is not None, whole
        return ChatChoice(whole.index, ChatAnswer(whole.text), self._logprobs(whole.tokens), whole.finish_reason)

    def chunk_choice(self, delta: ChoiceDelta) -> ChatChunkChoice:
        shown = ChatDelta(
            role="assistant" if delta.is_first else None,
            content=delta.text if delta.text or delta.is_first else None,
        )
        return ChatChunkChoice(delta.index, shown, self._logprobs(delta.tokens), delta.finish_reason)

    def _logprobs(self, tokens: Sequence[TokenReport]) -> ChatLogprobs | None:
        if not self._has_logprobs:
            return None
        return ChatLogprobs([self._token(token) for token in tokens])

    def _token(self, token: TokenReport) -> TokenLogprob:
        reported = token.logprobs
        return TokenLogprob(
            token=token_text(self._tokenizer, token.token_id),
            logprob=max(reported.logprob, _LEAST_LOGPROB),
            bytes=list(self._tokenizer.token_bytes(token.token_id)),
            top_logprobs=[
                TopLogprob(
                    token=token_text(self._tokenizer, index),
                    logprob=max(logprob, _LEAST_LOGPROB),
                    bytes=list(self._tokenizer.token_bytes(index)),
                )
                for index, logprob in zip(reported.top_ids, reported.top_logprobs, strict=True)
            ],
        )


class CompletionFormat:
    """Choices of /v1/completions. `echoes`: what each prompt's choices begin with; empty for nothing."""

    id_prefix: str = "cmpl-"
    object: Literal["chat.completion", "text_completion"] = "text_completion"
    chunk_object: str = "text_completion"

    def __init__(
        self, tokenizer: Tokenizer, *, num_logprobs: int | None, num_samples: int, echoes: Sequence[str]
    ) -> None:
        self._tokenizer: Final = tokenizer
        self._num_logprobs: Final = num_logprobs
        self._num_samples: Final = num_samples
        self._echoes: Final = echoes

    def choice(self, whole: ChoiceDelta) -> CompletionChoice:
        return self.chunk_choice(whole)

    def chunk_choice(self, delta: ChoiceDelta) -> CompletionChoice:
        echo = self._echoes[delta.index // self._num_samples] if self._echoes and delta.is_first else ""
        return CompletionChoice(delta.index, echo + delta.text, self._logprobs(delta.tokens), delta.finish_reason)

    def _logprobs(self, tokens: Sequence[TokenReport]) -> CompletionLogprobs | None:
        if self._num_logprobs is None:
            return None
        return CompletionLogprobs(
            tokens=[token_text(self._tokenizer, token.token_id) for token in tokens],
            token_logprobs=[max(token.logprobs.logprob, _LEAST_LOGPROB) for token in tokens],
            top_logprobs=[self._top(token) for token in tokens] if self._num_logprobs else None,
            text_offset=[token.text_offset for token in tokens],
        )

    def _top(self, token: TokenReport) -> dict[str, float]:
        """The likeliest tokens and the sampled one, which OpenAI adds where it is not among them."""
        reported = token.logprobs
        pairs = [*zip(reported.top_ids, reported.top_logprobs, strict=True), (token.token_id, reported.logprob)]
        return {token_text(self._tokenizer, index): max(logprob, _LEAST_LOGPROB) for index, logprob in pairs}


def token_text(tokenizer: Tokenizer, index: int) -> str:
    """A token as text; one that holds part of a character as OpenAI shows it, "bytes:\\xf0\\x9f"."""
    data = tokenizer.token_bytes(index)
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
