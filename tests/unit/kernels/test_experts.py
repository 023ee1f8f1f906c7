"""Experts on the CPU: a token's result is its own, and it is the sum that the contract states."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from shoal.kernels.dispatch import Operations, operations, reference

NUM_EXPERTS, NUM_CHOSEN, HIDDEN, INTER = 6, 3, 70, 1100  # so deep that oneDNN adds up a lone row in another order


@pytest.fixture(autouse=True)
def _restore_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def _inputs(tokens: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """x, gate_up, down, chosen, weights; expert 0 has every token, the last one has none."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, HIDDEN, generator=g).to(dtype)
    gate_up = (torch.randn(NUM_EXPERTS, 2 * INTER, HIDDEN, generator=g) * HIDDEN**-0.5).to(dtype)
    down = (torch.randn(NUM_EXPERTS, HIDDEN, INTER, generator=g) * INTER**-0.5).to(dtype)
    liked = torch.rand(tokens, NUM_EXPERTS, generator=g)
    liked[:, 0], liked[:, -1] = 2, -1
    chosen = liked.topk(NUM_CHOSEN).indices.sort().values
    return x, gate_up, down, chosen, liked.gather(1, chosen)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_token_is_bitwise_the_same_in_any_batch_and_with_any_threads(dtype: torch.dtype) -> None:
    ops = operations("cpu")
    x, gate_up, down, chosen, weights = _inputs(70, dtype)
    packed = ops.pack_experts(gate_up, down)

    def in_batches_of(size: int) -> Tensor:
        batches = zip(x.split(size), chosen.split(size), weights.split(size), strict=True)
        return torch.cat([ops.experts(rows, packed, ids, shares, "silu") for rows, ids, shares in batches])

    torch.set_num_threads(1)
    alone = in_batches_of(1)
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for size in (2, 3, 8, 9, 33, 70):
            assert torch.equal(in_batches_of(size), alone)


@pytest.mark.parametrize("ops", [reference(), operations("cpu")], ids=["torch", "cpu"])
def test_terms_are_added_up_in_float32_and_in_the_order_of_experts(ops: Operations) -> None:
    """2^24 + 1 - 2^24 is 0 in float32 one by one, and 1 in the order of the second token's experts."""
    down = torch.tensor([2.0**24, 1.0, -(2.0**24), 1.0]).view(4, 1, 1)
    packed = ops.pack_experts(torch.ones(4, 2, 1), down)
    x = torch.full((2, 1), 1.0)
    inner = ops.gated_activation(torch.ones(1, 2), "silu").item()
    chosen = torch.tensor([[0, 1, 2], [0, 2, 3]])
    result = ops.experts(x, packed, chosen, torch.full((2, 3), 1 / inner), "silu")
    assert result.flatten().tolist() == [0, 1]


def test_matrices_that_do_not_belong_together_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\[3, 8, 5\] and \[3, 5, 8\]"):
        reference().pack_experts(torch.ones(3, 8, 5), torch.ones(3, 5, 8))
