"""Who may ask, and how much: decided from a request's headers alone, before its body is read.

What a request is allowed is its `Grant`, held from its headers to the end of its answer. With keys, the tenant is that
of the key, and nothing that a client sends makes it another's: its turn in the queue and the prefixes that it finds
cached are its tenant's. Without keys, a grant allows everything and the tenant is whom the headers name.
"""

from __future__ import annotations

import time
import uuid
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Final, Literal, Protocol, get_args

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from shoal.cluster.channel import GenerateCall, Spent
from shoal.cluster.gateway.admission import RefusedError
from shoal.cluster.gateway.backend import ReplicaUnavailableError
from shoal.cluster.gateway.errors import ApiError
from shoal.cluster.gateway.fairness import tenant_of
from shoal.cluster.gateway.key_ring import KeyRing
from shoal.cluster.gateway.limits import LimitName, Limits, OverLimitError, Standing
from shoal.cluster.keys import KeyEntry, KeyLimits
from shoal.cluster.metrics import (
    AUTH_KEYS,
    AUTH_REFUSALS,
    AUTH_RELOAD_FAILED,
    TENANT_REQUESTS,
    TENANT_TOKENS,
    Point,
    Snapshot,
)
from shoal.engine.request import RequestError, RequestOutput

# Everything else needs a key, routes that there are not included.
PUBLIC_PATHS: Final = frozenset({"/health", "/ping", "/version", "/openapi.json"})
# What counts as a request of its limits; lists of models do not.
COUNTED_PATHS: Final = frozenset({"/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize"})
_CHALLENGE: Final = {"www-authenticate": 'Bearer realm="shoal"'}

RefusalReason = Literal["missing", "unknown", "expired", "revoked", "model", "requests", "tokens", "concurrency"]
TokenKind = Literal["prompt", "cached", "generated"]
_LIMIT_WORDS: Final[Mapping[LimitName, str]] = {
    "requests": "requests a minute",
    "tokens": "tokens a minute",
    "concurrency": "requests at once",
}


class Grant(Protocol):
    """What one request is allowed."""

    tenant: str

    def may_ask(self, model: str) -> bool: ...

    def check_model(self, model: str) -> None:
        """Raise ApiError 403 for a model that it may not ask."""
        ...

    def bound(self, calls: Sequence[GenerateCall], *, has_own_limit: bool) -> list[GenerateCall]:
        """The calls of the request as they may be sent. `has_own_limit`: the client said how many tokens it wants.

        Raises RequestError for more tokens than it may ask for.
        """
        ...

    def metered(
        self, steps: AsyncGenerator[list[RequestOutput], None], call: GenerateCall, model: str
    ) -> AsyncGenerator[list[RequestOutput], None]:
        """The outputs of a call, counted."""
        ...


class OpenGrant:
    """Where there are no keys: everything."""

    def __init__(self, headers: Mapping[str, str]) -> None:
        """Raises RequestError naming the header."""
        self.tenant = tenant_of(headers)

    def may_ask(self, model: str) -> bool:
        return True

    def check_model(self, model: str) -> None:
        pass

    def bound(self, calls: Sequence[GenerateCall], *, has_own_limit: bool) -> list[GenerateCall]:
        return list(calls)

    def metered(
        self, steps: AsyncGenerator[list[RequestOutput], None], call: GenerateCall, model: str
    ) -> AsyncGenerator[list[RequestOutput], None]:
        return steps


