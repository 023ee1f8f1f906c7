"""What keys may spend, counted over all gateways: a state machine on a clock, without sockets or waiting.

Every gateway keeps the whole cluster's count of each key that it hears of, so a decision asks nobody. Gateways tell
each other what they let a key spend as sums since their start, with a number: a message that is lost is made good by
the next one, and one that comes twice or late changes nothing. Requests that are open at another gateway count until it
has said nothing of them for LEASE_S. What a gateway has not been told yet it cannot count, so a limit may be passed by
as much; the bucket goes into debt for it when the word comes.

A limit a minute is a leaky bucket: what was spent drains evenly, and who finds it full is refused.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Final, Literal

from shoal.cluster.channel import KeySpending, Spending, Spent
from shoal.cluster.keys import KeyLimits

LEASE_S: Final = 10.0
# For so long it is repeated what a key has spent of late, and what others said is remembered.
REPEAT_S: Final = 30.0
FORGET_S: Final = 900.0
_MAX_KEYS: Final = 500  # in one message
_MINUTE_S: Final = 60.0

LimitName = Literal["requests", "tokens", "concurrency"]


class OverLimitError(Exception):
    """A key has no more of `limit` now."""

    def __init__(self, limit: LimitName, most: int, retry_after_s: float) -> None:
        super().__init__(limit)
        self.limit: LimitName = limit
        self.most = most
        self.retry_after_s = max(1, math.ceil(retry_after_s))


@dataclass(frozen=True, slots=True)
class Standing:
    """How a key stands with a limit a minute. reset_s: until all of it is there again."""

    limit: int
    remaining: int
    reset_s: float


@dataclass(slots=True)
class _Bucket:
    """What was spent of one limit. `total` and `own`: at this gateway, ever and undrained; `used`: at all of them."""

    total: float = 0.0
    own: float = 0.0
    used: float = 0.0
    at_s: float = 0.0

    def drain(self, per_minute: int | None, now: float) -> None:
        gone = math.inf if per_minute is None else (now - self.at_s) * per_minute / _MINUTE_S
        self.own = max(0.0, self.own - gone)
        self.used = max(0.0, self.used - gone)
        self.at_s = now

    def spend(self, amount: float) -> None:
        self.total += amount
        self.own = max(0.0, self.own + amount)
        self.used = max(0.0, self.used + amount)

    def told(self) -> Spending:
        return Spending(self.total, self.own, self.used)

    def meet(self, told: Spending) -> None:
        """The first word of a gateway on a key: what it let spend of late, and at least what it knows of. What is older
        counts as drained by each gateway alone, so what two spent for long without a word is taken for a little less.
        """
        self.used = max(self.used + told.own, told.used)

    def catch_up(self, amount: float) -> None:
        self.used = max(0.0, self.used + amount)


@dataclass(slots=True)
class _Account:
    """One key."""

    requests: _Bucket = field(default_factory=_Bucket)
    tokens: _Bucket = field(default_factory=_Bucket)
    num_open: int = 0  # here
    others: dict[str, _Heard] = field(default_factory=dict)  # by gateway
    changed_s: float = -math.inf  # here


@dataclass(slots=True)
class _Heard:
    """What another gateway said last of a key."""

    number: int
    num_open: int
    requests: float
    tokens: float
    heard_s: float


class Limits:
    """What keys have spent. Every method may be called from any thread.

    gateway: names this process, and no other one ever. limits_of: those of a key by its id, None for one that is gone.
    tell: called with what the other gateways should hear; must not wait, nor call back.
    """

    def __init__(
        self,
        gateway: str,
        limits_of: Callable[[str], KeyLimits | None],
        *,
        tell: Callable[[Spent], None] = lambda message: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._gateway = gateway
        self._limits_of = limits_of
        self._tell = tell
        self._clock = clock
        self._number = 0
        self._accounts: dict[str, _Account] = {}
        self._lock = threading.Lock()

    def enter(self, key: str) -> None:
        """A request begins; ends with `leave`. Raises OverLimitError."""
        with self._lock:
            now = self._clock()
            limits, account = self._open(key, now)
            self._check(limits, account, now)
            account.num_open += 1
            account.requests.spend(1.0)
            self._say(limits, account, key, now)

    def spend(self, key: str, tokens: int) -> None:
        """So many tokens were used; negative gives some back. The others hear of it in time."""
        with self._lock:
            now = self._clock()
            _, account = self._open(key, now)
            account.tokens.spend(tokens)
            account.changed_s = now

    def leave(self, key: str) -> None:
        """A request is over."""
        with self._lock:
            now = self._clock()
            limits, account = self._open(key, now)
            assert account.num_open > 0, key
            account.num_open -= 1
            self._say(limits, account, key, now)

    def take(self, message: Spent) -> None:
        """What another gateway says."""
        if message.gateway == self._gateway:
            return
        with self._lock:
            now = self._clock()
            for told in message.keys:
                self._hear(message, told, now)

    def beat(self) -> None:
        """To be called a few times in LEASE_S: says again what counts, and forgets what does not."""
        with self._lock:
            now = self._clock()
            lively = []
            for key, account in self._accounts.items():
                is_lively = account.num_open or now - account.changed_s < REPEAT_S
                if is_lively and self._drain(key, account, now).are_shared:
                    lively.append(key)
                for gateway in [name for name, one in account.others.items() if now - one.heard_s > FORGET_S]:
                    del account.others[gateway]
            for at in range(0, len(lively), _MAX_KEYS):
                self._send(lively[at : at + _MAX_KEYS])

    def num_open(self, key: str) -> int:
        """Requests of a key that are being answered, at all gateways."""
        with self._lock:
            account = self._accounts.get(key)
            return self._num_open(account, self._clock()) if account is not None else 0

    def standing(self, key: str) -> dict[Literal["requests", "tokens"], Standing]:
        """How a key stands with the limits a minute that it has."""
        with self._lock:
            limits, account = self._open(key, self._clock())
            found: dict[Literal["requests", "tokens"], Standing] = {}
            if limits.requests_per_minute is not None:
                found["requests"] = _standing(account.requests, limits.requests_per_minute)
            if limits.tokens_per_minute is not None:
                found["tokens"] = _standing(account.tokens, limits.tokens_per_minute)
            return found

    def _open(self, key: str, now: float) -> tuple[KeyLimits, _Account]:
        """With buckets drained until now."""
        account = self._accounts.get(key)
        if account is None:
            account = self._accounts[key] = _Account(_Bucket(at_s=now), _Bucket(at_s=now))
        return self._drain(key, account, now), account

    def _drain(self, key: str, account: _Account, now: float) -> KeyLimits:
        limits = self._limits_of(key) or _NO_LIMITS
        account.requests.drain(limits.requests_per_minute, now)
        account.tokens.drain(limits.tokens_per_minute, now)
        return limits

    def _check(self, limits: KeyLimits, account: _Account, now: float) -> None:
        most = limits.max_concurrent_requests
        if most is not None and self._num_open(account, now) >= most:
            raise OverLimitError("concurrency", most, 1.0)
        rate = limits.requests_per_minute
        if rate is not None and account.requests.used + 1.0 > rate + _ROUNDING:
            raise OverLimitError("requests", rate, (account.requests.used + 1.0 - rate) * _MINUTE_S / rate)
        rate = limits.tokens_per_minute
        if rate is not None and account.tokens.used + 1.0 > rate + _ROUNDING:
            raise OverLimitError("tokens", rate, (account.tokens.used + 1.0 - rate) * _MINUTE_S / rate)

    def _num_open(self, account: _Account, now: float) -> int:
        others = sum(one.num_open for one in account.others.values() if now - one.heard_s < LEASE_S)
        return account.num_open + others

    def _hear(self, message: Spent, told: KeySpending, now: float) -> None:
        _, account = self._open(told.key, now)
        before = account.others.get(message.gateway)
        if before is None:
            account.requests.meet(told.requests)
            account.tokens.meet(told.tokens)
        elif message.number <= before.number:
            return
        else:
            account.requests.catch_up(told.requests.total - before.requests)
            account.tokens.catch_up(told.tokens.total - before.tokens)
        account.others[message.gateway] = _Heard(
            message.number, told.num_open, told.requests.total, told.tokens.total, now
        )

    def _say(self, limits: KeyLimits, account: _Account, key: str, now: float) -> None:
        account.changed_s = now
        if limits.are_shared:
            self._send((key,))

    def _send(self, keys: Iterable[str]) -> None:
        self._number += 1
        self._tell(Spent(self._gateway, self._number, tuple(map(self._told, keys))))

    def _told(self, key: str) -> KeySpending:
        account = self._accounts[key]
        return KeySpending(key, account.num_open, account.requests.told(), account.tokens.told())


_NO_LIMITS: Final = KeyLimits()
_ROUNDING: Final = 1e-6


def _standing(bucket: _Bucket, limit: int) -> Standing:
    remaining = max(0, math.floor(limit - bucket.used + _ROUNDING))
    return Standing(limit, min(limit, remaining), bucket.used * _MINUTE_S / limit)
