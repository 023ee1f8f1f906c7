"""`shoal why`: where the time of a request went, from a server's admin port."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import Any, Final
from urllib.parse import quote

from shoal.cluster.commands.client import ServerError, get_json

WIDTH: Final = 48  # of the bars, in characters
LIMIT: Final = 20
_MIN_SHARE: Final = 0.002  # of the request, for a span to have a line
_MANY: Final = 6  # spans of one name, from which on they share a line


def why(url: str, request_id: str | None, *, is_json: bool = False) -> int:
    """Print the explanation of a request, or without an id the slowest ones; exit code 1 if there is none."""
    url = url.rstrip("/")
    try:
        if request_id is None:
            found = get_json(f"{url}/debug/requests?limit={LIMIT}")
            lines = _list(found["slowest"])
        else:
            found = get_json(f"{url}/debug/requests/{quote(request_id, safe='')}")
            lines = chart(found)
    except ServerError as error:
        print(f"shoal: error: {error}", file=sys.stderr)
        return 1
    print(json.dumps(found, indent=2) if is_json else "\n".join(lines))
    return 0


def chart(timeline: dict[str, Any]) -> Iterator[str]:
    """A timeline in words and bars."""
    total = timeline["seconds"]
    first = f", first token after {_seconds(timeline['ttft_s'])}" if timeline["ttft_s"] is not None else ""
    yield (
        f"{timeline['request_id']}: {timeline['model']}, {timeline['outcome']} with status {timeline['status']} "
        f"after {_seconds(total)}{first}"
    )
    yield (
        f"  {timeline['num_prompt_tokens']} prompt tokens ({timeline['num_cached_tokens']} cached), "
        f"{timeline['num_output_tokens']} generated, {timeline['num_preemptions']} preemptions"
    )
    yield ""
    yield from (f"  {sentence}" for sentence in timeline["explanation"])
    yield ""
    for depth, span in _lines(timeline["spans"], total, 0):
        yield f"  {'  ' * depth + span['name']:<18} {_bar(span, total)} {_seconds(span['end_s'] - span['start_s'])}"


def _lines(spans: list[dict[str, Any]], total: float, depth: int) -> Iterator[tuple[int, dict[str, Any]]]:
    for span in _together(spans):
        if span["end_s"] - span["start_s"] >= _MIN_SHARE * total:
            yield depth, span
            yield from _lines(list(span["spans"]), total, depth + 1)


def _together(spans: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Many chunks in one line."""
    names = [span["name"] for span in spans]
    shown: dict[str, dict[str, Any]] = {}
    for index, span in enumerate(spans):
        count = names.count(span["name"])
        key = span["name"] if count >= _MANY else str(index)
        if key in shown:
            shown[key] |= {"end_s": max(shown[key]["end_s"], span["end_s"])}
        else:
            shown[key] = {**span, "name": f"{span['name']} x{count}", "spans": []} if count >= _MANY else span
    return list(shown.values())


def _bar(span: dict[str, Any], total: float) -> str:
    scale = WIDTH / total if total > 0 else 0.0
    start = min(int(span["start_s"] * scale), WIDTH - 1)
    end = max(start + 1, min(round(span["end_s"] * scale), WIDTH))
    return f"|{' ' * start}{'#' * (end - start)}{' ' * (WIDTH - end)}|"


def _list(timelines: list[dict[str, Any]]) -> Iterator[str]:
    if not timelines:
        yield "no request has ended lately"
    for one in timelines:
        yield f"{_seconds(one['seconds']):>8}  {one['request_id']}  {one['model']}  {one['reason']}"


def _seconds(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1000:.1f} ms"
