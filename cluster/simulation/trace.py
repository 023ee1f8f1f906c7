"""What a simulation plays: requests with their arrivals, lengths, and which of their blocks are alike.

Recorded traces hold no text. Mooncake's (Qin et al., arXiv 2407.00079) name the 512-token blocks of each prompt by ids:
an equal id means an equal prompt up to the end of that block. Azure's (Patel et al., arXiv 2311.18677) hold lengths
only, so no two of their requests share anything.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import accumulate, count, islice
from pathlib import Path
from typing import Annotated, Final, Literal

import msgspec

from shoal.engine.config import ConfigError
from shoal.engine.memory.kv_layout import blocks_needed

TraceFormat = Literal["mooncake", "azure"]

MOONCAKE_BLOCK_TOKENS: Final = 512
AZURE_BLOCK_TOKENS: Final = 64  # of our choice: short prompts waste little of a block, long ones have few
_AZURE_COLUMNS: Final = "TIMESTAMP,ContextTokens,GeneratedTokens"


@dataclass(frozen=True, slots=True)
class TracedRequest:
    """One request of a trace.

    block_ids: of the prompt's blocks in order; equal ids mean an equal prompt up to the end of that block. The last
    one may stand for a block that the prompt does not fill.
    session: the same for what belongs to one conversation; "" if that is not known.
    """

    arrival_s: float  # since the first request
    num_prompt: int
    num_output: int
    block_ids: tuple[int, ...]
    session: str = ""


@dataclass(frozen=True, slots=True)
class Trace:
    """Requests in the order of their arrival."""

    name: str
    requests: Sequence[TracedRequest]
    block_tokens: int  # that each block id stands for

    @property
    def num_prompt_tokens(self) -> int:
        return sum(request.num_prompt for request in self.requests)

    def in_blocks_of(self, block_tokens: int) -> Trace:
        """The same requests in blocks of another size. Raises ConfigError unless one size divides the other.

        What two prompts share is known to a block of the trace only, so smaller blocks share no more than that.
        """
        small, large = sorted((block_tokens, self.block_tokens))
        if large % small:
            raise ConfigError(
                f"the trace {self.name} is in blocks of {self.block_tokens} tokens, the replicas of {block_tokens}: "
                f"use block_tokens that divide {self.block_tokens}, or a multiple of it",
                field="block_tokens",
            )
        if small == large:
            return self
        resize = _split if block_tokens == small else _merge
        requests = [
            TracedRequest(r.arrival_s, r.num_prompt, r.num_output, resize(r, small, large), r.session)
            for r in self.requests
        ]
        return Trace(self.name, requests, block_tokens)


def _split(request: TracedRequest, small: int, large: int) -> tuple[int, ...]:
    parts = large // small
    ids = (block * parts + part for block in request.block_ids for part in range(parts))
    return tuple(islice(ids, blocks_needed(request.num_prompt, small)))


def _merge(request: TracedRequest, small: int, large: int) -> tuple[int, ...]:
    """A large block is known by the last small one in it, as that one's id covers everything before it."""
    return request.block_ids[large // small - 1 : request.num_prompt // small : large // small]


def load_trace(path: str | Path, format: TraceFormat | None = None, speed: float = 1.0) -> Trace:
    """Read a trace, `speed` times faster than it was recorded. Without a format, the first line tells it.

    A request that generated nothing is played as one that generated one token: its prompt was computed. Sessions are
    told from the prompts: a follow-up begins with the whole of what it continues. Raises ConfigError, which names the
    line, for anything that cannot be played.
    """
    if not (math.isfinite(speed) and speed > 0):
        raise ConfigError(f"a trace cannot be played {speed:g} times as fast: use a number above 0", field="speed")
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except FileNotFoundError:
        raise ConfigError(f"there is no trace {path}", field="trace") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the trace {path}: {error}", field="trace") from None
    read = {"mooncake": _read_mooncake, "azure": _read_azure}[format or _format_of(path, lines)]
    block_tokens = MOONCAKE_BLOCK_TOKENS if read is _read_mooncake else AZURE_BLOCK_TOKENS
    requests = sorted(read(path, lines), key=lambda request: request.arrival_s)
    if not requests:
        raise ConfigError(f"{path} holds no requests", field="trace")
    first = requests[0].arrival_s
    sessions = _sessions(requests, block_tokens)
    played = [
        TracedRequest((r.arrival_s - first) / speed, r.num_prompt, r.num_output, r.block_ids, session)
        for r, session in zip(requests, sessions, strict=True)
    ]
    return Trace(path.stem, played, block_tokens)


def _format_of(path: Path, lines: Sequence[str]) -> TraceFormat:
    first = lines[0].strip() if lines else ""
    if first.startswith("{"):
        return "mooncake"
    if first.replace(" ", "") == _AZURE_COLUMNS:
        return "azure"
    raise ConfigError(
        f"{path} is no trace that is known here: Mooncake's are lines of JSON with timestamp, input_length, "
        f"output_length and hash_ids, Azure's are CSV with the header {_AZURE_COLUMNS}",
        field="trace",
    )


class _MooncakeLine(msgspec.Struct):
    timestamp: Annotated[float, msgspec.Meta(ge=0)]  # milliseconds
    input_length: Annotated[int, msgspec.Meta(ge=1)]
    output_length: Annotated[int, msgspec.Meta(ge=0)]
    hash_ids: tuple[int, ...]


def _read_mooncake(path: Path, lines: Sequence[str]) -> Iterator[TracedRequest]:
    decoder = msgspec.json.Decoder(_MooncakeLine)
    for number, text in enumerate(lines, 1):
        if not text.strip():
            continue
        try:
            line = decoder.decode(text)
        except msgspec.DecodeError as error:
            raise _bad_line(path, number, str(error)) from None
        whole = blocks_needed(line.input_length, MOONCAKE_BLOCK_TOKENS)
        full = line.input_length // MOONCAKE_BLOCK_TOKENS
        if len(line.hash_ids) not in (full, whole):
            lengths = f"{line.input_length} tokens are {whole} blocks of {MOONCAKE_BLOCK_TOKENS}"
            raise _bad_line(path, number, f"{lengths}, but hash_ids names {len(line.hash_ids)}")
        yield TracedRequest(line.timestamp / 1e3, line.input_length, max(1, line.output_length), line.hash_ids)


def _read_azure(path: Path, lines: Sequence[str]) -> Iterator[TracedRequest]:
    if not lines or lines[0].replace(" ", "") != _AZURE_COLUMNS:
        raise _bad_line(path, 1, f"expected the header {_AZURE_COLUMNS}")
    unused = count()
    for number, text in enumerate(lines[1:], 2):
        if not text.strip():
            continue
        try:
            at, num_prompt, num_output = text.split(",")
            arrival_s = _seconds(at.strip())
            prompt, output = int(num_prompt), int(num_output)
        except ValueError:
            raise _bad_line(path, number, f"expected a time and two numbers as in {_AZURE_COLUMNS}") from None
        if prompt < 1 or output < 0:
            raise _bad_line(path, number, "ContextTokens must be at least 1, and GeneratedTokens at least 0")
        ids = tuple(next(unused) for _ in range(blocks_needed(prompt, AZURE_BLOCK_TOKENS)))
        yield TracedRequest(arrival_s, prompt, max(1, output), ids)


def _seconds(text: str) -> float:
    """Of "2023-11-16 18:15:46.6805900" or the same with an offset; Azure's times are UTC."""
    moment = datetime.fromisoformat(text)
    return (moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC)).timestamp()


