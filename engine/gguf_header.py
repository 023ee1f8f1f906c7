"""The header of a GGUF file as plain values: metadata, and where its tensors' entries begin. Standard library only.

Written here because `gguf.GGUFReader` keeps every string of a vocabulary as numpy views: opening a file with 49
thousand tokens took it 3.0 s and 190 MB, this 0.1 s. Format: the GGUF specification of ggml, versions 2 and 3, little
endian.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from shoal.engine.config import ConfigError

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_STRING, _ARRAY = 8, 9
_SCALARS: Mapping[int, str] = {
    0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d",
}  # fmt: skip

_CONTROL = 3  # the token type of control tokens

# Converters name one end of text; chat models also end a turn with one of these (llama.cpp's list).
_END_TOKENS = frozenset(
    ("<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<end_of_turn>", "<|endoftext|>", "<|eom_id|>", "<EOT>",
     "<|end_of_text|>", "<end_of_utterance>")
)  # fmt: skip


def read_gguf_metadata(path: str | Path) -> dict[str, Any]:
    """All metadata of a GGUF file by key; arrays are lists. Raises ConfigError as `open_gguf_header` does."""
    with open_gguf_header(Path(path)) as (metadata, _, _):
        return metadata


@contextmanager
def open_gguf_header(path: Path) -> Iterator[tuple[dict[str, Any], int, GgufCursor]]:
    """(metadata, number of tensors, a cursor at their entries). Valid inside the `with` block.

    Raises ConfigError for a file that is missing, no GGUF, of another version, truncated or damaged.
    """
    try:
        with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
            if data[:4] != _MAGIC:
                raise ConfigError(f"{path} is not a GGUF file: it starts with {data[:4]!r} instead of {_MAGIC!r}")
            cursor = GgufCursor(data, len(_MAGIC))
            version = cursor.scalar("I")
            if version not in _VERSIONS:
                raise ConfigError(f"{path} is GGUF version {version}: versions 2 and 3, little-endian, can be read")
            num_tensors, num_keys = cursor.scalar("Q"), cursor.scalar("Q")
            metadata = {cursor.string(): cursor.value(cursor.scalar("I")) for _ in range(num_keys)}
            yield metadata, num_tensors, cursor
    except FileNotFoundError as error:
        raise ConfigError(f"{path} does not exist: give the path of a .gguf file or a model directory") from error
    except (OSError, struct.error, IndexError, OverflowError, MemoryError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is truncated or damaged in its header ({error}): download it again") from error
    except ValueError as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{path} is not a GGUF file ({error}): download it again") from error


class GgufCursor:
    """Reads little-endian values one after the other."""

    def __init__(self, data: mmap.mmap, position: int) -> None:
        self.data = data
        self.position = position

    def scalar(self, code: str) -> Any:
        (value,) = struct.unpack_from("<" + code, self.data, self.position)
        self.position += struct.calcsize("<" + code)
        return value

    def string(self) -> str:
        length = self.scalar("Q")
        end = self.position + length
        if end > len(self.data):
            raise IndexError(f"a string of {length} bytes at {self.position}")
        text = self.data[self.position : end].decode("utf-8")
        self.position = end
        return text

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            return self._array()
        if kind not in _SCALARS:
            raise IndexError(f"value type {kind} at {self.position}")
        return self.scalar(_SCALARS[kind])

    def _array(self) -> list[Any]:
        kind, length = self.scalar("I"), self.scalar("Q")
        if length > len(self.data):
            raise IndexError(f"an array of {length} values at {self.position}")
        if kind not in _SCALARS:
            return [self.value(kind) for _ in range(length)]
        form = f"<{length}{_SCALARS[kind]}"
        values = list(struct.unpack_from(form, self.data, self.position))
        self.position += struct.calcsize(form)
        return values


def end_of_text_ids(metadata: Mapping[str, Any]) -> tuple[int, ...]:
    """Tokens that end a generation: those the metadata names, and control tokens known to end a turn."""
    keys = ("eos_token_id", "eot_token_id", "eom_token_id")
    named = [metadata[f"tokenizer.ggml.{key}"] for key in keys if f"tokenizer.ggml.{key}" in metadata]
    tokens, types = metadata.get("tokenizer.ggml.tokens") or (), metadata.get("tokenizer.ggml.token_type") or ()
    if not named and metadata.get("tokenizer.ggml.model") == "llama":
        named = [2]  # a sentencepiece vocabulary that names none has <unk> <s> </s> first
    by_text = [
        index
        for index, (token, kind) in enumerate(zip(tokens, types, strict=False))
        if kind == _CONTROL and token in _END_TOKENS
    ]
    return tuple(dict.fromkeys(index for index in (*named, *by_text) if not tokens or index < len(tokens)))
