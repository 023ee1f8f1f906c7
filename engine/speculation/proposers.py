"""From options to a proposer. Standard library only."""

from __future__ import annotations

from shoal.engine.config import SpeculativeOptions
from shoal.engine.speculation.draft_model import DraftModelProposer
from shoal.engine.speculation.ngram import NgramProposer
from shoal.engine.speculation.proposer import Proposer
from shoal.engine.speculation.suffix import SuffixProposer


def make_proposer(options: SpeculativeOptions) -> Proposer:
    if options.method == "draft_model":
        return DraftModelProposer()
    if options.method == "ngram":
        return NgramProposer(options.prompt_lookup_min, options.prompt_lookup_max)
    return SuffixProposer(options.prompt_lookup_min, options.suffix_history_tokens)