class Auth:
    """The keys of a cluster as one gateway knows them, what they have spent, and what was counted for tenants.

    clock: Unix time in seconds, for expiry.
    """

    def __init__(self, ring: KeyRing, limits: Limits, *, clock: Callable[[], float] = time.time) -> None:
        self.limits = limits
        self._ring = ring
        self._clock = clock
        self._refusals: Counter[RefusalReason] = Counter(dict.fromkeys(get_args(RefusalReason), 0))
        self._requests: Counter[str] = Counter()
        self._tokens: Counter[tuple[str, str, TokenKind]] = Counter()

    def identify(self, headers: Mapping[str, str]) -> KeyEntry:
        """Whose request this is. Raises ApiError 401; what was presented is in no message."""
        key = _presented(headers)
        entry = self._ring.find(key) if key else None
        match entry:
            case None if not key:
                raise self._unauthorized(
                    "missing", "no API key: send one in the header 'Authorization: Bearer KEY' (or 'x-api-key: KEY')"
                )
            case None:
                raise self._unauthorized("unknown", "this API key is not known here: check it, or ask for a new one")
            case KeyEntry(revoked=True):
                raise self._unauthorized("revoked", "this API key was revoked: ask for a new one")
            case KeyEntry() if entry.is_expired(self._clock()):
                raise self._unauthorized("expired", "this API key has expired: ask for a new one")
        return entry

    def enter(self, entry: KeyEntry) -> None:
        """A request of its limits begins; ends with `limits.leave`. Raises ApiError 429."""
        try:
            self.limits.enter(entry.id)
        except OverLimitError as error:
            self._refusals[error.limit] += 1
            raise self._over_limit(entry, error) from None
        self._requests[entry.tenant] += 1

    def refuse_model(self, entry: KeyEntry, model: str) -> ApiError:
        self._refusals["model"] += 1
        allowed = ", ".join(entry.models or ()) or "none"
        return ApiError(
            403,
            f"this API key may not ask the model '{model[:200]}'; it may ask: {allowed}",
            type="permission_error",
            param="model",
            code="model_not_allowed",
        )

    def count(self, entry: KeyEntry, model: str, kind: TokenKind, tokens: int) -> None:
        """For billing."""
        self._tokens[entry.tenant, model, kind] += tokens

    def standing_headers(self, entry: KeyEntry) -> dict[str, str]:
        """As OpenAI names them."""
        headers = {}
        for name, standing in self.limits.standing(entry.id).items():
            headers[f"x-ratelimit-limit-{name}"] = str(standing.limit)
            headers[f"x-ratelimit-remaining-{name}"] = str(standing.remaining)
            headers[f"x-ratelimit-reset-{name}"] = _duration(standing)
        return headers

    def close(self) -> None:
        """Follow the keys file no longer."""
        self._ring.close()

    def snapshot(self) -> Snapshot:
        return (
            Point(AUTH_KEYS.name, (), float(len(self._ring.file.keys))),
            Point(AUTH_RELOAD_FAILED.name, (), float(self._ring.is_broken)),
            *(Point(AUTH_REFUSALS.name, (reason,), float(n)) for reason, n in self._refusals.items()),
            *(Point(TENANT_REQUESTS.name, (tenant,), float(n)) for tenant, n in self._requests.items()),
            *(Point(TENANT_TOKENS.name, labels, float(n)) for labels, n in self._tokens.items()),
        )

    def _unauthorized(self, reason: RefusalReason, message: str) -> ApiError:
        self._refusals[reason] += 1
        return ApiError(401, message, type="authentication_error", code="invalid_api_key", headers=_CHALLENGE)

    def _over_limit(self, entry: KeyEntry, error: OverLimitError) -> ApiError:
        return ApiError(
            429,
            f"this API key may use {error.most} {_LIMIT_WORDS[error.limit]}: try again in {error.retry_after_s} s",
            type="rate_limit_error",
            code="rate_limit_exceeded",
            headers={"retry-after": str(error.retry_after_s)} | self.standing_headers(entry),
        )


def start_auth(keys_file: str, address: str, tell: Callable[[Spent], None]) -> Auth:
    """Read the keys and follow their file. `address`: where this gateway listens. `tell`: see Limits.

    Raises ConfigError where the file is not there or wrong.
    """
    ring = KeyRing(keys_file)
    ring.start()

    def limits_of(key: str) -> KeyLimits | None:
        entry = ring.entry(key)
        return entry.limits if entry is not None else None

    # The address alone may come again after a restart, and its sums begin anew.
    return Auth(ring, Limits(f"{address}/{uuid.uuid4().hex}", limits_of, tell=tell))


