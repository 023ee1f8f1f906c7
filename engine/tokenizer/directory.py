"""A tokenizer out of a Hugging Face model directory."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import tokenizers

from shoal.engine.config import ConfigError
from shoal.engine.tokenizer.parts import Spelling, TokenizerParts

_TEMPLATE_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


def load_directory_tokenizer(path: str | Path) -> TokenizerParts:
    """The tokenizer in a model directory. Raises ConfigError if there is none or it cannot be used for generation."""
    folder = Path(path)
    backend = _load_backend(folder)
    settings = _read_json(folder / "special_tokens_map.json") | _read_json(folder / "tokenizer_config.json")
    special_tokens = {name: text for name in _TEMPLATE_TOKENS if (text := _token_text(settings.get(name)))}
    spelling, strips_first_space = _spelling(folder, json.loads(backend.to_str()))
    eos_id = backend.token_to_id(special_tokens.get("eos_token", ""))
    configured = (_read_json(folder / name).get("eos_token_id") for name in ("generation_config.json", "config.json"))
    bos_id = backend.token_to_id(special_tokens.get("bos_token", ""))
    return TokenizerParts(
        backend=backend,
        spelling=spelling,
        strips_first_space=strips_first_space,
        eos_token_ids=_unique_ids([eos_id, *configured]),
        bos_token_id=bos_id,
        chat_template=_chat_template(folder, settings),
        special_tokens=special_tokens,
    )


def _load_backend(folder: Path) -> tokenizers.Tokenizer:
    file = folder / "tokenizer.json"
    if file.is_file():
        try:
            return tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # tokenizers raises bare Exception
            raise ConfigError(f"{file} cannot be read ({error}): download it again") from error
    if not folder.is_dir():
        raise ConfigError(f"{folder} does not exist: give a model directory or a .gguf file")
    if not any((folder / name).is_file() for name in ("tokenizer.model", "vocab.json", "spiece.model")):
        raise ConfigError(
            f"{folder} has no tokenizer: put the model's tokenizer.json and tokenizer_config.json next to its weights"
        )
    return _convert_slow(folder)


def _convert_slow(folder: Path) -> tokenizers.Tokenizer:
    # Old formats are converted by transformers, which takes seconds to import and is not needed for the others.
    from transformers import AutoTokenizer

    try:
        backend = AutoTokenizer.from_pretrained(str(folder)).backend_tokenizer
    except Exception as error:  # transformers raises many types here, some of them for missing packages
        raise ConfigError(
            f"the tokenizer in {folder} cannot be converted ({error}): save it as tokenizer.json with "
            "AutoTokenizer.from_pretrained(...).save_pretrained(...)"
        ) from error
    assert isinstance(backend, tokenizers.Tokenizer), type(backend)
    return backend


def _spelling(folder: Path, description: Mapping[str, Any]) -> tuple[Spelling, bool]:
    """How tokens are spelled, and whether decoding strips a first space; read from the decoder's description."""
    decoder: Mapping[str, Any] | None = description.get("decoder")
    if decoder is None:
        return Spelling.WORDS, True
    steps: list[Mapping[str, Any]] = decoder.get("decoders", [decoder])
    kinds = {step["type"] for step in steps}
    if "ByteLevel" in kinds:
        return Spelling.BYTE_LEVEL, False
    if kinds & {"Metaspace", "Replace", "ByteFallback"}:
        scheme = next((step.get("prepend_scheme") for step in steps if step["type"] == "Metaspace"), "never")
        return Spelling.SENTENCEPIECE, "Strip" in kinds or scheme != "never"
    raise ConfigError(
        f"the tokenizer in {folder} decodes with {', '.join(sorted(kinds))}; byte-level and sentencepiece "
        "vocabularies can be served"
    )


def _chat_template(folder: Path, settings: Mapping[str, Any]) -> str | None:
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    template = settings.get("chat_template") or _read_json(folder / "chat_template.json").get("chat_template")
    if isinstance(template, list):  # several named templates
        template = {entry["name"]: entry["template"] for entry in template}.get("default")
    return template if isinstance(template, str) else None


def _token_text(value: Any) -> str | None:
    content = value.get("content") if isinstance(value, dict) else value
    return content if isinstance(content, str) else None


def _unique_ids(values: Iterable[int | list[int] | None]) -> tuple[int, ...]:
    ids: list[int] = []
    for value in values:
        ids += value if isinstance(value, list) else [] if value is None else [value]
    return tuple(dict.fromkeys(ids))


def _read_json(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise ConfigError(f"{file} is not valid JSON ({error}): download it again") from error
    return value if isinstance(value, dict) else {}
