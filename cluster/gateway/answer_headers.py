"""What the headers of an answer say about its calls: where they went, what was found there, how long they were held."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Final

from shoal.cluster.gateway.admission import Visit


def _replica(visit: Visit) -> str:
    return visit.placement.replica if visit.placement is not None else ""


def _matched_tokens(visit: Visit) -> str:
    return str(visit.placement.num_matched_tokens) if visit.placement is not None else ""


def _cached_tokens(visit: Visit) -> str:
    return str(visit.num_cached_tokens) if visit.first_s is not None else ""


def _predicted_ttft_ms(visit: Visit) -> str:
    predicted_s = visit.placement.predicted_ttft_s if visit.placement is not None else None
    return f"{predicted_s * 1000:.1f}" if predicted_s is not None else ""


def _queue_ms(visit: Visit) -> str:
    return f"{visit.queue_s * 1000:.1f}"


ANSWER_HEADERS: Final[Mapping[str, Callable[[Visit], str]]] = {
    "x-shoal-replica": _replica,
    "x-shoal-matched-tokens": _matched_tokens,
    "x-shoal-cached-tokens": _cached_tokens,
    "x-shoal-predicted-ttft-ms": _predicted_ttft_ms,
    "x-shoal-queue-ms": _queue_ms,
}


def answer_headers(visits: Sequence[Visit]) -> dict[str, str]:
    """One value for each call, in their order, separated by commas; empty where it is not known (yet).

    A header of which nothing is known is left out.
    """
    values = {name: [value(visit) for visit in visits] for name, value in ANSWER_HEADERS.items()}
    return {name: ",".join(each) for name, each in values.items() if any(each)}
