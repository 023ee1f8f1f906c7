"""Ranks cover a model exactly."""

from __future__ import annotations

from itertools import chain

from hypothesis import assume, given
from hypothesis import strategies as st

from shoal.engine.parallel.topology import Topology

sizes = st.integers(1, 12)


@given(num_layers=st.integers(1, 100), num_stages=sizes)
def test_stages_cover_all_layers_in_order_and_nearly_equally(num_layers: int, num_stages: int) -> None:
    assume(num_stages <= num_layers)
    ranges = [Topology(0, 1, stage, num_stages).layer_range(num_layers) for stage in range(num_stages)]
    assert list(chain(*ranges)) == list(range(num_layers))
    assert max(map(len, ranges)) - min(map(len, ranges)) <= 1


@given(group=st.integers(1, 8), num_kv_heads=st.integers(1, 8), ranks=sizes)
def test_every_head_is_on_one_rank_beside_the_kv_head_that_it_reads(group: int, num_kv_heads: int, ranks: int) -> None:
    num_heads = group * num_kv_heads
    assume(ranks <= num_kv_heads or (ranks % num_kv_heads == 0 and ranks <= num_heads))
    shards = [Topology(rank, ranks, 0, 1).head_shard(num_heads, num_kv_heads) for rank in range(ranks)]
    assert list(chain(*(shard.heads for shard in shards))) == list(range(num_heads))
    for shard in shards:
        # Attention reads KV head h // (heads / kv_heads) of its own rank.
        local_group = len(shard.heads) / len(shard.kv_heads)
        for local, head in enumerate(shard.heads):
            assert shard.kv_heads[int(local // local_group)] == head // group


@given(vocab_size=st.integers(1, 1000), ranks=sizes)
def test_vocabulary_shares_are_equal_and_leave_nothing_out(vocab_size: int, ranks: int) -> None:
    shares = [Topology(rank, ranks, 0, 1).vocab_shard(vocab_size) for rank in range(ranks)]
    assert len({len(share) for share in shares}) == 1
    assert list(chain(*shares))[:vocab_size] == list(range(vocab_size))
