"""What a checkpoint says about its tokenizer, whichever format it came in, and how its tokens are spelled."""

from __future__ import annotations

import enum
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import tokenizers

SPACE_MARK = "\u2581"  # sentencepiece writes a space as ▁
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class Spelling(enum.Enum):
    """How a vocabulary entry stands for bytes."""

    BYTE_LEVEL = "byte_level"  # one printable character per byte (GPT-2)
    SENTENCEPIECE = "sentencepiece"  # ▁ for a space, <0xAB> for a byte
    WORDS = "words"  # whole words, joined by spaces


@dataclass(frozen=True, slots=True)
class TokenizerParts:
    """A tokenizer as loaded. `special_tokens` are what a chat template may name: bos_token, eos_token, ..."""

    backend: tokenizers.Tokenizer
    spelling: Spelling
    strips_first_space: bool  # encoding puts a space before the text, decoding takes it away
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None
    chat_template: str | None
    special_tokens: Mapping[str, str] = field(default_factory=dict)


def byte_alphabet() -> dict[str, int]:
    """GPT-2's printable character for each of the 256 bytes (Radford et al. 2019, `bytes_to_unicode`)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    alphabet = {chr(byte): byte for byte in printable}
    return alphabet | {chr(256 + index): byte for index, byte in enumerate(others)}


def spell(piece: str, spelling: Spelling, alphabet: Mapping[str, int]) -> bytes:
    """The bytes that a vocabulary entry stands for."""
    if spelling is Spelling.BYTE_LEVEL:
        try:
            return bytes([alphabet[char] for char in piece])
        except KeyError:  # a control token, written as plain text
            return piece.encode()
    if spelling is Spelling.WORDS:
        return b" " + piece.encode()
    if match := _BYTE_TOKEN.fullmatch(piece):
        return bytes([int(match[1], 16)])
    return piece.replace(SPACE_MARK, " ").encode()
