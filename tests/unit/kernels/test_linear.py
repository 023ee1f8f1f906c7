"""Matrix products on the CPU: a row's result is its own, and close logits stay apart."""

from __future__ import annotations

import pytest
import torch

from shoal.kernels.dispatch import operations


@pytest.fixture(autouse=True)
def _restore_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float32])
def test_a_row_is_bitwise_the_same_in_any_batch_and_with_any_threads(out_dtype):
    ops = operations("cpu")
    x = torch.randn(150, 576).bfloat16()
    packed = ops.pack_linear(torch.randn(1000, 576).bfloat16())
    torch.set_num_threads(1)
    alone = torch.cat([ops.linear(row, packed, out_dtype=out_dtype) for row in x.split(1)])
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for size in (2, 7, 8, 9, 33, 64, 65, 150):
            together = torch.cat([ops.linear(rows, packed, out_dtype=out_dtype) for rows in x.split(size)])
            assert torch.equal(together, alone)


@pytest.mark.parametrize("width", [576, 1536])
def test_a_float32_row_is_bitwise_the_same_in_any_batch(width):
    ops = operations("cpu")
    torch.set_num_threads(1)
    x = torch.randn(70, width)
    packed = ops.pack_linear(torch.randn(200, width))
    alone = torch.cat([ops.linear(row, packed) for row in x.split(1)])
    for size in (2, 7, 8, 33, 70):
        assert torch.equal(torch.cat([ops.linear(rows, packed) for rows in x.split(size)]), alone)


def test_float32_results_of_bfloat16_operands_are_summed_in_float32():
    ops = operations("cpu")
    x, weight = torch.randn(5, 1536).bfloat16(), torch.randn(333, 1536).bfloat16()
    result = ops.linear(x, ops.pack_linear(weight), out_dtype=torch.float32)
    exact = x.double() @ weight.double().T
    assert (result - exact).abs().max() < 1e-3  # rounding the results to bfloat16 would cost up to 0.5
    assert (result.bfloat16().double() - exact).abs().max() > 1e-2


def test_rows_may_stand_apart():
    ops = operations("cpu")
    wide = torch.randn(6, 900).bfloat16()
    packed = ops.pack_linear(torch.randn(70, 300).bfloat16())
    for view in (wide[:, :300], wide[:, 301:601], wide[::2, 600:]):
        assert torch.equal(ops.linear(view, packed), ops.linear(view.contiguous(), packed))
