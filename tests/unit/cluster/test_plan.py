"""`shoal plan`: from a checkpoint's headers to a table, without torch and without starting anything."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from shoal.cluster import cli
from shoal.cluster.commands.gpus import local_devices, parse_gpus
from shoal.engine.config import ConfigError, ModelConfig
from shoal.engine.models.registry import FAMILIES
from shoal.engine.models.weight_shapes import expected_shapes

LLAMA_8B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128_256,
    "max_position_embeddings": 131_072,
    "rope_theta": 500_000.0,
}


@pytest.fixture(scope="module")
def llama_8b(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint directory whose 16 GB of bfloat16 weights are a hole in the file."""
    directory = tmp_path_factory.mktemp("checkpoints") / "Llama-3.1-8B"
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(LLAMA_8B))
    config = ModelConfig(
        path="", architecture="LlamaForCausalLM", num_layers=32, hidden_size=4096, num_heads=32, num_kv_heads=8,
        head_dim=128, vocab_size=128_256, max_position=131_072, layer_windows=(None,) * 32, stored_dtype="bfloat16",
        num_parameters=0, eos_token_ids=(), hf_config=LLAMA_8B,
    )  # fmt: skip
    header, end = {}, 0
    for name, shape in expected_shapes(config, FAMILIES["LlamaForCausalLM"].spec(config)).items():
        num_bytes = 2 * shape[0] * (shape[1] if len(shape) > 1 else 1)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + num_bytes]}
        end += num_bytes
    raw = json.dumps(header).encode()
    with (directory / "model.safetensors").open("wb") as stream:
        stream.write(struct.pack("<Q", len(raw)) + raw)
        stream.truncate(8 + len(raw) + end)
    return directory


def test_the_table_shows_the_formula_and_where_to_begin(llama_8b: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", str(llama_8b), "--gpus", "2x4xL4"]) == 0
    printed = capsys.readouterr().out
    assert "32 layers x 2 x 8 KV heads x 128 x 2 bytes = 131,072 bytes per token" in printed
    assert "8,030,261,248 parameters x 2 bytes (bfloat16) = 15.0 GiB" in printed
    assert "2 nodes of 4 x L4" in printed
    rows = [line.split() for line in printed.splitlines()]
    assert ["TP", "PP", "ranks"] in [row[:3] for row in rows]
    assert [row[1:5] for row in rows if row and row[0] == ">" and row[1].isdecimal()] == [["2", "1", "2", "4"]]
    assert ["8", "1"] not in [row[:2] for row in rows], "tensor ranks are on one node"


def test_json_has_every_shape_with_the_same_numbers(llama_8b: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", str(llama_8b), "--gpus", "4xH100", "--dtype", "float16", "--json"]) == 0
    (made,) = json.loads(capsys.readouterr().out)
    assert made["kv_bytes_per_token"] == 131_072
    assert made["dtype"] == "float16"
    shapes = {(shape["tensor_parallel"], shape["pipeline_parallel"]): shape for shape in made["shapes"]}
    assert len(shapes) == len(made["shapes"]) == 8
    assert [shape for shape, entry in shapes.items() if entry["is_best"]] == [(1, 1)]
    assert 2 * shapes[2, 1]["weight_bytes"] == pytest.approx(shapes[1, 1]["weight_bytes"], rel=0.01)
    for entry in shapes.values():
        assert entry["kv_tokens"] >= entry["full_requests"] * made["max_model_len"] > 0


def test_what_fits_nowhere_is_said_with_a_reason(llama_8b: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", str(llama_8b), "--gpus", "2x4GiB"]) == 1
    printed = capsys.readouterr().out
    assert "leave no room" in printed
    assert "No shape fits" in printed


def test_options_bound_every_model_of_a_configuration(
    llama_8b: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "two.yaml"
    config.write_text(f"models: [{{name: a, model: {llama_8b}}}, {{name: b, model: {llama_8b}}}]")
    assert cli.main(["plan", str(config), "--gpus", "H100", "--max-model-len", "1000", "--json"]) == 0
    plans = json.loads(capsys.readouterr().out)
    assert [(made["model"], made["max_model_len"]) for made in plans] == [("a", 1000), ("b", 1000)]


def test_planning_needs_neither_torch_nor_ray(llama_8b: Path) -> None:
    script = (
        "import sys; from shoal.cluster.cli import main\n"
        f"assert main(['plan', {str(llama_8b)!r}, '--gpus', 'H100']) == 0\n"
        "print(*{'torch', 'transformers', 'ray', 'numpy'} & set(sys.modules), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.stderr.split() == []
    assert done.returncode == 0


@pytest.mark.parametrize(
    ("text", "num_nodes", "per_node", "memory_bytes"),
    [
        ("8xH100", 1, 8, 80 * 10**9),
        ("h200", 1, 1, 141 * 10**9),
        ("2x8xH100-80GB", 2, 8, 80 * 10**9),
        ("4x24GiB", 1, 4, 24 * 2**30),
        ("3x2x1.5GB", 3, 2, 1_500_000_000),
    ],
)
def test_gpus_are_read_as_people_write_them(text: str, num_nodes: int, per_node: int, memory_bytes: int) -> None:
    devices = parse_gpus(text).devices
    assert (devices.num_nodes, devices.per_node) == (num_nodes, per_node)
    assert (devices.machine.device, devices.machine.free_bytes) == ("cuda", memory_bytes)


@pytest.mark.parametrize("text", ["", "8x", "0xH100", "8xUnknown", "2x2x2xH100", "4x24parsecs", "-1xH100"])
def test_gpus_that_are_none_are_refused_with_an_example(text: str) -> None:
    with pytest.raises(ConfigError, match=r"24GiB") as caught:
        parse_gpus(text)
    assert caught.value.field == "gpus"


def test_without_gpus_named_the_plan_is_for_this_host() -> None:
    devices = local_devices().devices
    assert devices.num_nodes == 1
    assert devices.per_node >= 1
    assert devices.machine.free_bytes > 2**20
