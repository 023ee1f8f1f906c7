"""Text to token ids and back: tokenizer, chat template, incremental detokenizer. Never imports torch."""

from shoal.engine.tokenizer.bad_words import with_bad_words
from shoal.engine.tokenizer.detokenizer import IncrementalDetokenizer
from shoal.engine.tokenizer.tokenizer import Tokenizer

__all__ = ["IncrementalDetokenizer", "Tokenizer", "with_bad_words"]