def _bad_line(path: Path, number: int, problem: str) -> ConfigError:
    return ConfigError(f"{path}:{number}: {problem}", field="trace")


def _sessions(requests: Sequence[TracedRequest], block_tokens: int) -> Iterator[str]:
    """A session for each request: that of an earlier one whose prompt this one begins with, or a new one.

    Only a prompt whose last full block was new marks its session, so that a common system prompt joins nobody.
    """
    seen: set[int] = set()
    ends: dict[int, str] = {}  # last full block of a prompt -> its session
    for number, request in enumerate(requests):
        full = request.block_ids[: request.num_prompt // block_tokens]
        session = next((ends[block] for block in reversed(full) if block in ends), f"session-{number}")
        if full and full[-1] not in seen:
            ends[full[-1]] = session
        seen.update(full)
        yield session


def shared_prefix_trace(
    *,
    num_requests: int,
    requests_per_s: float,
    num_prefixes: int,
    prefix_tokens: int,
    question_tokens: int,
    output_tokens: int,
    skew: float = 0.0,
    block_tokens: int = 16,
    seed: int = 0,
) -> Trace:
    """Requests that arrive at random (Poisson), each one of `num_prefixes` long prefixes and a question of its own.

    The k-th prefix is asked for with a probability in proportion to k ** -skew (Zipf); 0 makes them alike.
    """
    chance = random.Random(seed)
    weights = list(accumulate(k**-skew for k in range(1, num_prefixes + 1)))
    shared = prefix_tokens // block_tokens  # the block in which the question begins is nobody else's
    num_prompt = prefix_tokens + question_tokens
    own = blocks_needed(num_prompt, block_tokens) - shared
    unused = count(num_prefixes * shared)
    arrivals = accumulate(chance.expovariate(requests_per_s) for _ in range(num_requests))
    requests = []
    for arrival_s in arrivals:
        (prefix,) = chance.choices(range(num_prefixes), cum_weights=weights)
        ids = (*range(prefix * shared, (prefix + 1) * shared), *(next(unused) for _ in range(own)))
        requests.append(TracedRequest(arrival_s, num_prompt, output_tokens, ids, f"prefix-{prefix}"))
    return Trace("shared-prefix", requests, block_tokens)
