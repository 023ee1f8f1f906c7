"""Texts that must not be generated, as the tokens that they would be."""

from __future__ import annotations

from dataclasses import replace

from shoal.engine.request import SamplingParams
from shoal.engine.tokenizer.tokenizer import Tokenizer


def with_bad_words(params: SamplingParams, tokenizer: Tokenizer) -> SamplingParams:
    """`params` with the tokens of its bad_words: of each as it begins a text and as it follows a space. Raises
    RequestError.

    A word that comes about in other tokens than the tokenizer's own is not seen.
    """
    if not params.bad_words:
        return params
    words = dict.fromkeys(
        tuple(tokenizer.encode(prefix + word.lstrip(), add_special_tokens=False))
        for word in params.bad_words
        for prefix in ("", " ")
    )
    return replace(params, bad_words_token_ids=(*params.bad_words_token_ids, *words))
