"""Token ids to text while they arrive: whole characters only, and never a piece of a stop string."""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from shoal.engine.request import SamplingParams
from shoal.engine.tokenizer.tokenizer import Tokenizer

_MAX_CHAR_BYTES = 4


class IncrementalDetokenizer:
    """The text of one generation. Concatenating what `push` and `finish` return gives all of it.

    Tokens are turned into bytes, not into text, so each is looked at once: bytes of an unfinished character wait in a
    UTF-8 decoder, and text that may yet become a stop string waits until it cannot. A stop string counts from the
    token after the first `min_tokens` on (it may begin before), and the one that is complete first wins; if two are
    complete with the same character, the longer.

    After each `push`, `token_offsets` holds where in the generated text its tokens begin (characters).
    """

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int], params: SamplingParams) -> None:
        self._tokenizer = tokenizer
        self._skip_special = params.skip_special_tokens
        self._min_tokens = params.min_tokens
        self._keep_stop = params.include_stop_str_in_output
        # The longest first, so that it wins when several are complete with one character.
        self._stops = [_StopString(text) for text in sorted(set(params.stop), key=len, reverse=True)]
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._at_start = self._start_after(prompt_ids)
        self._held = ""
        self._num_chars = 0
        self._num_tokens = 0
        self.stop_string: str | None = None
        self.token_offsets: list[int] = []

    @property
    def is_stopped(self) -> bool:
        """Whether a stop string was found; nothing is added to the text after that."""
        return self.stop_string is not None

    @property
    def num_tokens_used(self) -> int:
        """Output tokens pushed so far, up to and including the one that completed a stop string."""
        return self._num_tokens

    def push(self, token_ids: Sequence[int], *, ends_with_stop_token: bool = False) -> str:
        """Text that is certain now that these tokens have come.

        `ends_with_stop_token`: the last one ended the generation (end of text, or one of `stop_token_ids`); it is
        counted, and shown only with `include_stop_str_in_output`.
        """
        self.token_offsets = []
        ready: list[str] = []
        hidden = len(token_ids) - 1 if ends_with_stop_token and not self._keep_stop else None
        for position, index in enumerate(token_ids):
            if self.is_stopped:
                break
            self.token_offsets.append(self._num_chars)
            self._num_tokens += 1
            data = b"" if position == hidden else self._tokenizer.text_bytes(index, self._skip_special)
            if data and self._at_start:
                data = data.removeprefix(b" ")
                self._at_start = False
            ready.append(self._add(self._decoder.decode(data)))
        return "".join(ready)

    def finish(self) -> str:
        """What was held back, once no more tokens come."""
        if self.is_stopped:
            return ""
        ready = self._add(self._decoder.decode(b"", final=True))
        if not self.is_stopped:
            ready, self._held = ready + self._held, ""
        return ready

    def _start_after(self, prompt_ids: Sequence[int]) -> bool:
        """Take in a character that the prompt left unfinished; return whether the text begins here."""
        tail = b""
        for index in reversed(prompt_ids):
            tail = self._tokenizer.text_bytes(index, self._skip_special) + tail
            if len(tail) >= _MAX_CHAR_BYTES:
                break
        self._decoder.decode(tail)
        return self._tokenizer.strips_first_space and not tail

    def _add(self, text: str) -> str:
        """Take in new text; return what may be shown."""
        start = self._num_chars - len(self._held)  # of the held text
        self._held += text
        if not self._stops:
            self._num_chars += len(text)
            ready, self._held = self._held, ""
            return ready
        for char in text:
            self._num_chars += 1
            if stop := self._advance(char):
                self.stop_string = stop
                end = self._num_chars - start
                ready = self._held[: end if self._keep_stop else end - len(stop)]
                self._held = ""
                return ready
        num_held = max(stop.num_matched for stop in self._stops)
        cut = len(self._held) - num_held
        ready, self._held = self._held[:cut], self._held[cut:]
        return ready

    def _advance(self, char: str) -> str | None:
        """Move every stop string on by one character; the one that is complete with it, if any."""
        complete = [stop.text for stop in self._stops if stop.advance(char)]
        return complete[0] if complete and self._num_tokens > self._min_tokens else None


class _StopString:
    """How much of one stop string the text ends with (Knuth, Morris and Pratt 1977): constant work per character."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.num_matched = 0
        self._fallback = [0] * len(text)  # by matched characters - 1: how many still match after a mismatch
        matched = 0
        for i in range(1, len(text)):
            while matched and text[i] != text[matched]:
                matched = self._fallback[matched - 1]
            matched += text[i] == text[matched]
            self._fallback[i] = matched

    def advance(self, char: str) -> bool:
        """Take in one character; true if the text now ends with the whole stop string."""
        while self.num_matched and char != self.text[self.num_matched]:
            self.num_matched = self._fallback[self.num_matched - 1]
        self.num_matched += char == self.text[self.num_matched]
        if self.num_matched < len(self.text):
            return False
        self.num_matched = self._fallback[-1]
        return True
