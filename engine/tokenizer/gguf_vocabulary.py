"""A tokenizer out of GGUF metadata. The reference for what the keys mean is llama.cpp's `llama-vocab.cpp`.

transformers' conversion of the same metadata ignores the digit splitting of SmolLM2 (and every other pre-tokenizer
missing from its table), which changes the token ids of any text with a number in it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from shoal.engine.config import ConfigError
from shoal.engine.gguf_header import end_of_text_ids, read_gguf_metadata
from shoal.engine.tokenizer.parts import SPACE_MARK, Spelling, TokenizerParts

# tokenizer.ggml.token_type
_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4

_GPT2 = (r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",)
_DIGITS_THEN_GPT2 = (r"\p{N}", *_GPT2)
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)
_QWEN2 = (_LLAMA3[0].replace(r"\p{N}{1,3}", r"\p{N}"),)
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)
_GPT4O = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)
_DEEPSEEK3 = (
    r"\p{N}{1,3}",
    r"[一-龥぀-ゟ゠-ヿ]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)
_FALCON = (r"[\p{P}\$\+<=>\^~\|`]+", *_GPT2, r"[0-9][0-9][0-9]")
_DEFAULT = (r"[\p{P}\$\+<=>\^~\|]+", *_GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")

# tokenizer.ggml.pre -> regular expressions that split the text one after the other.
_SPLITS: Mapping[str, tuple[str, ...]] = {
    "default": _DEFAULT,
    **dict.fromkeys(("gpt-2", "phi-2", "mpt", "olmo", "jais", "exaone4", "trillion", "granite-docling"), _GPT2),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone"), _DIGITS_THEN_GPT2),
    "minerva-7b": _DIGITS_THEN_GPT2,
    **dict.fromkeys(("llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0"), _LLAMA3),
    **dict.fromkeys(("lfm2", "dbrx", "smaug-bpe", "glm4", "chatglm-bpe"), _LLAMA3),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "kormo", "megrez", "stablelm2", "hunyuan", "grok-2"), _QWEN2),
    "tekken": _TEKKEN,
    **dict.fromkeys(("gpt-4o", "llama4", "minimax-m2"), _GPT4O),
    **dict.fromkeys(("deepseek-v3", "hunyuan-dense"), _DEEPSEEK3),
    "falcon": _FALCON,
}  # fmt: skip

# In these vocabularies a whole word that is a token stays one, whatever the merges say, and text begins with bos.
_WHOLE_WORDS_FIRST = frozenset(
    ("llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "tekken")
)

_TEMPLATE_TOKENS = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}


def load_gguf_tokenizer(path: str | Path) -> TokenizerParts:
    """The tokenizer inside a GGUF file. Raises ConfigError if there is none, or one of a kind not known here."""
    metadata = read_gguf_metadata(path)
    kind = metadata.get("tokenizer.ggml.model")
    tokens: list[str] | None = metadata.get("tokenizer.ggml.tokens")
    if not kind or not tokens:
        raise ConfigError(f"{path} has no tokenizer in its metadata: use a GGUF file with a vocabulary")
    if kind == "gpt2":
        backend, spelling = _byte_level(path, metadata, tokens), Spelling.BYTE_LEVEL
        bos_by_default = metadata.get("tokenizer.ggml.pre") in _WHOLE_WORDS_FIRST
    elif kind == "llama":
        backend, spelling = _sentencepiece(metadata, tokens), Spelling.SENTENCEPIECE
        bos_by_default = True
    else:
        raise ConfigError(
            f"{path} has a tokenizer of kind {kind!r}; kinds 'gpt2' and 'llama' are supported: "
            "use the model's Hugging Face directory instead"
        )
    _add_whole_tokens(backend, tokens, metadata.get("tokenizer.ggml.token_type") or ())

    ids = _special_ids(metadata, kind, len(tokens))
    bos_id = ids.get("bos_token_id")
    if metadata.get("tokenizer.ggml.add_bos_token", bos_by_default) and bos_id is not None:
        backend.post_processor = processors.TemplateProcessing(
            single=[tokens[bos_id], "$A"], special_tokens=[(tokens[bos_id], bos_id)]
        )
    return TokenizerParts(
        backend=backend,
        spelling=spelling,
        strips_first_space=spelling is Spelling.SENTENCEPIECE and _adds_space(metadata),
        eos_token_ids=end_of_text_ids(metadata),
        bos_token_id=bos_id,
        chat_template=metadata.get("tokenizer.chat_template"),
        special_tokens={name: tokens[ids[key]] for name, key in _TEMPLATE_TOKENS.items() if key in ids},
    )


def _special_ids(metadata: Mapping[str, Any], kind: str, num_tokens: int) -> dict[str, int]:
    """Ids of bos, eos, ... by their key; a sentencepiece vocabulary that names none has <unk> <s> </s> first."""
    defaults = {"bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0} if kind == "llama" else {}
    keys = (*_TEMPLATE_TOKENS.values(), "eot_token_id", "eom_token_id")
    named = {key: metadata[f"tokenizer.ggml.{key}"] for key in keys if f"tokenizer.ggml.{key}" in metadata}
    return {key: index for key, index in (defaults | named).items() if 0 <= index < num_tokens}


def _byte_level(path: str | Path, metadata: Mapping[str, Any], tokens: Sequence[str]) -> Tokenizer:
    pre = metadata.get("tokenizer.ggml.pre", "default")
    if pre not in _SPLITS:
        raise ConfigError(
            f"{path} names the pre-tokenizer {pre!r}, which is not known here (known: {', '.join(sorted(_SPLITS))}): "
            "use the model's Hugging Face directory instead"
        )
    merges: list[str] | None = metadata.get("tokenizer.ggml.merges")
    if merges is None:
        raise ConfigError(f"{path} has no tokenizer.ggml.merges: convert the model again")
    backend = Tokenizer(
        models.BPE(
            vocab={token: index for index, token in enumerate(tokens)},
            merges=[_pair(merge) for merge in merges],
            ignore_merges=pre in _WHOLE_WORDS_FIRST,
        )
    )
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            *(pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in _SPLITS[pre]),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    return backend


def _pair(merge: str) -> tuple[str, str]:
    at = merge.index(" ", 1)
    return merge[:at], merge[at + 1 :]


def _sentencepiece(metadata: Mapping[str, Any], tokens: Sequence[str]) -> Tokenizer:
    # Converted Gemma files spell runs of spaces with real spaces.
    pieces = [SPACE_MARK * len(token) if token.isspace() and set(token) == {" "} else token for token in tokens]
    vocab = {piece: index for index, piece in enumerate(pieces)}
    scores = metadata.get("tokenizer.ggml.scores")
    if scores is None or str(metadata.get("general.architecture", "")).startswith("gemma"):
        # Gemma's scores do not follow its merge order; the order of its pieces does.
        scores = [-float(index) for index in range(len(pieces))]
    stored: list[str] | None = metadata.get("tokenizer.ggml.merges")
    merges = [_pair(merge) for merge in stored] if stored else _merges_from_scores(vocab, scores)
    unknown = metadata.get("tokenizer.ggml.unknown_token_id", 0)
    backend = Tokenizer(
        models.BPE(vocab=vocab, merges=merges, unk_token=pieces[unknown], fuse_unk=True, byte_fallback=True)
    )
    prefix = [normalizers.Prepend(SPACE_MARK)] if _adds_space(metadata) else []
    backend.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", SPACE_MARK)])
    backend.decoder = decoders.Sequence([decoders.Replace(SPACE_MARK, " "), decoders.ByteFallback(), decoders.Fuse()])
    return backend


def _adds_space(metadata: Mapping[str, Any]) -> bool:
    return bool(metadata.get("tokenizer.ggml.add_space_prefix", True))


def _merges_from_scores(vocab: Mapping[str, int], scores: Sequence[float]) -> list[tuple[str, str]]:
    """Every way to build a piece from two others, by the score of the result, best first, as sentencepiece merges."""
    merges = [
        (-scores[index], index, vocab[piece[:cut]], vocab[piece[cut:]], (piece[:cut], piece[cut:]))
        for piece, index in vocab.items()
        for cut in range(1, len(piece))
        if piece[:cut] in vocab and piece[cut:] in vocab
    ]
    merges.sort()
    return [pair for *_, pair in merges]


def _add_whole_tokens(backend: Tokenizer, tokens: Sequence[str], types: Iterable[int]) -> None:
    """Tokens that are matched whole in a text: control ones (hidden in output) and user-defined ones (shown)."""
    special, shown = [], []
    for token, kind in zip(tokens, types, strict=False):
        if kind in (_CONTROL, _UNKNOWN):
            special.append(AddedToken(token, special=True, normalized=False))
        elif kind == _USER_DEFINED and not token.isspace():
            shown.append(AddedToken(token, special=False, normalized=False))
    backend.add_special_tokens(special)
    backend.add_tokens(shown)
