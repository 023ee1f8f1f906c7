"""The router: the most likely experts, the first ones of equals, whatever else is in the batch."""

from __future__ import annotations

import pytest
import torch

from shoal.engine.layers.linear import Linear
from shoal.engine.layers.moe import Router
from shoal.kernels.dispatch import operations


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def test_of_equally_likely_experts_the_first_are_chosen() -> None:
    weight = torch.zeros(128, 4)
    weight[[100, 7], 0] = 1.0
    router = Router(Linear(weight, None, operations("cpu")), 4, is_renormalized=False)
    chosen, weights = router(torch.eye(4)[:1].repeat(50, 1))
    assert chosen.tolist() == [[0, 1, 7, 100]] * 50
    e = torch.tensor(1.0).exp()
    torch.testing.assert_close(weights[0], torch.stack([1 / e, 1 / e, e / e, e / e]) * e / (126 + 2 * e))


@pytest.mark.parametrize("is_renormalized", [True, False])
def test_weights_are_shares_of_all_experts_or_of_the_chosen_ones(is_renormalized: bool) -> None:
    weight = torch.tensor([[0.2], [0.5], [0.3]]).log()
    router = Router(Linear(weight, None, operations("cpu")), 2, is_renormalized=is_renormalized)
    chosen, weights = router(torch.ones(1, 1))
    assert chosen.tolist() == [[1, 2]]
    torch.testing.assert_close(weights, torch.tensor([[0.5, 0.3]]) / (0.8 if is_renormalized else 1.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_experts", [8, 128])
def test_a_token_is_routed_bitwise_the_same_in_any_batch(num_experts: int, dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(100, 64, generator=g).to(dtype)
    linear = Linear(torch.randn(num_experts, 64, generator=g).to(dtype), None, operations("cpu"))
    router = Router(linear, 8, is_renormalized=True)
    alone = [torch.cat(parts) for parts in zip(*(router(row) for row in x.split(1)), strict=True)]
    for size in (2, 7, 33, 100):
        together = [torch.cat(parts) for parts in zip(*(router(rows) for rows in x.split(size)), strict=True)]
        assert torch.equal(together[0], alone[0])
        assert torch.equal(together[1], alone[1])
