"""API keys: how they are made, and the file that holds their hashes, tenants and limits.

A key is 256 random bits, so nobody finds it by trying, however fast the hash: a plain SHA-256 is right, where a
password would need a slow hash. The file holds no key, and nothing here shows one: neither an error nor a repr.
"""

from __future__ import annotations

import hashlib
import re
import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, time
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Final

import yaml
from pydantic import AfterValidator, BeforeValidator, Field, ValidationError, field_validator
from pydantic_core import ErrorDetails

from shoal.cluster.config import Settings, dotted, plain_message, unknown_key
from shoal.engine.config import ConfigError

KEY_PREFIX: Final = "sk-shoal-"
_KEY_BYTES: Final = 32
MAX_FILE_BYTES: Final = 32 * 2**20
MAX_KEY_CHARS: Final = 512
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}")
_FIELD: Final = re.compile(r"[a-z_]{1,40}")  # what may be shown of an unknown field: a key has digits or a dash

_Loader: Final = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # 10 times as fast, where PyYAML has it


def _check_name(value: str) -> str:
    if not _NAME.fullmatch(value) or value.startswith(KEY_PREFIX):
        raise ValueError("a name has 1 to 64 letters, digits, or any of . _ @ - and begins with a letter or digit")
    return value


def _check_hash(value: str) -> str:
    if not re.fullmatch(r"[0-9a-f]{64}", value):
        raise ValueError(
            "not a SHA-256 in 64 hexadecimal digits: take the entry that `shoal keys new` prints, never the key itself"
        )
    return value


def _as_moment(value: object) -> object:
    """A day as its first moment, and a time without a zone as UTC."""
    if isinstance(value, str):
        value = datetime.fromisoformat(value)
    if isinstance(value, date) and not isinstance(value, datetime):
        value = datetime.combine(value, time())
    if isinstance(value, datetime) and value.tzinfo is None:
        value = value.replace(tzinfo=UTC)
    return value


_Name = Annotated[str, AfterValidator(_check_name)]


class KeyLimits(Settings):
    """What one key may ask of the whole cluster, all gateways together. None is no limit.

    A limit a minute comes back evenly: at most so many at once, and so many in every minute from then on.
    tokens_per_minute counts prompt tokens, cached ones too, and generated ones, as they were really used.
    """

    requests_per_minute: int | None = Field(default=None, ge=1)
    tokens_per_minute: int | None = Field(default=None, ge=1)
    max_concurrent_requests: int | None = Field(default=None, ge=1)
    max_tokens_per_request: int | None = Field(default=None, ge=2, description="prompt and generated, all samples")

    @property
    def are_shared(self) -> bool:
        """Whether gateways must count together."""
        counted = (self.requests_per_minute, self.tokens_per_minute, self.max_concurrent_requests)
        return any(limit is not None for limit in counted)


class KeyEntry(Settings):
    """One key. A tenant may have several; what they share is the tenant's turn and its prefix cache."""

    id: _Name
    tenant: _Name
    sha256: Annotated[str, AfterValidator(_check_hash)]
    models: tuple[str, ...] | None = Field(default=None, description="it may ask these only; None: all")
    limits: KeyLimits = KeyLimits()
    expires: Annotated[datetime | None, BeforeValidator(_as_moment)] = None
    revoked: bool = False
    shared_cache: bool = Field(default=False, description="share cached prefixes with all keys that say so")

    def may_ask(self, model: str) -> bool:
        return self.models is None or model in self.models

    def is_expired(self, now: float) -> bool:
        """`now`: Unix time in seconds."""
        return self.expires is not None and self.expires.timestamp() <= now


class KeyFile(Settings):
    """The keys file."""

    keys: tuple[KeyEntry, ...] = ()

    @field_validator("keys")
    @classmethod
    def _tell_apart(cls, keys: tuple[KeyEntry, ...]) -> tuple[KeyEntry, ...]:
        for name in ("id", "sha256"):
            seen: dict[str, KeyEntry] = {}
            for entry in keys:
                other = seen.setdefault(getattr(entry, name), entry)
                if other is not entry and name == "id":
                    raise ValueError(f"two keys have the id {entry.id!r}: give each an id of its own")
                if other is not entry:
                    raise ValueError(f"{other.id!r} and {entry.id!r} are the same key: remove one of them")
        return keys

    @cached_property
    def by_hash(self) -> dict[str, KeyEntry]:
        return {entry.sha256: entry for entry in self.keys}

    @cached_property
    def by_id(self) -> dict[str, KeyEntry]:
        return {entry.id: entry for entry in self.keys}


