"""Architectures that only transformers knows: what cannot be served is refused by name before it answers wrongly."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from shoal.engine.config import ConfigError, EngineConfig
from shoal.engine.models.registry import load_model
from shoal.engine.parallel.collectives import SingleRank
from shoal.engine.parallel.topology import Topology
from shoal.kernels.dispatch import reference

SMALL_EXPERTS = {"num_local_experts": 2, "num_experts_per_tok": 2}


@pytest.mark.parametrize(
    ("architecture", "config_class", "fields"),
    [
        ("BloomForCausalLM", "BloomConfig", {}),  # ALiBi
        ("MambaForCausalLM", "MambaConfig", {}),  # recurrent state
        ("GptOssForCausalLM", "GptOssConfig", SMALL_EXPERTS | {"head_dim": 16}),  # attention sinks
        ("BertLMHeadModel", "BertConfig", {"num_key_value_heads": 4}),  # sees tokens to come
    ],
)
def test_attention_that_is_not_ours_is_refused_by_name(
    architecture: str,
    config_class: str,
    fields: dict[str, Any],
    tmp_path: Path,
    save_checkpoint: Callable[..., Any],
    open_model: Callable[..., Any],
) -> None:
    save_checkpoint(tmp_path, config_class, fields)
    with pytest.raises(ConfigError, match=f"{architecture} cannot be served"):
        open_model(tmp_path)


def test_more_than_one_rank_is_refused(
    tmp_path: Path, save_checkpoint: Callable[..., Any], open_config: Callable[..., EngineConfig]
) -> None:
    save_checkpoint(tmp_path, "Olmo2Config", {})
    with pytest.raises(ConfigError, match=r"Olmo2ForCausalLM.*on one rank only"):
        load_model(open_config(tmp_path), reference(), Topology(0, 2, 0, 1), SingleRank())


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.pop("model.layers.1.mlp.up_proj.weight"), r"such as model\.layers\.1\.mlp\.up_proj\.weight"),
        (lambda t: t.update({"model.norm.weight": torch.zeros(3)}), "cannot load"),
    ],
)
def test_weights_that_transformers_would_make_up_are_refused(
    edit: Callable[[dict[str, Tensor]], object],
    message: str,
    tmp_path: Path,
    save_checkpoint: Callable[..., Any],
    open_model: Callable[..., Any],
) -> None:
    save_checkpoint(tmp_path, "Olmo2Config", {})
    weights = load_file(tmp_path / "model.safetensors")
    edit(weights)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=message):
        open_model(tmp_path)


def test_a_configuration_that_transformers_refuses_is_refused_by_name(
    tmp_path: Path, save_checkpoint: Callable[..., Any], open_config: Callable[..., EngineConfig]
) -> None:
    save_checkpoint(tmp_path, "Olmo2Config", {})
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "hidden_size": "wide"}))
    with pytest.raises(ConfigError, match="cannot read the Olmo2ForCausalLM configuration"):
        open_config(tmp_path)


def test_progress_ends_at_the_total(
    tmp_path: Path, save_checkpoint: Callable[..., Any], open_config: Callable[..., EngineConfig]
) -> None:
    save_checkpoint(tmp_path, "Olmo2Config", {})
    seen: list[tuple[int, int]] = []
    load_model(open_config(tmp_path), reference(), Topology(0, 1, 0, 1), SingleRank(), lambda *at: seen.append(at))
    assert seen[0][0] == 0
    assert seen[-1][0] == seen[-1][1] > 0
