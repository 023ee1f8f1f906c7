"""Text to token ids and back: tokenizer, chat template, incremental detokenizer. Never imports torch."""

from shoal.engine.tokenizer.detokenizer import IncrementalDetokenizer
from shoal.engine.tokenizer.tokenizer import Tokenizer

__all__ = ["IncrementalDetokenizer", "Tokenizer"]
