"""KV sizes by the formula, against figures that can be checked by hand."""

from __future__ import annotations

import pytest

from shoal.engine.config import ConfigError
from shoal.engine.memory.kv_layout import KVLayout, blocks_needed, check_pool

SMOLLM2 = KVLayout(num_layers=30, num_kv_heads=3, head_dim=64, block_size=16, element_bytes=2)
LLAMA_3_8B = KVLayout(num_layers=32, num_kv_heads=8, head_dim=128, block_size=16, element_bytes=2)


def test_kv_heads_not_query_heads_decide():
    assert SMOLLM2.bytes_per_token == 23_040  # 9 query heads would make it 69,120
    assert LLAMA_3_8B.bytes_per_token == 131_072
    assert LLAMA_3_8B.blocks_in(2**30) == 512


def test_blocks_needed():
    assert [blocks_needed(n, 16) for n in (0, 1, 16, 17)] == [0, 1, 1, 2]


def test_pool_limits_the_model_length(make_config):
    config = make_config(block_size=16)
    assert check_pool(config, 11) == 160
    assert check_pool(config, 10_000) == config.max_model_len
    with pytest.raises(ConfigError, match="even one request") as caught:
        check_pool(config, 2)
    assert caught.value.field == "kv_memory_bytes"


def test_settings_that_cannot_work_are_named(make_config):
    for field, value in (
        ("max_model_len", 5000),
        ("block_size", 0),
        ("max_step_tokens", -1),
        ("watermark", 1.0),
        ("ageing_s", 0.0),
        ("scheduling_policy", "lifo"),
        ("dtype", "int3"),
        ("num_threads", 0),
    ):
        with pytest.raises(ConfigError) as caught:
            make_config(**{field: value})
        assert caught.value.field == field
    with pytest.raises(ConfigError, match="max_running_requests"):
        make_config(max_running_requests=64, max_step_tokens=32)
