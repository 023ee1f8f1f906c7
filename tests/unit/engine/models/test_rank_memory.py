"""What sizing says of a rank is what the rank takes once it is loaded."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from shoal.engine.config import EngineConfig
from shoal.engine.layers.attention import AttentionBatch
from shoal.engine.models.registry import load_model
from shoal.engine.parallel.collectives import SingleRank
from shoal.engine.parallel.topology import SINGLE, Topology
from shoal.engine.sizing import ModelSizing, rank_layout
from shoal.kernels.dispatch import operations, reference

BLOCK_SIZE = 16
NUM_TOKENS, NUM_ROWS = 128, 48

# Three KV heads: two ranks get unequal shares; two KV heads: four ranks keep each twice. The vocabulary is uneven too.
_UNEVEN = {
    "hidden_size": 48,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 8,
    "intermediate_size": 98,
}
_EXPERTS = {"num_local_experts": 5, "num_experts_per_tok": 2}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "llama tied and biased": (
        "LlamaConfig",
        {**_UNEVEN, "tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
    ),
    "mistral": ("MistralConfig", _UNEVEN),
    "mixtral": ("MixtralConfig", _EXPERTS),
    "qwen2": ("Qwen2Config", _UNEVEN),
    "qwen3": ("Qwen3Config", {"head_dim": 16}),
    "qwen3-moe, dense in part": (
        "Qwen3MoeConfig",
        {**_UNEVEN, "num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 31, "mlp_only_layers": [1]},
    ),
    "smollm3": ("SmolLM3Config", {}),
    "gemma2": ("Gemma2Config", {"head_dim": 16}),
    "gemma3": ("Gemma3TextConfig", {"head_dim": 16}),
}
SHAPES = [(1, 1), (2, 1), (3, 1), (4, 1), (1, 2), (1, 3), (2, 3), (3, 2)]


@pytest.fixture(scope="module", params=CASES)
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, save_checkpoint: Any) -> Path:
    directory = tmp_path_factory.mktemp("sized")
    save_checkpoint(directory, *CASES[request.param])
    return directory


def topologies(config: EngineConfig, tensor_parallel: int, pipeline_parallel: int) -> Iterator[Topology]:
    """Of every rank; none for more tensor ranks than the KV heads allow."""
    num_kv_heads = config.model.num_kv_heads
    if tensor_parallel > num_kv_heads and tensor_parallel % num_kv_heads:
        return
    for stage in range(pipeline_parallel):
        for tensor_rank in range(tensor_parallel):
            yield Topology(tensor_rank, tensor_parallel, stage, pipeline_parallel)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_weights_take_exactly_what_was_computed(
    dtype: str, path: Path, open_config: Callable[..., EngineConfig]
) -> None:
    config = open_config(path, dtype)
    sizing = ModelSizing(config)
    seen = 0
    for shape in SHAPES if dtype == "bfloat16" else [(1, 1), (2, 2)]:
        for topology in topologies(config, *shape):
            model = load_model(config, operations("cpu"), topology, SingleRank())
            assert sizing.rank(topology).weight_bytes == model.weight_bytes, topology
            seen += 1
    assert seen >= 5


def test_a_tied_head_takes_no_memory_where_the_table_can_be_multiplied_as_it_is(
    tmp_path: Path, save_checkpoint: Callable[..., Any], open_config: Callable[..., EngineConfig]
) -> None:
    save_checkpoint(tmp_path, "LlamaConfig", {"tie_word_embeddings": True})
    config = open_config(tmp_path)
    model = load_model(config, reference(), SINGLE, SingleRank())
    assert ModelSizing(replace(config, device="cuda")).rank(SINGLE).weight_bytes == model.weight_bytes


class ExchangingRank:
    """Collectives of one of several CPU ranks: a buffer for the parts of all stays from call to call."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._buffer = torch.empty(0, dtype=torch.uint8)

    def all_reduce(self, x: Tensor) -> Tensor:
        if len(self._buffer) < self._size * x.nbytes:
            self._buffer = torch.empty(self._size * x.nbytes, dtype=torch.uint8)
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        return torch.cat([x] * self._size, dim=-1)


class PeakMemory(TorchDispatchMode):
    """The most bytes that tensors made within it held at one time."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._live: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = storages((args, kwargs))
        result = func(*args, **(kwargs or {}))
        self._live = {key: entry for key, entry in self._live.items() if not entry[0].expired()}
        for key, storage in storages(result).items():
            if key not in given and key not in self._live:
                self._live[key] = (StorageWeakRef(storage), storage.nbytes())
        self.peak = max(self.peak, sum(num_bytes for _, num_bytes in self._live.values()))
        return result


def storages(tree: Any) -> dict[int, torch.UntypedStorage]:
    """Of all tensors in nested arguments, by address of their owner. Weights packed by oneDNN have none."""
    tensors = [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor) and not leaf.is_mkldnn]
    return {storage._cdata: storage for storage in (tensor.untyped_storage() for tensor in tensors)}


@pytest.mark.parametrize("topology", [SINGLE, Topology(0, 2, 0, 2), Topology(1, 2, 1, 2)], ids=repr)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_step_of_the_most_tokens_stays_below_the_bound_for_activations(
    dtype: str, topology: Topology, path: Path, open_config: Callable[..., EngineConfig]
) -> None:
    config = replace(open_config(path, dtype), max_step_tokens=NUM_TOKENS, max_running_requests=NUM_ROWS)
    collectives = SingleRank() if topology.tensor_size == 1 else ExchangingRank(topology.tensor_size)
    model = load_model(config, operations("cpu"), topology, collectives)
    layout = replace(rank_layout(config, topology), block_size=BLOCK_SIZE)
    num_blocks = NUM_TOKENS // BLOCK_SIZE
    pool = torch.zeros(layout.shape(num_blocks), dtype=getattr(torch, dtype))
    batch = AttentionBatch(
        slots=torch.arange(NUM_TOKENS),
        block_tables=torch.arange(num_blocks, dtype=torch.int32)[None],
        query_starts=torch.tensor([0, NUM_TOKENS], dtype=torch.int32),
        context_lens=torch.tensor([NUM_TOKENS], dtype=torch.int32),
        max_query_len=NUM_TOKENS,
    )
    ids = torch.arange(NUM_TOKENS)
    with torch.inference_mode(), PeakMemory() as memory:
        received = None
        if not topology.is_first_stage:
            received = torch.zeros(NUM_TOKENS, config.model.hidden_size, dtype=getattr(torch, dtype))
        hidden = model.forward(ids, ids, batch, pool.unbind(1), received)
        if topology.is_last_stage:
            model.logits(hidden[:NUM_ROWS])
    bound = ModelSizing(config).rank(topology).activation_bytes
    assert memory.peak <= bound <= 2.25 * memory.peak
