"""Whose request goes next: priority classes, and in each the tenant that was served least.

The Virtual Token Counter of Sheng et al., "Fairness in Serving Large Language Models" (OSDI 2024, arXiv 2401.00588).
Each tenant has a counter of the tokens that were really computed for it, divided by its weight; of those that wait, the
tenant with the smallest counter goes first. One that comes back from idleness is lifted to the smallest counter of
those that wait, so it cannot save up. While two tenants wait all the time, what they got differs by no more than one
prompt and the output of what they have running, whatever they send.

A lower priority number goes first, but a class waits at most `ageing_s` for each level that it is behind, counted
from its last turn: so none starves, and nobody gains by waiting in a long queue of his own.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Final, Generic, TypeVar

from shoal.engine.request import RequestError

FAIRNESS_HEADER: Final = "x-gateway-inference-fairness-id"  # of the Gateway API's inference extension
MAX_TENANT: Final = 256
OUTPUT_WEIGHT: Final = 2.0  # of an output token in prompt tokens, as in the paper
AGEING_S: Final = 30.0
_MAX_IDLE: Final = 1024  # counters kept of tenants that may be idle, before they are looked through

T = TypeVar("T")


def tenant_of(headers: Mapping[str, str]) -> str:
    """Whom a request counts for: who the fairness header says, else a hash of the API key, else "".

    Raises RequestError naming the header.
    """
    name = headers.get(FAIRNESS_HEADER, "")
    if len(name) > MAX_TENANT:
        raise RequestError(f"{FAIRNESS_HEADER} is longer than {MAX_TENANT} characters", param=FAIRNESS_HEADER)
    scheme, _, key = headers.get("authorization", "").partition(" ")
    if name or scheme.lower() != "bearer" or not key:
        return name
    return f"key-{blake2b(key.strip().encode(), digest_size=8).hexdigest()}"


@dataclass(slots=True)
class _Line(Generic[T]):
    """What one tenant has waiting in one class, oldest first. `work_s`: seconds to compute it all."""

    items: OrderedDict[T, float] = field(default_factory=OrderedDict)  # with the seconds of each
    work_s: float = 0.0


@dataclass(slots=True)
class _Class(Generic[T]):
    """`turn_s`: when it was served last, or began to wait."""

    turn_s: float
    lines: dict[str, _Line[T]] = field(default_factory=dict)


class FairQueue(Generic[T]):
    """What waits, each a hashable value. `weights`: of tenants by name, 1 for the others. Times are of one clock."""

    def __init__(self, weights: Mapping[str, float] | None = None, *, ageing_s: float = AGEING_S) -> None:
        self._weights = dict(weights or {})
        self._ageing_s = ageing_s
        self._classes: dict[int, _Class[T]] = {}
        self._places: dict[T, tuple[int, str]] = {}  # class and tenant
        self._num_waiting: dict[str, int] = {}  # of each tenant that waits
        self._counters: dict[str, float] = {}
        self._last = ""  # the tenant that was served last
        self._keep = _MAX_IDLE

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, item: T) -> bool:
        return item in self._places

    @property
    def counters(self) -> Mapping[str, float]:
        """Tokens computed for each tenant by its weight, as far as they are remembered."""
        return self._counters

    @property
    def num_tenants(self) -> int:
        """That have something waiting."""
        return len(self._num_waiting)

    def add(self, item: T, tenant: str, priority: int, work_s: float, now: float) -> None:
        """Wait in line; `work_s` seconds of computing."""
        assert item not in self._places, item
        self._lift(tenant)
        self._num_waiting[tenant] = self._num_waiting.get(tenant, 0) + 1
        if priority not in self._classes:
            self._classes[priority] = _Class(now)
        line = self._classes[priority].lines.setdefault(tenant, _Line())
        line.items[item] = work_s
        line.work_s += work_s
        self._places[item] = priority, tenant

    def first(self) -> T | None:
        """Whose turn it is; None if nobody waits. Linear in the classes and in the tenants that wait."""
        if not self._classes:
            return None
        best = min(self._classes, key=lambda priority: priority * self._ageing_s + self._classes[priority].turn_s)
        lines = self._classes[best].lines
        tenant = min(lines, key=self._counters.__getitem__)
        return next(iter(lines[tenant].items))

    def take(self, item: T, now: float) -> None:
        """It was its turn: it goes."""
        priority, tenant = self._places[item]
        self._classes[priority].turn_s = now
        self.drop(item)
        self._last = tenant

    def drop(self, item: T) -> None:
        """It waits no longer."""
        priority, tenant = self._places.pop(item)
        lines = self._classes[priority].lines
        line = lines[tenant]
        line.work_s -= line.items.pop(item)
        if not line.items:
            del lines[tenant]
            if not lines:
                del self._classes[priority]
        self._num_waiting[tenant] -= 1
        if not self._num_waiting[tenant]:
            del self._num_waiting[tenant]

    def pass_by(self, tenant: str) -> None:
        """A request goes without having to wait."""
        self._lift(tenant)
        self._last = tenant

    def charge(self, tenant: str, tokens: float) -> None:
        """So many prompt tokens, or OUTPUT_WEIGHT times as many output tokens, were computed for it. Negative: fewer
        than were charged before.
        """
        if tenant in self._counters:  # else forgotten as one that is served less than those to come
            self._counters[tenant] += tokens / self._weight(tenant)

    def work_ahead_s(self, tenant: str, priority: int, work_s: float) -> float:
        """Seconds of computing that go before a newcomer with `work_s` of its own.

        All of better classes, all of its tenant's own, and what the others get while its tenant gets that. As if tokens
        were a fluid, all counters equal, and no class aged.
        """
        ahead = 0.0
        for level, one in self._classes.items():
            if level < priority:
                ahead += sum(line.work_s for line in one.lines.values())
            elif level == priority:
                own = one.lines[tenant].work_s if tenant in one.lines else 0.0
                share = (own + work_s) / self._weight(tenant)
                ahead += own + sum(
                    min(line.work_s, share * self._weight(name)) for name, line in one.lines.items() if name != tenant
                )
        return ahead

    def _weight(self, tenant: str) -> float:
        return self._weights.get(tenant, 1.0)

    def _lift(self, tenant: str) -> None:
        """To what those that wait have at least, if it has nothing waiting itself."""
        if tenant in self._num_waiting:
            return
        if len(self._counters) >= self._keep:
            self._forget()
        self._counters[tenant] = max(self._counters.get(tenant, 0.0), self._floor())

    def _floor(self) -> float:
        if self._num_waiting:
            return min(map(self._counters.__getitem__, self._num_waiting))
        return self._counters.get(self._last, 0.0)

    def _forget(self) -> None:
        """Drop the counters of idle tenants that the next lift would raise anyway."""
        floor = self._floor()
        self._counters = {
            tenant: counter
            for tenant, counter in self._counters.items()
            if counter > floor or tenant in self._num_waiting or tenant == self._last
        }
        self._keep = max(_MAX_IDLE, 2 * len(self._counters))
