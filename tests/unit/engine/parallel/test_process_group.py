"""Ranks as threads of this process, over real gloo connections."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

from shoal.engine.config import EngineConfig, EngineOptions, Machine, ModelConfig, resolve
from shoal.engine.parallel.collectives import Collectives, SingleRank
from shoal.engine.parallel.pipeline import SingleStage, StageLinks
from shoal.engine.parallel.process_group import connect, interface_of, join_store, open_store
from shoal.engine.parallel.topology import Topology

HOST = "127.0.0.1"
TIMEOUT_S = 20.0
HIDDEN = 8
MODEL = ModelConfig(
    path="tiny",
    architecture="LlamaForCausalLM",
    num_layers=4,
    hidden_size=HIDDEN,
    num_heads=4,
    num_kv_heads=4,
    head_dim=2,
    vocab_size=97,
    max_position=64,
    layer_windows=(None,) * 4,
    stored_dtype="float32",
    num_parameters=1,
    eos_token_ids=(0,),
    hf_config={},
)

Rank = Callable[[Topology, Collectives, StageLinks], Any]


def a_config(tensor_parallel: int, pipeline_parallel: int, dtype: str) -> EngineConfig:
    options = EngineOptions(
        "tiny", dtype=dtype, tensor_parallel=tensor_parallel, pipeline_parallel=pipeline_parallel, device="cpu"
    )
    return resolve(options, MODEL, Machine("cpu", 2**30, 1))


def on_ranks(run: Rank, *, tensor_parallel: int = 1, pipeline_parallel: int = 1, dtype: str = "float32") -> list[Any]:
    """What `run` answers on each rank of a group, all at once."""
    config = a_config(tensor_parallel, pipeline_parallel, dtype)
    opened = open_store(HOST)
    are_done = threading.Barrier(config.num_ranks)

    def be(rank: int) -> Any:
        topology = Topology.of_rank(rank, config)
        collectives, links = connect(topology, config, join_store(HOST, opened.port), HOST, TIMEOUT_S)
        answer = run(topology, collectives, links)
        are_done.wait(TIMEOUT_S)  # a rank's connections are open as long as any other needs them
        return answer

    with ThreadPoolExecutor(config.num_ranks) as pool:
        return list(pool.map(be, range(config.num_ranks)))


def values_of(rank: int, dtype: torch.dtype, rows: int) -> Tensor:
    generator = torch.Generator().manual_seed(rank)
    return torch.randn(rows, HIDDEN, generator=generator).to(dtype)


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sum_over_ranks_is_the_plain_sum_in_rank_order_bit_for_bit(size: int, dtype: torch.dtype) -> None:
    def run(topology: Topology, collectives: Collectives, links: StageLinks) -> Tensor:
        return collectives.all_reduce(values_of(topology.tensor_rank, dtype, rows=5))

    sums = on_ranks(run, tensor_parallel=size)
    expected = values_of(0, dtype, rows=5)
    for rank in range(1, size):
        expected = expected + values_of(rank, dtype, rows=5)
    for total in sums:
        torch.testing.assert_close(total, expected, rtol=0, atol=0)


def test_the_sum_of_a_row_does_not_depend_on_the_rows_beside_it() -> None:
    def run(topology: Topology, collectives: Collectives, links: StageLinks) -> tuple[Tensor, Tensor]:
        many = values_of(topology.tensor_rank, torch.bfloat16, rows=32)
        return collectives.all_reduce(many[:1].clone()), collectives.all_reduce(many.clone())

    for alone, among_others in on_ranks(run, tensor_parallel=3):
        assert torch.equal(alone[0], among_others[0])


def test_a_sum_stays_what_it_was_when_the_next_one_is_made() -> None:
    def run(topology: Topology, collectives: Collectives, links: StageLinks) -> list[float]:
        first = collectives.all_reduce(torch.ones(4))
        second = collectives.all_reduce(torch.full((2,), 5.0))
        return [float(first.sum()), float(second.sum())]

    assert on_ranks(run, tensor_parallel=2) == [[8.0, 20.0]] * 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_gathering_puts_the_ranks_side_by_side_along_the_last_dimension(dtype: torch.dtype) -> None:
    def run(topology: Topology, collectives: Collectives, links: StageLinks) -> Tensor:
        mine = torch.tensor([[1, 2], [3, 4]]) + 10 * topology.tensor_rank
        return collectives.all_gather(mine.to(dtype).t().contiguous().t())  # strided, as a slice would be

    expected = torch.tensor([[1, 2, 11, 12, 21, 22], [3, 4, 13, 14, 23, 24]]).to(dtype)
    for gathered in on_ranks(run, tensor_parallel=3):
        assert torch.equal(gathered, expected)


def test_exchanging_nothing_is_allowed() -> None:
    def run(topology: Topology, collectives: Collectives, links: StageLinks) -> tuple[int, ...]:
        collectives.all_reduce(torch.empty(0, HIDDEN))
        return tuple(collectives.all_gather(torch.empty(0, 3)).shape)

    assert on_ranks(run, tensor_parallel=2) == [(0, 6)] * 2


@pytest.mark.parametrize(("tensor_parallel", "num_stages"), [(1, 2), (1, 3), (2, 2)])
def test_hidden_states_pass_through_the_stages_in_order(tensor_parallel: int, num_stages: int) -> None:
    num_steps = 6  # more than may be on the way at once

    def run(topology: Topology, collectives: Collectives, links: StageLinks) -> list[Tensor]:
        seen = []
        links.expect_hidden(1)
        for step in range(num_steps):
            links.expect_hidden(step + 2)  # always one ahead
            hidden = links.receive_hidden()
            if hidden is None:
                hidden = torch.full((step + 1, HIDDEN), 100.0 * step + topology.tensor_rank)
            seen.append(hidden)
            links.send_hidden(hidden + 1)
        return seen

    for rank, seen in enumerate(on_ranks(run, tensor_parallel=tensor_parallel, pipeline_parallel=num_stages)):
        stage, tensor_rank = divmod(rank, tensor_parallel)
        for step, hidden in enumerate(seen):
            assert torch.equal(hidden, torch.full((step + 1, HIDDEN), 100.0 * step + tensor_rank + stage))


def test_hidden_states_arrive_in_the_models_dtype() -> None:
    def run(topology: Topology, collectives: Collectives, links: StageLinks) -> Tensor | None:
        links.expect_hidden(2)
        links.send_hidden(torch.full((2, HIDDEN), 0.5, dtype=torch.bfloat16))
        return links.receive_hidden()

    _, received = on_ranks(run, pipeline_parallel=2, dtype="bfloat16")
    assert torch.equal(received, torch.full((2, HIDDEN), 0.5, dtype=torch.bfloat16))


def test_tokens_reach_the_first_stage_after_several_sends() -> None:
    sent = threading.Event()

    def run(topology: Topology, collectives: Collectives, links: StageLinks) -> list[list[int]]:
        links.send_tokens(torch.tensor([1, 2, 3]))
        links.send_tokens(torch.tensor([4]))  # nobody has received the first one yet
        if topology.is_last_stage:
            sent.set()
        if not topology.is_first_stage:
            return []
        assert sent.wait(TIMEOUT_S)
        return [links.receive_tokens(count).tolist() for count in (3, 1)]

    answers = on_ranks(run, pipeline_parallel=3)
    assert answers == [[[1, 2, 3], [4]], [], []]


def test_what_is_alone_makes_no_connection() -> None:
    config = a_config(1, 1, "float32")
    collectives, links = connect(Topology.of_rank(0, config), config, open_store(HOST), HOST, TIMEOUT_S)
    assert isinstance(collectives, SingleRank)
    assert isinstance(links, SingleStage)


def test_a_rank_that_does_not_come_is_not_waited_for_forever() -> None:
    config = a_config(2, 1, "float32")
    with pytest.raises(RuntimeError):
        connect(Topology.of_rank(0, config), config, open_store(HOST), HOST, timeout_s=0.5)


def test_the_interface_of_an_address_is_found_by_it() -> None:
    assert interface_of("127.0.0.1") == "lo"
    assert interface_of("192.0.2.77") is None
