"""Routing policies: each ranks the replicas of one model for one request, best first.

A custom policy is a class of this protocol, named in the YAML as "package.module:Class". It is made once per gateway
and model, with the keys of `routing.options` as arguments, and called under the router's lock: it must not wait.
"""

from __future__ import annotations

import importlib
import random
from bisect import bisect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, Final, NamedTuple, Protocol, overload

from shoal.cluster.routing.cost import Estimate, added_seconds, estimate
from shoal.cluster.routing.load import ReplicaLoad
from shoal.engine.config import ConfigError
from shoal.engine.memory.kv_layout import blocks_needed
from shoal.engine.request import BlockHash

DEFAULT_POLICY: Final = "prefix_aware"


@dataclass(frozen=True, slots=True)
class RoutedRequest:
    """What a policy may know of a request.

    block_hashes: of the prompt's full blocks, without the one that holds its last token: that token is always computed.
    expected_output: tokens that it will probably generate.
    eviction_tokens: expected recomputation for each block that this request pushes out of a cache.
    session: what the client says belongs together; "" if it says nothing.
    """

    request_id: str
    prompt_ids: Sequence[int]
    num_prompt: int
    block_size: int
    block_hashes: Sequence[BlockHash]
    expected_output: float = 0.0
    eviction_tokens: float = 0.0
    session: str = ""


@dataclass(slots=True)
class Target:
    """A replica as the router sees it. Policies get them by when they were chosen last, so that a tie goes to the one
    that has waited longest.
    """

    key: str
    slot: int  # in the prefix index
    load: ReplicaLoad


class Matched(dict[int, int]):
    """Leading blocks of a prompt that each slot holds or will hold, for slots that have any.

    pending: how many of them are still to be computed there for another request, for slots where there are such.
    """

    __slots__ = ("pending",)

    def __init__(self, blocks: Mapping[int, int], pending: Mapping[int, int] | None = None) -> None:
        super().__init__(blocks)
        self.pending = pending or {}


class Ranked(NamedTuple):
    target: Target
    estimate: Estimate | None  # None: this policy counts no seconds


class Policy(Protocol):
    """Ranks replicas.

    The first of the answer gets the request. If it has no room, Serve tries the others in their order; what is left out
    of the answer comes last.
    """

    def rank(
        self, request: RoutedRequest, targets: Sequence[Target], matched: Matched, now: float
    ) -> Sequence[Ranked]: ...


def estimate_for(request: RoutedRequest, target: Target, matched: Matched, now: float) -> Estimate:
    num_blocks, block_size = matched.get(target.slot, 0), request.block_size
    needed = blocks_needed(request.num_prompt + int(request.expected_output), block_size)
    return estimate(
        target.load,
        request.num_prompt,
        num_blocks * block_size,
        matched.pending.get(target.slot, 0) * block_size,
        needed - num_blocks,
        request.eviction_tokens,
        now,
    )


class PrefixAware:
    """The least cost in seconds (cost.py)."""

    def rank(self, request: RoutedRequest, targets: Sequence[Target], matched: Matched, now: float) -> Sequence[Ranked]:
        num_prompt, block_size, eviction_tokens = request.num_prompt, request.block_size, request.eviction_tokens
        needed = blocks_needed(num_prompt + int(request.expected_output), block_size)
        blocks, pending = matched.get, matched.pending.get
        parts = []
        for target in targets:
            slot = target.slot
            num_blocks = blocks(slot, 0)
            parts.append(
                added_seconds(
                    target.load,
                    num_prompt - num_blocks * block_size,
                    pending(slot, 0) * block_size,
                    needed - num_blocks,
                    eviction_tokens,
                    now,
                )
            )
        return _ByCost(request, targets, matched, parts)


class _ByCost(Sequence[Ranked]):
    """Replicas by what they cost, as Ranked values that are made when somebody looks: few of many ever are."""

    def __init__(
        self,
        request: RoutedRequest,
        targets: Sequence[Target],
        matched: Matched,
        parts: Sequence[tuple[float, float, float]],
    ) -> None:
        self._request = request
        self._targets = targets
        self._matched = matched
        self._parts = parts
        costs = [ttft + delay + eviction for ttft, delay, eviction in parts]
        self._order = sorted(range(len(costs)), key=costs.__getitem__)

    def __len__(self) -> int:
        return len(self._order)

    @overload
    def __getitem__(self, place: int) -> Ranked: ...

    @overload
    def __getitem__(self, place: slice) -> Sequence[Ranked]: ...

    def __getitem__(self, place: int | slice) -> Ranked | Sequence[Ranked]:
        if isinstance(place, slice):
            return [self._make(index) for index in self._order[place]]
        return self._make(self._order[place])

    def _make(self, index: int) -> Ranked:
        request, target = self._request, self._targets[index]
        num_matched = self._matched.get(target.slot, 0) * request.block_size
        return Ranked(target, Estimate(*self._parts[index], num_matched, request.num_prompt - num_matched))


