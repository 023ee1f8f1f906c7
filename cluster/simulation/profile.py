"""What a simulated replica is made of: memory for KV, the time of a step, limits, and a price.

A profile is one of those that come with Shoal, in profiles/, or a YAML file of the same keys; `shoal bench --calibrate`
writes one of the machine it runs on.
"""

from __future__ import annotations

from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Final

import msgspec
import yaml

from shoal.engine.config import ConfigError
from shoal.engine.step_time import StepTime

BUILT_IN: Final = Path(__file__).parent / "profiles"
_STEP_AT_MOST_S: Final = 0.05  # what a step of max_step_tokens takes where a profile does not set that
_LARGEST_STEP: Final = 8192

NotNegative = Annotated[float, msgspec.Meta(ge=0)]
Positive = Annotated[int, msgspec.Meta(ge=1)]


@dataclass(frozen=True, slots=True)
class HardwareProfile:
    """One replica: a model on some devices.

    kv_tokens: tokens that its KV pool holds.
    block_tokens: of a KV block; None: as in the trace.
    max_step_tokens, max_running_requests: as in the engine's settings.
    usd_per_hour: of the whole replica; None: no cost is counted.
    start_s: from the decision to add a replica until it takes requests.
    request_s: what a request spends outside the engine.
    concurrent_replicas: how many replicas compute at full speed at once, where they share a machine; None: all.
    source: where the figures are from.
    """

    name: str
    kv_tokens: int
    step_time: StepTime
    block_tokens: int | None
    max_step_tokens: int
    max_running_requests: int
    usd_per_hour: float | None
    start_s: float
    request_s: float
    concurrent_replicas: float | None
    source: str


class _StepSeconds(msgspec.Struct, forbid_unknown_fields=True):
    base: NotNegative
    per_prefill_token: NotNegative
    per_decode_token: NotNegative
    per_context_token: NotNegative


class _ProfileFile(msgspec.Struct, forbid_unknown_fields=True):
    kv_tokens: Positive
    step_s: _StepSeconds
    name: str | None = None
    block_tokens: Positive | None = None
    max_step_tokens: Positive | None = None
    max_running_requests: Positive = 256
    usd_per_hour: NotNegative = 0.0
    start_s: NotNegative = 60.0
    request_s: NotNegative = 0.0
    concurrent_replicas: Annotated[float, msgspec.Meta(ge=1)] | None = None
    source: str = ""


def built_in_profiles() -> list[str]:
    return sorted(path.stem for path in BUILT_IN.glob("*.yaml"))


def load_profile(name_or_path: str | Path) -> HardwareProfile:
    """The built-in profile of that name, or the one in that YAML file. Raises ConfigError."""
    name = str(name_or_path)
    if name in built_in_profiles():
        return _read(BUILT_IN / f"{name}.yaml")
    path = Path(name_or_path).expanduser()
    if not path.is_file():
        raise ConfigError(
            f"there is no hardware profile {name!r}: use a YAML file with kv_tokens and step_s, "
            f"or one of {', '.join(built_in_profiles())}",
            field="hardware",
        )
    return _read(path)


def _read(path: Path) -> HardwareProfile:
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"cannot read the hardware profile {path}: {error}", field="hardware") from None
    return parse_profile(data, source=str(path))


def parse_profile(data: Any, *, source: str = "profile") -> HardwareProfile:
    """Check plain data (as from YAML); `source` is where it stands, for errors and the name. Raises ConfigError."""
    _check_keys(data, _ProfileFile, source)
    _check_keys(data.get("step_s", {}), _StepSeconds, f"{source}: step_s")
    try:
        file = msgspec.convert(data, _ProfileFile, strict=False)  # YAML 1.1 reads 1e-5 as a string
    except msgspec.ValidationError as error:
        raise ConfigError(f"{source}: {error}", field="hardware") from None
    step = file.step_s
    step_time = StepTime(step.base, step.per_prefill_token, step.per_decode_token, step.per_context_token)
    return HardwareProfile(
        name=file.name or Path(source).stem,
        kv_tokens=file.kv_tokens,
        step_time=step_time,
        block_tokens=file.block_tokens,
        max_step_tokens=file.max_step_tokens or _largest_step(step_time),
        max_running_requests=file.max_running_requests,
        usd_per_hour=file.usd_per_hour or None,
        start_s=file.start_s,
        request_s=file.request_s,
        concurrent_replicas=file.concurrent_replicas,
        source=file.source,
    )


def _check_keys(data: Any, kind: type[msgspec.Struct], source: str) -> None:
    known = kind.__struct_fields__
    if not isinstance(data, dict):
        raise ConfigError(f"{source}: expected the keys {', '.join(known)}, got {data!r}", field="hardware")
    for key in data:
        if key not in known:
            near = get_close_matches(str(key), known, n=1)
            way_out = f"did you mean {near[0]}?" if near else f"use {', '.join(known)}"
            raise ConfigError(f"{source}: there is no key {key!r}: {way_out}", field="hardware")


def _largest_step(step_time: StepTime) -> int:
    """The largest power of two of prompt tokens that a step computes in `_STEP_AT_MOST_S`; 256 at least."""
    tokens = _LARGEST_STEP
    while tokens > 256 and step_time.seconds(tokens, 0, 0) > _STEP_AT_MOST_S:
        tokens //= 2
    return tokens