@dataclass(frozen=True, slots=True)
class NewKey:
    """A key that was just made, and its entry for the keys file. The key is shown nowhere but where it is asked for."""

    entry: KeyEntry
    key: str = ""

    def __repr__(self) -> str:
        return f"NewKey({self.entry.id!r})"

    @property
    def yaml(self) -> str:
        """The entry as an item of the file's `keys`."""
        data = self.entry.model_dump(mode="json", exclude_defaults=True)
        return yaml.safe_dump([data], sort_keys=False, allow_unicode=True)


def hash_key(key: str) -> str:
    """What the file holds of a key."""
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()


def new_key(
    tenant: str,
    *,
    id: str | None = None,
    models: Sequence[str] | None = None,
    limits: Mapping[str, int | None] | None = None,
    expires: str | None = None,
    shared_cache: bool = False,
) -> NewKey:
    """A key of 256 random bits. `limits`: fields of KeyLimits. `expires`: an ISO 8601 day or time.

    Raises ConfigError naming the field.
    """
    key = KEY_PREFIX + secrets.token_urlsafe(_KEY_BYTES)
    data = {
        "id": id if id is not None else f"{tenant[:50]}-{secrets.token_hex(4)}",
        "tenant": tenant,
        "sha256": hash_key(key),
        "models": models,
        "limits": {name: value for name, value in (limits or {}).items() if value is not None},
        "expires": expires,
        "shared_cache": shared_cache,
    }
    try:
        entry = KeyEntry.model_validate(data)
    except ValidationError as error:
        raise ConfigError("\n".join(_explain("keys new", error, None))) from None
    return NewKey(entry, key)


def read_keys(path: Path) -> KeyFile:
    """The keys file at `path`. Raises ConfigError naming file, line and field, and never a key."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except FileNotFoundError:
        raise ConfigError(f"there is no {path}: make its first key with `shoal keys new --append {path}`") from None
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None
    return parse_keys(data, str(path))


def parse_keys(data: bytes, source: str) -> KeyFile:
    """The text of a keys file, checked. Raises ConfigError naming `source`, line and field, and never a key."""
    if len(data) > MAX_FILE_BYTES:
        raise ConfigError(f"{source}: more than {MAX_FILE_BYTES} bytes: is this a keys file?")
    try:
        text = data.decode()
        content = yaml.load(text, _Loader)
    except UnicodeDecodeError as error:
        raise ConfigError(f"{source}: not UTF-8 at byte {error.start}") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark  # the problem itself may quote the file
        raise ConfigError(f"{source}{f':{mark.line + 1}:{mark.column + 1}' if mark else ''}: not valid YAML") from None
    except (yaml.YAMLError, ValueError, RecursionError):  # such as a day that there is not
        raise ConfigError(f"{source}: not valid YAML") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{source}: expected a mapping with the list 'keys', got {_kind(content)}")
    try:
        return KeyFile.model_validate(content)
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(source, error, yaml.compose(text, yaml.SafeLoader)))) from None


def _kind(content: object) -> str:
    return "nothing" if content is None else type(content).__name__


def _explain(source: str, error: ValidationError, root: yaml.Node | None) -> Iterator[str]:
    """Each problem as "file:line: field: what is wrong", without what stands there: it may be a key."""
    for detail in error.errors(include_input=False, include_url=False):
        location = detail["loc"]
        line = f":{_line(root, location)}" if root is not None else ""
        shown = tuple(_shown(step) if isinstance(step, str) else step for step in location)
        yield f"{source}{line}: {dotted(shown) or 'keys'}: {_reason(detail)}"


def _reason(detail: ErrorDetails) -> str:
    location = detail["loc"]
    if detail["type"] == "extra_forbidden":
        return unknown_key(KeyFile, location, word="field")
    if location and location[-1] == "expires":
        return "not a day or time: write one such as 2027-06-30 or 2027-06-30T12:00:00+02:00"
    return plain_message(detail)


def _shown(field: str) -> str:
    return field if _FIELD.fullmatch(field) or field == "sha256" else "(a field that is not shown)"


def _line(node: yaml.Node, location: tuple[str | int, ...]) -> int:
    """Where the value at `location` stands, or what holds it; from 1."""
    line = node.start_mark.line
    for step in location:
        if isinstance(node, yaml.MappingNode):
            found: Any = next(((key, value) for key, value in node.value if key.value == str(step)), None)
            if found is None:
                break
            line, node = found[0].start_mark.line, found[1]
        elif isinstance(node, yaml.SequenceNode) and isinstance(step, int):
            node = node.value[step]
            line = node.start_mark.line
    return int(line) + 1
