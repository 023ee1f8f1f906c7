"""The tokenizer of a model: text to token ids, token ids to text, messages to a prompt."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from shoal.engine.request import RequestError
from shoal.engine.tokenizer.chat_template import ChatTemplate, Message
from shoal.engine.tokenizer.directory import load_directory_tokenizer
from shoal.engine.tokenizer.gguf_vocabulary import load_gguf_tokenizer
from shoal.engine.tokenizer.parts import TokenizerParts, byte_alphabet, spell


class Tokenizer:
    """Encodes and decodes for one model. Safe to share between threads; imports neither torch nor transformers.

    Text that looks like a special token ("<|im_end|>") is encoded as that token, in chats too. vLLM and transformers
    do the same; who serves strangers' words inside a fixed prompt must filter such text.
    """

    def __init__(self, parts: TokenizerParts) -> None:
        self._backend = parts.backend
        self._strips_first_space = parts.strips_first_space
        added = parts.backend.get_added_tokens_decoder()
        self._special_ids = frozenset(index for index, token in added.items() if token.special)
        pieces = parts.backend.get_vocab(with_added_tokens=True)
        self._bytes = [b""] * (max(pieces.values(), default=-1) + 1)  # by token id
        alphabet = byte_alphabet()
        for piece, index in pieces.items():
            self._bytes[index] = spell(piece, parts.spelling, alphabet)
        for index, token in added.items():
            self._bytes[index] = token.content.encode()
        self._max_token_bytes = max(map(len, self._bytes), default=1)
        self._visible_bytes = [b"" if i in self._special_ids else data for i, data in enumerate(self._bytes)]
        self.eos_token_ids: tuple[int, ...] = parts.eos_token_ids
        self.bos_token_id: int | None = parts.bos_token_id
        self._chat_template = ChatTemplate(parts.chat_template, parts.special_tokens) if parts.chat_template else None

    @classmethod
    def load(cls, path: str) -> Tokenizer:
        """The tokenizer of a model directory or a .gguf file.

        Raises ConfigError, with the way out, if there is none or it is of an unknown kind.
        """
        is_gguf = Path(path).suffix.lower() == ".gguf"
        return cls(load_gguf_tokenizer(path) if is_gguf else load_directory_tokenizer(path))

    @property
    def vocab_size(self) -> int:
        """Number of token ids known here; a model may have more rows in its embedding."""
        return len(self._bytes)

    @property
    def max_token_bytes(self) -> int:
        """Bytes of the longest token: n bytes of text are at least n / max_token_bytes tokens."""
        return self._max_token_bytes

    @property
    def has_chat_template(self) -> bool:
        return self._chat_template is not None

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text. `add_special_tokens`: with the begin-of-text token, if the model wants one.

        Releases the GIL, so that long texts can be encoded in a thread. Raises RequestError for lone surrogates.
        """
        try:
            ids: list[int] = self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids
        except TypeError as error:  # how tokenizers refuses a str that has no UTF-8 form
            raise RequestError(
                "the text holds half of a surrogate pair, which is no character", param="prompt"
            ) from error
        return ids

    def render_chat(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **template_kwargs: Any,
    ) -> str:
        """The prompt that the model's chat template makes of `messages`.

        Raises RequestError if the model has no template or the template refuses the messages.
        """
        if self._chat_template is None:
            raise RequestError(
                "this model has no chat template: use /v1/completions with the prompt in the model's own format",
                param="messages",
            )
        return self._chat_template.render(
            messages, add_generation_prompt=add_generation_prompt, tools=tools, variables=template_kwargs
        )

    def encode_chat(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **template_kwargs: Any,
    ) -> list[int]:
        """Token ids of `render_chat`; the template writes the begin-of-text token itself."""
        text = self.render_chat(messages, add_generation_prompt=add_generation_prompt, tools=tools, **template_kwargs)
        return self.encode(text, add_special_tokens=False)

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """The text of token ids. Bytes that are no UTF-8 become U+FFFD; ids outside the vocabulary are left out."""
        data = b"".join(self.text_bytes(index, skip_special_tokens) for index in ids)
        if self._strips_first_space:
            data = data.removeprefix(b" ")
        return data.decode("utf-8", errors="replace")

    def text_bytes(self, index: int, skip_special_tokens: bool) -> bytes:
        """What one token adds to a text."""
        table = self._visible_bytes if skip_special_tokens else self._bytes
        return table[index] if 0 <= index < len(table) else b""

    def token_bytes(self, index: int) -> bytes:
        """The exact bytes of one token; special tokens are written out. Empty outside the vocabulary."""
        return self.text_bytes(index, skip_special_tokens=False)

    def token_str(self, index: int) -> str:
        """One token as text; bytes that are no UTF-8 on their own become U+FFFD."""
        return self.token_bytes(index).decode("utf-8", errors="replace")

    def token_piece(self, index: int) -> str:
        """One token as its vocabulary spells it ("Ġthe", "▁the")."""
        return self._backend.id_to_token(index) or ""

    def is_special(self, index: int) -> bool:
        return index in self._special_ids

    @property
    def strips_first_space(self) -> bool:
        """Decoding takes away the space that encoding put before the text."""
        return self._strips_first_space
