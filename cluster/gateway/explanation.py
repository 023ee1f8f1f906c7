"""A timeline in words: what took the time of a request, the longest first."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Final

from shoal.cluster.gateway.timeline import Timeline, TimelineSpan

_MIN_SECONDS: Final = 0.001
_MIN_SHARE: Final = 0.01
_OUTCOMES: Final = {
    "client_gone": "The client left before its answer was over.",
    "failed": "It failed: the log has the reason under its request id.",
}
_OBSTACLES: Final = {
    "blocks": "KV memory was full",
    "slots": "as many requests ran as may run at once",
    "tokens": "the steps were full of other requests' tokens",
    "step": "its own last step was not over",
    "prompt": "another sample computed the prompt that they share",
}


def explain(timeline: Timeline) -> list[str]:
    """One sentence for each cause that took at least 1 % and 1 ms of the request, the longest first."""
    total = timeline.seconds
    causes = sorted(_causes(timeline), key=lambda cause: -cause[0])
    shown = [(seconds, text) for seconds, text in causes if seconds >= max(_MIN_SECONDS, _MIN_SHARE * total)]
    sentences = [f"{_seconds(seconds)} of {_seconds(total)}: {text}" for seconds, text in shown]
    if timeline.outcome == "refused":
        sentences.insert(0, f"It was refused with status {timeline.status}.")
    elif timeline.outcome in _OUTCOMES:
        sentences.insert(0, _OUTCOMES[timeline.outcome])
    return sentences


def _causes(timeline: Timeline) -> Iterator[tuple[float, str]]:
    calls = [span for span in timeline.spans if span.name == "call"]
    for span in timeline.spans:
        match span.name:
            case "auth":
                yield (
                    span.seconds,
                    "in the gateway before it was taken up, which checked its key or was busy",
                )
            case "read":
                yield span.seconds, "reading the body from the client"
            case "tokenize":
                yield span.seconds, f"making {_count(timeline.num_prompt_tokens, 'token')} of the prompt"
            case "answer":
                yield span.seconds, "from the last token to the end of the answer"
    if calls:
        slowest = max(calls, key=lambda call: call.end_s)
        among = f", of the slowest of {len(calls)} prompts" if len(calls) > 1 else ""
        for seconds, text in _call_causes(slowest):
            yield seconds, text + among


def _call_causes(call: TimelineSpan) -> Iterator[tuple[float, str]]:
    replica = call.attributes.get("replica", "?")
    by_name: dict[str, list[TimelineSpan]] = {}
    for span in call.spans:
        by_name.setdefault(span.name, []).append(span)
    for span in by_name.get("held", ()):
        about = span.attributes
        ahead = f"{_count(about['num_ahead'], 'call')} of {_count(about['num_tenants_ahead'], 'tenant')}"
        yield span.seconds, f"held in the gateway, {ahead} were there already"
    for span in by_name.get("route", ()):
        yield span.seconds, f"choosing replica {replica}"
    for span in by_name.get("send", ()):
        yield span.seconds, f"on the way to replica {replica}"
    for span in by_name.get("queue", ()):
        about = span.attributes
        yield (
            span.seconds,
            f"waiting in replica {replica}, {about['num_ahead']} ahead of it and {about['num_running']} running"
            + _held_up(about["waits_s"]),
        )
    if chunks := by_name.get("prefill"):
        yield (
            _extent(chunks),
            f"prefill of {_work(chunks)}; {chunks[0].attributes['num_cached_tokens']} more were cached",
        )
    if chunks := by_name.get("recompute"):
        yield sum(map(_own, chunks)), f"computing {_work(chunks)} again after a preemption"
    if gone := by_name.get("preempted"):
        times = "once" if len(gone) == 1 else f"{len(gone)} times"
        yield sum(map(_own, gone)), f"preempted {times}{_held_up(_sum_waits(gone)) or ': KV memory was full'}"
    if decoding := by_name.get("decode"):
        yield sum(map(_own, decoding)), _decoding(decoding)
    known = ("held", "route", "send", "queue", "prefill", "recompute", "preempted", "decode")
    rest = call.seconds - _covered(span for span in call.spans if span.name in known)
    yield rest, "not told by the replica" if not by_name.get("queue") else "between the gateway and the replica"


def _decoding(spans: list[TimelineSpan]) -> str:
    num_tokens = sum(span.attributes["num_tokens"] for span in spans)
    num_steps = sum(span.attributes["num_steps"] for span in spans)
    num_accepted = sum(span.attributes["num_accepted_drafts"] for span in spans)
    seconds = sum(map(_own, spans))
    longest = max(spans, key=_own)
    text = f"{_count(num_tokens, 'token')} after the first, in {_count(num_steps, 'step')}"
    if num_accepted:
        text += f" ({num_accepted} were accepted drafts)"
    if num_steps:
        text += f" of {_seconds(seconds / num_steps)}"
    if batch := longest.attributes.get("mean_batch"):
        text += f", with {batch:.3g} requests in a step"
    return text + _ranks(longest)


def _ranks(span: TimelineSpan) -> str:
    """Who was waited for, where ranks tell."""
    shares = {}
    for rank in span.spans:
        busy_s, wait_s = rank.attributes["compute_s"], rank.attributes["wait_s"]
        if busy_s + wait_s > 0:
            shares[rank.name] = busy_s / (busy_s + wait_s)
    if len(shares) < 2:
        return ""
    busiest, idlest = max(shares, key=shares.__getitem__), min(shares, key=shares.__getitem__)
    return f"; {busiest} computed {shares[busiest]:.0%} of its time, {idlest} {shares[idlest]:.0%}"


def _held_up(waits_s: dict[str, float]) -> str:
    parts = [
        f"{_OBSTACLES[name]} ({_seconds(seconds)})"
        for name, seconds in sorted(waits_s.items(), key=lambda wait: -wait[1])
        if seconds >= _MIN_SECONDS
    ]
    return f": {', '.join(parts)}" if parts else ""


def _sum_waits(spans: list[TimelineSpan]) -> dict[str, float]:
    waits: dict[str, float] = {}
    for span in spans:
        for name, seconds in span.attributes["waits_s"].items():
            waits[name] = waits.get(name, 0.0) + seconds
    return waits


def _work(chunks: list[TimelineSpan]) -> str:
    num_tokens = sum(chunk.attributes["num_tokens"] for chunk in chunks)
    return f"{_count(num_tokens, 'token')} in {_count(sum(c.attributes['num_steps'] for c in chunks), 'chunk')}"


def _own(span: TimelineSpan) -> float:
    """Seconds of a span that several may have become."""
    seconds: Any = span.attributes.get("seconds", span.seconds)
    return float(seconds)


def _extent(spans: list[TimelineSpan]) -> float:
    return max(span.end_s for span in spans) - min(span.start_s for span in spans)


def _covered(spans: Iterable[TimelineSpan]) -> float:
    """Seconds that at least one of them is about, chunks with what lies between them."""
    total, end = 0.0, float("-inf")
    for span in sorted(spans, key=lambda span: span.start_s):
        total += max(0.0, span.end_s - max(span.start_s, end))
        end = max(end, span.end_s)
    return total


def _count(number: int, word: str) -> str:
    return f"{number:,} {word}{'' if number == 1 else 's'}"


def _seconds(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds >= 1 else f"{seconds * 1000:.3g} ms"
