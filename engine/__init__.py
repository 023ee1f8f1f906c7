"""One replica: from token ids to token ids. Knows nothing of Ray or HTTP.

from shoal.engine import LLM, SamplingParams
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from shoal.engine.request import SamplingParams

if TYPE_CHECKING:
    from shoal.engine.llm import LLM

__all__ = ["LLM", "SamplingParams"]


def __getattr__(name: str) -> Any:
    # LLM brings torch; the host half must import without it.
    if name == "LLM":
        from shoal.engine.llm import LLM

        return LLM
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
