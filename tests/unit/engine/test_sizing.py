"""Memory of ranks by arithmetic, and the shapes that follow from it."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from shoal.engine.config import ConfigError, EngineConfig, EngineOptions, Machine, ModelConfig, resolve
from shoal.engine.memory.kv_layout import KVLayout
from shoal.engine.shapes import Devices, ShapeReport, best_shape, check_shape, shape_reports
from shoal.engine.sizing import ModelSizing, group_block_bytes

GIB = 2**30
H100 = Machine("cuda", 80 * 10**9, num_cores=16)
NORM_BYTES = 4  # of an element: norms stay in float32


def llama(*, layers: int, hidden: int, heads: int, kv_heads: int, head_dim: int, inner: int, vocab: int) -> ModelConfig:
    linears = hidden * head_dim * (2 * heads + 2 * kv_heads) + 3 * hidden * inner
    return ModelConfig(
        path="llama",
        architecture="LlamaForCausalLM",
        num_layers=layers,
        hidden_size=hidden,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        vocab_size=vocab,
        max_position=131_072,
        layer_windows=(None,) * layers,
        stored_dtype="bfloat16",
        num_parameters=2 * vocab * hidden + layers * (linears + 2 * hidden) + hidden,
        eos_token_ids=(0,),
        hf_config={"intermediate_size": inner},
    )


LLAMA_8B = llama(layers=32, hidden=4096, heads=32, kv_heads=8, head_dim=128, inner=14_336, vocab=128_256)
LLAMA_70B = llama(layers=80, hidden=8192, heads=64, kv_heads=8, head_dim=128, inner=28_672, vocab=128_256)
SMALL = llama(layers=6, hidden=1024, heads=16, kv_heads=4, head_dim=64, inner=4096, vocab=32_000)


def config_of(model: ModelConfig, machine: Machine = H100, **options: Any) -> EngineConfig:
    return resolve(EngineOptions(model="llama", **options), model, machine)


def report_of(reports: list[ShapeReport], tensor_parallel: int, pipeline_parallel: int) -> ShapeReport:
    shape = (tensor_parallel, pipeline_parallel)
    return next(report for report in reports if (report.tensor_parallel, report.pipeline_parallel) == shape)


def test_llama_3_8b_has_its_published_size_and_128_kib_of_kv_per_token() -> None:
    assert LLAMA_8B.num_parameters == 8_030_261_248
    (whole,) = ModelSizing(config_of(LLAMA_8B)).group(1, 1)
    assert whole.kv_bytes_per_token == 131_072  # 32 layers x 2 x 8 KV heads x 128 x 2 bytes
    norms = (2 * 32 + 1) * 4096
    assert whole.weight_bytes == 2 * (8_030_261_248 - norms) + NORM_BYTES * norms


@given(
    layers=st.integers(1, 7),
    group=st.integers(1, 4),
    kv_heads=st.integers(1, 6),
    inner=st.integers(12, 60),
    vocab=st.integers(1, 300),
    tensor_parallel=st.integers(1, 8),
    pipeline_parallel=st.integers(1, 7),
)
def test_ranks_hold_the_whole_model_once_but_for_norms_padding_and_kv_heads_kept_twice(
    layers: int, group: int, kv_heads: int, inner: int, vocab: int, tensor_parallel: int, pipeline_parallel: int
) -> None:
    heads, hidden, head_dim = group * kv_heads, 32, 8
    assume(pipeline_parallel <= layers)
    assume(tensor_parallel <= kv_heads or (tensor_parallel % kv_heads == 0 and tensor_parallel <= heads))
    model = llama(
        layers=layers, hidden=hidden, heads=heads, kv_heads=kv_heads, head_dim=head_dim, inner=inner, vocab=vocab
    )
    sizing = ModelSizing(config_of(model))
    (whole,) = sizing.group(1, 1)
    ranks = sizing.group(tensor_parallel, pipeline_parallel)
    assert len(ranks) == tensor_parallel * pipeline_parallel
    copies = max(tensor_parallel - kv_heads, 0)  # of a KV head, beyond the first
    norms = (tensor_parallel - 1) * (2 * layers + 1) * hidden * NORM_BYTES
    padding = -vocab % tensor_parallel * 2 * hidden * 2  # rows of two tables
    kept_twice = copies * layers * 2 * head_dim * hidden * 2
    assert sum(rank.weight_bytes for rank in ranks) == whole.weight_bytes + norms + padding + kept_twice
    kv_bytes = sum(rank.kv_bytes_per_token for rank in ranks)
    assert kv_bytes == whole.kv_bytes_per_token // kv_heads * (kv_heads + copies)


@pytest.mark.parametrize("tensor_parallel", [1, 2, 4, 8])
def test_tensor_ranks_of_a_large_model_are_within_a_hundredth_of_their_share(tensor_parallel: int) -> None:
    sizing = ModelSizing(config_of(LLAMA_70B))
    (whole,) = sizing.group(1, 1)
    for rank in sizing.group(tensor_parallel, 1):
        assert whole.weight_bytes <= tensor_parallel * rank.weight_bytes <= 1.01 * whole.weight_bytes


def test_layers_can_be_dealt_by_hand() -> None:
    first, last = ModelSizing(config_of(SMALL)).group(1, 2, stage_layers=(1, 5))
    assert last.kv_bytes_per_token == 5 * first.kv_bytes_per_token


def test_a_pool_is_as_large_as_the_memory_and_no_larger() -> None:
    config = config_of(LLAMA_8B)
    for report in shape_reports(config, Devices(H100, 4)):
        assert report.fits
        usable = int(H100.free_bytes * config.memory_fraction)
        block_bytes = [rank.kv_bytes_per_token * config.block_size for rank in report.ranks]
        left = [
            usable - rank.weight_bytes - rank.activation_bytes - report.num_blocks * block
            for rank, block in zip(report.ranks, block_bytes, strict=True)
        ]
        assert min(left) >= 0
        assert any(rest < block for rest, block in zip(left, block_bytes, strict=True))


@settings(deadline=None)
@given(mib=st.integers(100, 2000), tensor_parallel=st.integers(1, 4), pipeline_parallel=st.integers(1, 2))
def test_a_shape_is_refused_exactly_if_its_report_says_so(
    mib: int, tensor_parallel: int, pipeline_parallel: int
) -> None:
    machine = Machine("cuda", mib * 2**20, num_cores=8)
    config = config_of(SMALL, machine, tensor_parallel=tensor_parallel, pipeline_parallel=pipeline_parallel)
    report = report_of(shape_reports(config, Devices(machine, 8)), tensor_parallel, pipeline_parallel)
    if report.fits:
        check_shape(config, machine)
        return
    with pytest.raises(ConfigError, match="fit"):
        check_shape(config, machine)


@pytest.mark.parametrize(
    ("options", "field", "reason"),
    [
        ({"tensor_parallel": 12}, "tensor_parallel", "12 tensor ranks cannot share 64 heads with 8 KV heads"),
        ({"pipeline_parallel": 81}, "pipeline_parallel", "81 pipeline stages are more than the model's 80 layers"),
        ({"tensor_parallel": 2}, "tensor_parallel", "65.7 GiB of weights"),
        ({"pipeline_parallel": 2}, "pipeline_parallel", "65.7 GiB of weights"),
    ],
)
def test_a_refusal_names_the_setting_and_shapes_that_fit(options: dict[str, int], field: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=f"{reason}.*Shapes that fit") as caught:
        check_shape(config_of(LLAMA_70B, **options), H100)
    assert caught.value.field == field
    named = re.findall(r"(\d+) x (\d+) \(([\d,]+) KV tokens\)", str(caught.value))
    assert len(named) >= 3
    for tensor_parallel, pipeline_parallel, _ in named:
        shape = {"tensor_parallel": int(tensor_parallel), "pipeline_parallel": int(pipeline_parallel)}
        check_shape(config_of(LLAMA_70B, **shape), H100)


def test_a_refusal_tells_the_kv_tokens_of_other_shapes() -> None:
    (report,) = (
        report for report in shape_reports(config_of(LLAMA_70B), Devices(H100, 4)) if report.tensor_parallel == 4
    )
    with pytest.raises(ConfigError, match=rf"4 x 1 \({report.kv_tokens:,} KV tokens\)"):
        check_shape(config_of(LLAMA_70B, tensor_parallel=2), H100)


def test_nothing_that_fits_is_said_too() -> None:
    machine = Machine("cuda", GIB, num_cores=8)
    with pytest.raises(ConfigError, match="No other shape"):
        check_shape(config_of(LLAMA_70B, machine), machine)


def test_ranks_of_one_cpu_share_its_memory() -> None:
    config = config_of(SMALL, Machine("cpu", 8 * GIB, num_cores=4), tensor_parallel=2, kv_memory_bytes=GIB // 4)
    need = sum(rank.weight_bytes + rank.activation_bytes for rank in ModelSizing(config).group(2, 1)) + GIB // 4
    check_shape(config, Machine("cpu", need, num_cores=4))
    with pytest.raises(ConfigError, match="of a host"):
        check_shape(config, Machine("cpu", need - GIB // 32, num_cores=4))
    check_shape(config, Machine("cpu", need * 6 // 10, num_cores=4), ranks_on_host=1)  # two hosts


def test_kv_memory_is_of_all_ranks_and_copied_kv_heads_count() -> None:
    reports = shape_reports(config_of(SMALL, kv_memory_bytes=GIB), Devices(H100, 8))
    whole = KVLayout.of(config_of(SMALL))
    assert report_of(reports, 1, 1).num_blocks == report_of(reports, 4, 2).num_blocks == whole.blocks_in(GIB)
    assert report_of(reports, 8, 1).num_blocks == GIB // (2 * whole.bytes_per_block)
    assert group_block_bytes(config_of(SMALL, tensor_parallel=8)) == 2 * whole.bytes_per_block


def test_a_pool_that_was_asked_for_and_is_too_large_is_named() -> None:
    machine = Machine("cuda", 2 * GIB, num_cores=8)
    with pytest.raises(ConfigError, match="KV pool") as caught:
        check_shape(config_of(SMALL, machine, kv_memory_bytes=2 * GIB, max_model_len=4096), machine)
    assert caught.value.field == "kv_memory_bytes"


def test_groups_are_placed_with_the_tensor_ranks_of_a_stage_on_one_node() -> None:
    devices = Devices(H100, per_node=4, num_nodes=2)
    assert devices.num_replicas(4, 1) == 2
    assert devices.num_replicas(3, 1) == 2  # one GPU of each node stays idle
    assert devices.num_replicas(4, 2) == 1
    assert devices.num_replicas(8, 1) == 0
    assert all(report.tensor_parallel <= 4 for report in shape_reports(config_of(SMALL), devices))


@pytest.mark.parametrize(
    ("model", "num_gpus", "expected"),
    [(LLAMA_8B, 8, (1, 1)), (LLAMA_70B, 8, (4, 1)), (LLAMA_70B, 3, (3, 1)), (LLAMA_70B, 1, None)],
)
def test_the_shape_to_begin_with_has_the_fewest_ranks_that_hold_a_full_request(
    model: ModelConfig, num_gpus: int, expected: tuple[int, int] | None
) -> None:
    devices = Devices(H100, num_gpus)
    best = best_shape(shape_reports(config_of(model), devices), devices)
    assert (best and (best.tensor_parallel, best.pipeline_parallel)) == expected


def test_stages_are_preferred_where_tensor_ranks_would_copy_kv_heads() -> None:
    one_kv_head = replace(LLAMA_70B, num_kv_heads=1)
    devices = Devices(H100, 4)
    best = best_shape(shape_reports(config_of(one_kv_head), devices), devices)
    assert best is not None
    assert best.pipeline_parallel > 1


def test_what_transformers_runs_has_one_rank() -> None:
    model = replace(LLAMA_8B, architecture="GPTNeoXForCausalLM")
    reports = shape_reports(config_of(model), Devices(H100, 2))
    assert [report.fits for report in reports] == [True, False, False]
    with pytest.raises(ConfigError, match="on one rank only"):
        check_shape(config_of(model, tensor_parallel=2), H100)
