"""Models whose weights stay quantized: in memory, in any batch, and against their dequantized selves."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from shoal.engine.config import ConfigError, EngineConfig, EngineOptions, Machine, resolve
from shoal.engine.models.registry import load_model, read_model_config
from shoal.engine.parallel.collectives import SingleRank
from shoal.engine.parallel.topology import SINGLE, Topology
from shoal.engine.sizing import ModelSizing
from shoal.kernels.dispatch import operations

IDS = tuple((11 * index) % 190 + 3 for index in range(70))
# Of logits, relative in norm: inputs of each product are rounded to 8 bits, results to bfloat16 (0.022 to 0.030 seen).
TOLERANCE = 0.045
TYPES = {  # as save_gguf wants them
    "Q8_0": ["Q8_0"] * 8,
    "Q4_0": ["Q4_0"] * 8,
    "Q4_1, tied": ["Q4_1"] * 6 + ["Q8_0"],
    "mixed": ["Q4_0", "Q5_1", "Q4_1", "Q8_0", "Q4_0", "Q5_0", "Q4_1", "BF16"],
}


@pytest.fixture(scope="module", params=TYPES)
def path(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, save_gguf: Callable[..., None]
) -> Path:
    path = tmp_path_factory.mktemp("quantized") / "model.gguf"
    save_gguf(path, TYPES[request.param])
    return path


@pytest.fixture
def config(path: Path, open_config: Callable[..., EngineConfig]) -> EngineConfig:
    return open_config(path, "bfloat16", "gguf")


def logits_of(config: EngineConfig, chunk: int, paged_request: Callable[..., Any]) -> Tensor:
    """With the kernels of CPUs."""
    model = load_model(config, operations("cpu"), SINGLE, SingleRank())
    logits: Tensor = paged_request(model, config).steps(IDS, chunk)
    return logits


def difference(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def test_logits_are_those_of_the_dequantized_weights(
    path: Path, config: EngineConfig, open_config: Callable[..., EngineConfig], paged_request: Callable[..., Any]
) -> None:
    expected = logits_of(open_config(path, "float32"), 16, paged_request)
    assert 1e-4 < difference(logits_of(config, 16, paged_request), expected) < TOLERANCE


@pytest.mark.parametrize("chunk", [1, 7, 70])
def test_any_chunk_gives_the_same_bits(config: EngineConfig, chunk: int, paged_request: Callable[..., Any]) -> None:
    assert torch.equal(logits_of(config, chunk, paged_request), logits_of(config, 16, paged_request))


@pytest.mark.parametrize("shape", [(1, 1), (2, 1), (4, 1), (1, 2), (2, 2)])
def test_weights_take_exactly_what_was_computed(config: EngineConfig, shape: tuple[int, int]) -> None:
    sizing = ModelSizing(config)
    for stage in range(shape[1]):
        for tensor_rank in range(shape[0]):
            topology = Topology(tensor_rank, shape[0], stage, shape[1])
            model = load_model(config, operations("cpu"), topology, SingleRank())
            assert sizing.rank(topology).weight_bytes == model.weight_bytes, topology


def test_it_is_refused_where_it_cannot_be(path: Path, tmp_path: Path, save_checkpoint: Callable[..., Any]) -> None:
    save_checkpoint(tmp_path, "LlamaConfig", {})
    cpu, cuda = (Machine(device, 2**30, num_cores=1) for device in ("cpu", "cuda"))
    kept = EngineOptions(str(path), quantization="gguf")
    with pytest.raises(ConfigError, match="CPUs only") as refusal:
        resolve(kept, read_model_config(str(path)), cuda)
    assert refusal.value.field == "quantization"
    with pytest.raises(ConfigError, match="keeps the quantized weights of a GGUF file"):
        resolve(kept, read_model_config(str(tmp_path)), cpu)
    with pytest.raises(ConfigError, match="none, gguf, got 'int3'"):
        resolve(EngineOptions(str(path), quantization="int3"), read_model_config(str(path)), cpu)  # type: ignore[arg-type]
