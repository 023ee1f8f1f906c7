"""Checkpoint directories: facts, shards, and a named way out of everything that can be wrong with one."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from shoal.engine.config import ConfigError
from shoal.engine.models.registry import read_model_config

IDS = tuple(range(3, 33))


@pytest.fixture
def checkpoint(tmp_path: Path, save_checkpoint: Callable[..., Any]) -> Path:
    save_checkpoint(tmp_path, "LlamaConfig", {"num_hidden_layers": 2})
    return tmp_path


@pytest.fixture
def sharded(tmp_path: Path, save_checkpoint: Callable[..., Any]) -> Path:
    save_checkpoint(tmp_path, "LlamaConfig", {}, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    return tmp_path


def _edit_config(directory: Path, **fields: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def _edit_weights(directory: Path, edit: Callable[[dict[str, Tensor]], object]) -> None:
    path = directory / "model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path)


def test_facts(checkpoint: Path) -> None:
    facts = read_model_config(str(checkpoint))
    assert (facts.num_layers, facts.num_heads, facts.num_kv_heads, facts.head_dim) == (2, 4, 2, 16)
    assert (facts.vocab_size, facts.hidden_size, facts.max_position) == (199, 64, 256)
    assert (facts.stored_dtype, facts.eos_token_ids, facts.layer_windows) == ("float32", (2,), (None, None))
    assert facts.num_parameters == sum(
        tensor.numel() for tensor in load_file(checkpoint / "model.safetensors").values()
    )


def test_end_of_text_tokens_are_those_of_both_configurations(checkpoint: Path) -> None:
    (checkpoint / "generation_config.json").write_text('{"eos_token_id": [7, 5]}')
    assert read_model_config(str(checkpoint)).eos_token_ids == (2, 5, 7)


@pytest.mark.parametrize(
    ("config_class", "fields", "windows"),
    [
        ("MistralConfig", {"sliding_window": 9}, (9, 9, 9, 9)),
        ("Gemma2Config", {"sliding_window": 9, "head_dim": 16}, (9, None, 9, None)),
        (
            "Qwen2Config",
            {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 3},
            (None, None, None, 9),
        ),
        ("Qwen2Config", {"sliding_window": 9, "max_window_layers": 0}, (None, None, None, None)),
        ("Gemma3TextConfig", {"sliding_window": 9, "head_dim": 16}, (9, 9, 9, 9)),
    ],
)
def test_layer_windows(
    config_class: str,
    fields: dict[str, Any],
    windows: tuple[int | None, ...],
    tmp_path: Path,
    save_checkpoint: Callable[..., Any],
) -> None:
    save_checkpoint(tmp_path, config_class, fields)
    assert read_model_config(str(tmp_path)).layer_windows == windows
    _edit_config(tmp_path, layer_types=None)  # as checkpoints before transformers 4.53 have it
    assert read_model_config(str(tmp_path)).layer_windows == windows


def test_rotary_fields_of_older_transformers_mean_the_same(
    tmp_path: Path,
    save_checkpoint: Callable[..., Any],
    open_model: Callable[..., Any],
    paged_request: Callable[..., Any],
) -> None:
    scaling = {"factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
    rope = {"rope_type": "llama3", "rope_theta": 300.0, **scaling}
    save_checkpoint(tmp_path, "LlamaConfig", {"rope_parameters": rope})
    config, model = open_model(tmp_path)
    expected = paged_request(model, config).step(IDS)
    older = {"rope_type": "llama3", **scaling}
    _edit_config(tmp_path, rope_parameters=None, rope_theta=300.0, rope_scaling=older)
    config, model = open_model(tmp_path)
    assert torch.equal(paged_request(model, config).step(IDS), expected)


def test_shards_give_the_model_that_one_file_gives(
    sharded: Path, open_model: Callable[..., Any], paged_request: Callable[..., Any]
) -> None:
    config, model = open_model(sharded)
    found = paged_request(model, config).step(IDS)
    tensors = {name: tensor for file in sharded.glob("*.safetensors") for name, tensor in load_file(file).items()}
    for file in sharded.glob("*.safetensors*"):
        file.unlink()
    save_file(tensors, sharded / "model.safetensors")
    config, model = open_model(sharded)
    assert torch.equal(paged_request(model, config).step(IDS), found)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_stored_dtype_is_read_from_the_headers(dtype: str, checkpoint: Path) -> None:
    def convert(tensors: dict[str, Tensor]) -> None:
        tensors |= {name: tensor.to(getattr(torch, dtype)) for name, tensor in tensors.items()}

    _edit_weights(checkpoint, convert)
    assert read_model_config(str(checkpoint)).stored_dtype == dtype


def _remove(directory: Path, pattern: str) -> None:
    for file in directory.glob(pattern):
        file.unlink()


def _truncate(directory: Path, length: int) -> None:
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:length])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: _remove(d, "config.json"), "holds no config.json"),
        (lambda d: (d / "config.json").write_text('{"architectures": ['), "not readable JSON"),
        (lambda d: (d / "config.json").write_bytes(b"\xff\xfe{}"), "not readable JSON"),
        (lambda d: (d / "config.json").write_text("[]"), "not a JSON object"),
        (lambda d: _edit_config(d, architectures=[]), 'lacks "architectures"'),
        (lambda d: _edit_config(d, num_hidden_layers="two"), "num_hidden_layers = 'two'"),
        (lambda d: _edit_config(d, num_key_value_heads=3), "4 heads that cannot share 3 KV heads"),
        (lambda d: _edit_config(d, quantization_config={"quant_method": "gptq"}), "quantized by gptq"),
        (lambda d: _edit_config(d, architectures=["MadeUpForCausalLM"]), "MadeUpForCausalLM is unknown"),
        (lambda d: _edit_config(d, architectures=["BertForMaskedLM"]), "BertForMaskedLM is not a causal decoder"),
        (
            lambda d: _edit_config(d, architectures=["T5ForConditionalGeneration"], model_type="t5"),
            "T5ForConditionalGeneration is not a causal decoder",
        ),
        (lambda d: _remove(d, "*.safetensors"), "holds no .*safetensors"),
        (lambda d: (_remove(d, "*.safetensors"), (d / "pytorch_model.bin").touch()), "only pickled weights"),
        (lambda d: _truncate(d, 4), "truncated"),
        (lambda d: _truncate(d, 100), "truncated"),
        (lambda d: _truncate(d, 100_000), "truncated"),
        (lambda d: (d / "model.safetensors").write_bytes(b"\x07\0\0\0\0\0\0\0<html/>"), "not a safetensors file"),
        (lambda d: (d / "model.safetensors").write_bytes(b"<html><body>Sign in</body></html>"), "not a safetensors"),
        (lambda d: _edit_weights(d, lambda t: t.update(x=torch.zeros(1, dtype=torch.int32))), "stores x as I32"),
    ],
)
def test_a_directory_that_cannot_work_is_refused_by_name(
    damage: Callable[[Path], object], message: str, checkpoint: Path
) -> None:
    damage(checkpoint)
    with pytest.raises(ConfigError, match=message):
        read_model_config(str(checkpoint))


def test_a_path_that_is_not_there_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"no/such/model does not exist.*\.gguf"):
        read_model_config("no/such/model")


def test_a_shard_that_is_not_there_is_named(sharded: Path) -> None:
    lost = sorted(sharded.glob("*.safetensors"))[1]
    lost.unlink()
    with pytest.raises(ConfigError, match=f"{lost.name} is missing"):
        read_model_config(str(sharded))


def test_an_index_that_lies_is_refused(sharded: Path) -> None:
    path = sharded / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.layers.9.input_layernorm.weight"] = sorted(sharded.glob("*.safetensors"))[0].name
    path.write_text(json.dumps(index))
    with pytest.raises(ConfigError, match=r"model\.layers\.9\.input_layernorm\.weight"):
        read_model_config(str(sharded))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.pop("model.norm.weight"), r"lacks 1 tensor \(model\.norm\.weight\)"),
        (lambda t: t.update(extra=torch.zeros(2)), r"holds 1 tensor \(extra\)"),
        (
            lambda t: t.update({"model.norm.weight": torch.zeros(3)}),
            r"stores model\.norm\.weight as \[3\].*asks for \[64\]",
        ),
    ],
)
def test_weights_that_do_not_fit_are_named(
    edit: Callable[[dict[str, Tensor]], object], message: str, checkpoint: Path, open_model: Callable[..., Any]
) -> None:
    _edit_weights(checkpoint, edit)
    with pytest.raises(ConfigError, match=message):
        open_model(checkpoint)


def test_a_stored_copy_of_a_tied_head_is_no_fault(
    tmp_path: Path, save_checkpoint: Callable[..., Any], open_model: Callable[..., Any]
) -> None:
    save_checkpoint(tmp_path, "LlamaConfig", {"tie_word_embeddings": True})
    _edit_weights(tmp_path, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    open_model(tmp_path)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}}, "'longrope' is not supported"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}}, "lacks or mistypes a field"),
        ({"hidden_act": "relu"}, "hidden_act 'relu' is not supported"),
    ],
)
def test_a_field_that_no_code_here_computes_is_named(
    fields: dict[str, Any], message: str, checkpoint: Path, open_model: Callable[..., Any]
) -> None:
    _edit_config(checkpoint, **fields)
    with pytest.raises(ConfigError, match=message):
        open_model(checkpoint)


@pytest.mark.parametrize("config_class", ["MixtralConfig", "Qwen3MoeConfig"])
def test_more_experts_per_token_than_there_are_is_refused_by_name(
    config_class: str, tmp_path: Path, save_checkpoint: Callable[..., Any], open_model: Callable[..., Any]
) -> None:
    save_checkpoint(tmp_path, config_class, {"num_local_experts": 3, "num_experts_per_tok": 2})
    _edit_config(tmp_path, num_experts_per_tok=4)
    with pytest.raises(ConfigError, match="num_experts_per_tok = 4 of 3 experts"):
        open_model(tmp_path)


def test_experts_may_be_counted_as_before_transformers_5(
    tmp_path: Path, save_checkpoint: Callable[..., Any], open_model: Callable[..., Any]
) -> None:
    save_checkpoint(tmp_path, "Qwen3MoeConfig", {"num_experts": 3, "num_experts_per_tok": 2})
    config = json.loads((tmp_path / "config.json").read_text())
    config["num_experts"] = config.pop("num_local_experts")
    (tmp_path / "config.json").write_text(json.dumps(config))
    open_model(tmp_path)


def test_reading_a_configuration_needs_neither_torch_nor_transformers(checkpoint: Path) -> None:
    code = (
        "import sys; from shoal.engine.models.registry import read_model_config; "
        f"read_model_config({str(checkpoint)!r}); sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0