class RoundRobin:
    """The one that was chosen longest ago."""

    def rank(self, request: RoutedRequest, targets: Sequence[Target], matched: Matched, now: float) -> Sequence[Ranked]:
        return [Ranked(target, None) for target in targets]


class LeastLoaded:
    """The shortest queue of prompt tokens, then the fewest requests."""

    def rank(self, request: RoutedRequest, targets: Sequence[Target], matched: Matched, now: float) -> Sequence[Ranked]:
        return [Ranked(target, None) for target in sorted(targets, key=_load_key)]


def _load_key(target: Target) -> tuple[float, int]:
    return target.load.backlog, target.load.num_open


class PowerOfTwo:
    """The one with fewer requests of two drawn at random (Mitzenmacher 2001)."""

    def __init__(self, seed: int | None = None) -> None:
        self._random = random.Random(seed)

    def rank(self, request: RoutedRequest, targets: Sequence[Target], matched: Matched, now: float) -> Sequence[Ranked]:
        two = self._random.sample(targets, min(2, len(targets)))
        return [Ranked(target, None) for target in sorted(two, key=lambda target: target.load.num_open)]


class ConsistentHash:
    """One replica for each session, most of which stay where they are when replicas come and go (Karger et al. 1997).

    Requests without a session are kept together by the first tokens of their prompts.
    """

    def __init__(self, num_virtual_nodes: int = 100, num_prefix_tokens: int = 256) -> None:
        self._num_virtual_nodes = num_virtual_nodes
        self._num_prefix_tokens = num_prefix_tokens
        self._keys: tuple[str, ...] = ()
        self._ring: list[tuple[int, int]] = []  # (point, index of the target)

    def rank(self, request: RoutedRequest, targets: Sequence[Target], matched: Matched, now: float) -> Sequence[Ranked]:
        targets = sorted(targets, key=lambda target: target.key)
        keys = tuple(target.key for target in targets)
        if keys != self._keys:
            self._keys = keys
            self._ring = sorted(
                (_point(f"{key}#{number}"), index)
                for index, key in enumerate(keys)
                for number in range(self._num_virtual_nodes)
            )
        name = request.session or repr(tuple(request.prompt_ids[: self._num_prefix_tokens]))
        place = bisect(self._ring, (_point(name), -1))
        order = dict.fromkeys(index for _, index in (*self._ring[place:], *self._ring[:place]))
        return [Ranked(targets[index], None) for index in order]


def _point(text: str) -> int:
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "big")


POLICIES: Mapping[str, Callable[..., Policy]] = {
    "prefix_aware": PrefixAware,
    "round_robin": RoundRobin,
    "least_loaded": LeastLoaded,
    "power_of_two": PowerOfTwo,
    "consistent_hash": ConsistentHash,
}


def make_policy(name: str, options: Mapping[str, Any] | None = None) -> Policy:
    """The policy of that name, or of the class that "package.module:Class" names. Raises ConfigError."""
    maker: Any = POLICIES.get(name)
    if maker is None:
        module, colon, attribute = name.partition(":")
        if not colon:
            raise ConfigError(
                f"there is no routing policy {name!r}: use one of {', '.join(POLICIES)}, "
                f"or name a class of your own as package.module:Class",
                field="routing",
            )
        try:
            maker = getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError) as error:
            raise ConfigError(f"the routing policy {name!r} cannot be imported: {error}", field="routing") from None
    try:
        policy: Policy = maker(**(options or {}))
    except TypeError as error:
        raise ConfigError(
            f"the routing policy {name!r} does not take these options: {error}", field="routing"
        ) from None
    if not callable(getattr(policy, "rank", None)):
        raise ConfigError(f"the routing policy {name!r} has no method rank()", field="routing")
    return policy