class KeyGrant:
    """What the holder of a key is allowed in one request."""

    def __init__(self, auth: Auth, entry: KeyEntry) -> None:
        self.tenant = entry.tenant
        self._auth = auth
        self._entry = entry

    def may_ask(self, model: str) -> bool:
        return self._entry.may_ask(model)

    def check_model(self, model: str) -> None:
        if not self._entry.may_ask(model):
            raise self._auth.refuse_model(self._entry, model)

    def bound(self, calls: Sequence[GenerateCall], *, has_own_limit: bool) -> list[GenerateCall]:
        return [replace(call, cache_salt=self._salt(call)) for call in self._shortened(calls, has_own_limit)]

    async def metered(
        self, steps: AsyncGenerator[list[RequestOutput], None], call: GenerateCall, model: str
    ) -> AsyncGenerator[list[RequestOutput], None]:
        """The prompt is charged when the call begins: who leaves before the first token has let it be computed."""
        auth, entry, limits = self._auth, self._entry, self._auth.limits
        num_prompt = len(call.prompt_ids)
        has_output = False
        limits.spend(entry.id, num_prompt)
        try:
            async with aclosing(steps):
                async for outputs in steps:
                    if not has_output:
                        has_output = True
                        auth.count(entry, model, "prompt", num_prompt)
                        auth.count(entry, model, "cached", _num_cached(outputs, call))
                    num_tokens = sum(len(output.token_ids) for output in outputs)
                    limits.spend(entry.id, num_tokens)
                    auth.count(entry, model, "generated", num_tokens)
                    yield outputs
        except (RefusedError, RequestError, ReplicaUnavailableError):
            if not has_output:
                limits.spend(entry.id, -num_prompt)
            raise

    def _salt(self, call: GenerateCall) -> str:
        """A tenant's name has no colon, so no salt that a client sends leads into another tenant's prefixes."""
        return f"{'' if self._entry.shared_cache else self.tenant}:{call.cache_salt}"

    def _shortened(self, calls: Sequence[GenerateCall], has_own_limit: bool) -> Sequence[GenerateCall]:
        most = self._entry.limits.max_tokens_per_request
        if most is None:
            return calls
        num_prompt = sum(len(call.prompt_ids) for call in calls)
        num_samples = sum(call.params.num_samples for call in calls)
        wanted = sum((call.params.max_tokens or 0) * call.params.num_samples for call in calls)
        if num_prompt + wanted <= most:
            return calls
        room = (most - num_prompt) // num_samples
        if has_own_limit or room < 1:
            raise RequestError(
                f"this API key may use {most} tokens in one request, and this one asks for {num_prompt} in its prompt "
                f"and {wanted} to generate: shorten the prompt, or ask for fewer tokens or samples",
                param="max_tokens",
                code="max_tokens_per_request_exceeded",
            )
        return [
            replace(call, params=replace(call.params, max_tokens=min(room, call.params.max_tokens or room)))
            for call in calls
        ]


class AuthMiddleware:
    """Puts a Grant into the state of each request, or answers it with 401 or 429. `auth` None: there are no keys."""

    def __init__(self, app: ASGIApp, auth: Auth | None) -> None:
        self._app = app
        self._auth = auth

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in PUBLIC_PATHS:
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        if self._auth is None:
            try:
                scope["state"]["grant"] = OpenGrant(headers)
            except RequestError as error:
                await ApiError(400, str(error), param=error.param).response()(scope, receive, send)
                return
            await self._app(scope, receive, send)
            return
        auth = self._auth
        is_counted = scope["path"] in COUNTED_PATHS and scope["method"] == "POST"
        try:
            entry = auth.identify(headers)
            if is_counted:
                auth.enter(entry)
        except ApiError as error:
            await error.response()(scope, receive, send)
            return
        scope["state"]["grant"] = KeyGrant(auth, entry)

        async def send_with_standing(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(auth.standing_headers(entry))
            await send(message)

        try:
            await self._app(scope, receive, send_with_standing if is_counted else send)
        finally:
            if is_counted:
                auth.limits.leave(entry.id)


def _presented(headers: Mapping[str, str]) -> str:
    """The key of a request, "" for none."""
    scheme, _, key = headers.get("authorization", "").partition(" ")
    bearer = key.strip() if scheme.lower() == "bearer" else ""
    return bearer or headers.get("x-api-key", "").strip()


def _num_cached(outputs: Sequence[RequestOutput], call: GenerateCall) -> int:
    """Later samples share the first one's blocks; that is no hit of the prefix cache."""
    return next((output.num_cached_tokens for output in outputs if output.request_id == call.sample_ids[0]), 0)


def _duration(standing: Standing) -> str:
    """In Go's form, such as 6m0s or 250ms."""
    if standing.reset_s < 1:
        return f"{round(standing.reset_s * 1000)}ms"
    minutes, seconds = divmod(round(standing.reset_s), 60)
    return f"{minutes}m{seconds}s" if minutes else f"{seconds}s"
