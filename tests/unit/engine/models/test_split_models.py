"""A model split over tensor ranks or stages computes what the whole model does."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from shoal.engine.config import ConfigError, EngineConfig
from shoal.engine.layers.attention import AttentionBatch
from shoal.engine.models.decoder import Decoder
from shoal.engine.models.registry import load_model
from shoal.engine.parallel.collectives import SingleRank
from shoal.engine.parallel.topology import SINGLE, Topology
from shoal.kernels.dispatch import reference

IDS = torch.arange(3, 33)  # [30]
BLOCK_SIZE = 8
TOLERANCE = 1e-5  # of fp32 logits with a range of about 10; only the order of sums differs


class ThreadRanks:
    """Collectives of ranks that run as threads of this process."""

    def __init__(self, size: int) -> None:
        self._barrier = threading.Barrier(size, timeout=20)
        self._parts: list[Tensor | None] = [None] * size

    def of_rank(self, rank: int) -> ThreadRank:
        return ThreadRank(self, rank)

    def exchange(self, rank: int, x: Tensor) -> list[Tensor]:
        self._parts[rank] = x.clone()
        self._barrier.wait()
        parts = [part for part in self._parts if part is not None]
        self._barrier.wait()
        return parts


class ThreadRank:
    def __init__(self, ranks: ThreadRanks, rank: int) -> None:
        self._ranks = ranks
        self._rank = rank

    def all_reduce(self, x: Tensor) -> Tensor:
        return torch.stack(self._ranks.exchange(self._rank, x)).sum(0)

    def all_gather(self, x: Tensor) -> Tensor:
        return torch.cat(self._ranks.exchange(self._rank, x), dim=-1)


def _batch(num_tokens: int) -> AttentionBatch:
    num_blocks = -(-num_tokens // BLOCK_SIZE)
    return AttentionBatch(
        slots=torch.arange(num_tokens),
        block_tables=torch.arange(num_blocks, dtype=torch.int32)[None],
        query_starts=torch.tensor([0, num_tokens], dtype=torch.int32),
        context_lens=torch.tensor([num_tokens], dtype=torch.int32),
        max_query_len=num_tokens,
    )


def _run_stage(config: EngineConfig, model: Any, topology: Topology, hidden: Tensor | None = None) -> Tensor:
    facts = config.model
    kv_heads = len(topology.head_shard(facts.num_heads, facts.num_kv_heads).kv_heads)
    shape = (4, 2, kv_heads, BLOCK_SIZE, facts.head_dim)
    kv = [torch.zeros(shape) for _ in model.layer_range]
    with torch.inference_mode():
        states: Tensor = model.forward(IDS, torch.arange(len(IDS)), _batch(len(IDS)), kv, hidden)
    return states


def _whole_logits(config: EngineConfig) -> Tensor:
    model = load_model(config, reference(), SINGLE, SingleRank())
    with torch.inference_mode():
        return model.logits(_run_stage(config, model, SINGLE))


def _rank_logits(config: EngineConfig, rank: int, size: int, ranks: ThreadRanks) -> tuple[Tensor, int]:
    topology = Topology(rank, size, 0, 1)
    model = load_model(config, reference(), topology, ranks.of_rank(rank))
    with torch.inference_mode():
        return model.logits(_run_stage(config, model, topology)), model.weight_bytes


def _tensor_parallel_logits(config: EngineConfig, size: int) -> list[tuple[Tensor, int]]:
    """Of each rank: its columns of the logits, and the bytes of its weights."""
    ranks = ThreadRanks(size)
    with ThreadPoolExecutor(size) as pool:
        futures = [pool.submit(_rank_logits, config, rank, size, ranks) for rank in range(size)]
        return [future.result(timeout=60) for future in futures]


SIX_HEADS = {"hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 3}
MOE = {"head_dim": 16, "num_experts": 7, "num_experts_per_tok": 3, "moe_intermediate_size": 40, "mlp_only_layers": [1]}

CASES: dict[str, tuple[str, dict[str, Any], int]] = {
    "tied and biased": (
        "LlamaConfig", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}, 2,
    ),
    "untied": ("LlamaConfig", {}, 2),
    "unequal shares": ("LlamaConfig", SIX_HEADS, 2),
    "more ranks than KV heads": ("Qwen2Config", {}, 4),
    "q/k norms": ("Qwen3Config", {"head_dim": 16}, 2),
    "soft-caps and windows": ("Gemma2Config", {"head_dim": 16, "sliding_window": 7}, 2),
    "experts on 2 ranks": ("MixtralConfig", {"num_local_experts": 5}, 2),
    "experts on 3 ranks, unequal shares": ("Qwen3MoeConfig", {**MOE, **SIX_HEADS}, 3),
    "experts on 4 ranks": ("Qwen3MoeConfig", MOE, 4),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_tensor_ranks_together_equal_one_rank(
    name: str, tmp_path: Path, save_checkpoint: Callable[..., Any], open_config: Callable[..., EngineConfig]
) -> None:
    config_class, fields, size = CASES[name]
    save_checkpoint(tmp_path, config_class, fields)
    config = open_config(tmp_path)
    expected = _whole_logits(config)  # [tokens, vocab]
    parts = [logits for logits, _ in _tensor_parallel_logits(config, size)]
    assert len({part.shape for part in parts}) == 1
    found = torch.cat(parts, dim=1)
    vocab_size = expected.shape[1]
    assert (found[:, :vocab_size] - expected).abs().max() <= TOLERANCE
    assert found.shape[1] > vocab_size, "no column pads this vocabulary"
    assert (found[:, vocab_size:] == -torch.inf).all()


# Four ranks share 192 inner features in 48s, which are no whole blocks: the matrix that reads them is dequantized.
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_1"])
def test_tensor_ranks_share_weights_that_stay_quantized(
    kind: str, size: int, tmp_path: Path, save_gguf: Callable[..., None],
    open_config: Callable[..., EngineConfig],
) -> None:  # fmt: skip
    path = tmp_path / "model.gguf"
    save_gguf(path, [kind] * 7)
    config = open_config(path, "float32", "gguf")
    expected = _whole_logits(config)
    parts = _tensor_parallel_logits(config, size)
    found = torch.cat([logits for logits, _ in parts], dim=1)[:, : expected.shape[1]]
    assert (found - expected).abs().max() <= TOLERANCE
    if size == 2:
        whole = load_model(config, reference(), SINGLE, SingleRank()).weight_bytes
        assert sum(num_bytes for _, num_bytes in parts) < 1.1 * whole


def test_tensor_ranks_share_the_memory(
    tmp_path: Path, save_checkpoint: Callable[..., Any], open_config: Callable[..., EngineConfig]
) -> None:
    save_checkpoint(tmp_path, "LlamaConfig", {})
    config = open_config(tmp_path)
    whole = load_model(config, reference(), SINGLE, SingleRank()).weight_bytes
    shares = [weight_bytes for _, weight_bytes in _tensor_parallel_logits(config, 2)]
    repeated = 9 * config.model.hidden_size * 4  # norms are on every rank
    padded = config.model.hidden_size * 4 * 2  # one row of each table, as 199 is odd
    assert sum(shares) == whole + repeated + padded


@pytest.mark.parametrize("size", [2, 3, 4])
def test_every_tensor_rank_holds_its_share_of_the_experts(
    size: int, tmp_path: Path, save_checkpoint: Callable[..., Any], open_config: Callable[..., EngineConfig]
) -> None:
    heads = {"num_attention_heads": 12, "num_key_value_heads": 12, "head_dim": 4, "num_local_experts": 9}
    save_checkpoint(tmp_path, "MixtralConfig", heads)
    config = open_config(tmp_path)
    share = load_model(config, reference(), SINGLE, SingleRank()).weight_bytes / size
    for _, weight_bytes in _tensor_parallel_logits(config, size):
        assert abs(weight_bytes - share) <= 0.1 * share


@pytest.mark.parametrize(
    ("config_class", "fields"),
    [
        ("LlamaConfig", {"tie_word_embeddings": True}),
        ("LlamaConfig", {"tie_word_embeddings": False}),
        ("Qwen3MoeConfig", MOE),
    ],
)
def test_stages_in_a_row_equal_one_stage_bit_for_bit(
    config_class: str,
    fields: dict[str, Any],
    tmp_path: Path,
    save_checkpoint: Callable[..., Any],
    open_config: Callable[..., EngineConfig],
) -> None:
    save_checkpoint(tmp_path, config_class, fields)
    config = open_config(tmp_path)
    hidden = None
    covered: list[int] = []
    for stage in range(3):
        topology = Topology(0, 1, stage, 3)
        model = load_model(config, reference(), topology, SingleRank())
        assert isinstance(model, Decoder)
        covered.extend(model.layer_range)
        hidden = _run_stage(config, model, topology, hidden)
    assert covered == [0, 1, 2, 3]
    assert hidden is not None
    with torch.inference_mode():
        assert torch.equal(model.logits(hidden), _whole_logits(config))


def test_every_stage_reports_its_own_progress_to_the_end(
    tmp_path: Path, save_checkpoint: Callable[..., Any], open_config: Callable[..., EngineConfig]
) -> None:
    save_checkpoint(tmp_path, "LlamaConfig", {})
    config = open_config(tmp_path)
    totals = []
    for stage in range(2):
        seen: list[tuple[int, int]] = []
        load_model(config, reference(), Topology(0, 1, stage, 2), SingleRank(), lambda *at, seen=seen: seen.append(at))
        assert seen == sorted(seen)
        assert seen[-1][0] == seen[-1][1]
        totals.append(seen[-1][1])
    assert sum(totals) == config.model.num_parameters * 4


@pytest.mark.parametrize(
    ("topology", "way_out"),
    [(Topology(0, 3, 0, 1), "multiple of 2 up to 4"), (Topology(0, 1, 0, 5), "at most 4 stages")],
)
def test_a_split_that_cannot_be_is_refused_by_name(
    topology: Topology,
    way_out: str,
    tmp_path: Path,
    save_checkpoint: Callable[..., Any],
    open_config: Callable[..., EngineConfig],
) -> None:
    save_checkpoint(tmp_path, "LlamaConfig", {})
    with pytest.raises(ConfigError, match=way_out):
        load_model(open_config(tmp_path), reference(), topology, SingleRank())
