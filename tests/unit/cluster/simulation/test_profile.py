"""Hardware profiles: those that come with Shoal, a user's file, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from shoal.cluster.simulation.profile import built_in_profiles, load_profile, parse_profile
from shoal.engine.config import ConfigError

RATES = {"base": 0.01, "per_prefill_token": 1e-4, "per_decode_token": 0, "per_context_token": 0}


def test_a_file_needs_its_memory_and_its_rates_only(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(
        "kv_tokens: 1000\nstep_s: {base: 0.01, per_prefill_token: 1e-4, per_decode_token: 0, per_context_token: 2e-8}\n"
    )
    profile = load_profile(path)
    assert (profile.name, profile.kv_tokens, profile.block_tokens) == ("mine", 1000, None)
    assert profile.step_time.per_prefill_token == 1e-4
    assert profile.step_time.per_context_token == 2e-8
    assert (profile.usd_per_hour, profile.concurrent_replicas, profile.request_s) == (None, None, 0.0)


@pytest.mark.parametrize("name", built_in_profiles())
def test_built_in_profiles_have_a_source_for_every_rate_and_a_price(name: str) -> None:
    profile = load_profile(name)
    assert profile.name == name
    assert profile.usd_per_hour is not None
    assert "https://" in profile.source
    assert all(f"{key}: " in profile.source for key in ("base", "per_prefill_token", "per_decode_token",
                                                        "per_context_token", "kv_tokens", "usd_per_hour"))  # fmt: skip


def test_there_is_a_profile_of_each_device_and_size() -> None:
    assert built_in_profiles() == ["4xh100-70b", "4xh200-70b", "h100-8b", "h200-8b"]


@pytest.mark.parametrize(
    ("per_prefill_token", "tokens"), [(0.0, 8192), (1e-5, 2048), (1e-4, 256), (1.25e-4, 256), (1e-2, 256)]
)
def test_a_step_is_the_largest_power_of_two_that_takes_a_twentieth_of_a_second(
    per_prefill_token: float, tokens: int
) -> None:
    profile = parse_profile({"kv_tokens": 1, "step_s": RATES | {"per_prefill_token": per_prefill_token}})
    assert profile.max_step_tokens == tokens


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        ({"kv_tokens": 1}, "step_s"),
        ({"step_s": RATES}, "kv_tokens"),
        ({"kv_tokens": 0, "step_s": RATES}, "kv_tokens"),
        ({"kv_token": 1, "step_s": RATES}, "did you mean kv_tokens?"),
        ({"kv_tokens": 1, "step_s": RATES | {"per_prefil_token": 1}}, "did you mean per_prefill_token?"),
        ({"kv_tokens": 1, "step_s": RATES | {"base": -1}}, "step_s.base"),
        ({"kv_tokens": 1, "step_s": RATES | {"base": "fast"}}, "step_s.base"),
        ({"kv_tokens": 1, "step_s": 3}, "expected the keys base"),
        ({"kv_tokens": 1, "step_s": RATES, "concurrent_replicas": 0}, "concurrent_replicas"),
        (["kv_tokens"], "expected the keys kv_tokens"),
        (None, "expected the keys kv_tokens"),
    ],
)
def test_a_wrong_profile_is_refused_by_the_key_that_is_wrong(data: Any, problem: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_profile(data, source="mine.yaml")
    assert str(caught.value).startswith("mine.yaml: ")
    assert problem in str(caught.value)


def test_an_unknown_name_says_which_there_are() -> None:
    with pytest.raises(ConfigError, match=r"no hardware profile 'h300'.*h100-8b"):
        load_profile("h300")


def test_a_file_that_is_no_yaml_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text("kv_tokens: [1")
    with pytest.raises(ConfigError, match=r"cannot read the hardware profile .*broken\.yaml"):
        load_profile(path)
