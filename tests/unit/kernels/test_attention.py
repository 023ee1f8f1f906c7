"""Attention against an independent float64 softmax, and what holds bit for bit."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from shoal.kernels.dispatch import Operations, operations, reference
from shoal.kernels.torch_ops.attention import attention, merge_splits

TABLES = {"reference": reference, "cpu": lambda: operations("cpu")}


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def naive(
    q: Tensor,  # [n, heads, head_dim], the last n positions
    keys: Tensor,  # [context, kv_heads, head_dim]
    values: Tensor,  # [context, kv_heads, head_dim]
    window: int | None,
    softcap: float | None,
) -> Tensor:  # [n, heads, head_dim]
    """One query and one head at a time, in the dtype of q."""
    n, heads, head_dim = q.shape
    out = torch.empty_like(q)
    for i in range(n):
        end = len(keys) - n + i + 1
        begin = 0 if window is None else max(0, end - window)
        for head in range(heads):
            kv_head = head * keys.shape[1] // heads
            scores = keys[begin:end, kv_head] @ q[i, head] / head_dim**0.5
            if softcap is not None:
                scores = torch.tanh(scores / softcap) * softcap
            weights = torch.exp(scores - scores.max())
            out[i, head] = weights @ values[begin:end, kv_head] / weights.sum()
    return out


def paged(ops: Operations, keys: Tensor, values: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """A layer of a pool whose other slots are NaN, and the one request's table, with a stray entry at its end."""
    context, kv_heads, head_dim = keys.shape
    count = -(-context // block_size)
    pool = torch.full((count + 2, 3, 2, kv_heads, block_size, head_dim), torch.nan, dtype=keys.dtype)
    table = torch.randperm(count + 1)[: count + 1].int()
    positions = torch.arange(context)
    ops.kv_write(keys, values, pool[:, 1], table[positions // block_size].long() * block_size + positions % block_size)
    return pool[:, 1], table.view(1, -1)


def attend(ops: Operations, q: Tensor, kv: Tensor, table: Tensor, context: int, **options: float | None) -> Tensor:
    starts, contexts = torch.tensor([0, len(q)]).int(), torch.tensor([context]).int()
    return ops.attention(q, kv, table, starts, contexts, len(q), scale=q.shape[-1] ** -0.5, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("table_name", TABLES)
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (4, 1), (9, 3), (8, 1)])
@pytest.mark.parametrize(("window", "softcap"), [(None, None), (10, None), (None, 4.0), (3, 4.0)])
def test_error_is_at_most_twice_that_of_naive_float32(
    table_name: str, heads: int, kv_heads: int, window: int | None, softcap: float | None
) -> None:
    torch.manual_seed(heads)
    ops, head_dim, block_size, context = TABLES[table_name](), 16, 8, 45
    error = naive_error = largest = 0.0
    for query_len in (1, 2, block_size, block_size + 1):
        q = torch.randn(query_len, heads, head_dim) * 2
        keys, values = torch.randn(2, context, kv_heads, head_dim)
        exact = naive(q.double(), keys.double(), values.double(), window, softcap)
        largest = max(largest, float(exact.abs().max()))
        kv, table = paged(ops, keys, values, block_size)
        result = attend(ops, q, kv, table, context, window=window, softcap=softcap)
        error = max(error, float((result - exact).abs().max()))
        naive_error = max(naive_error, float((naive(q, keys, values, window, softcap) - exact).abs().max()))
    # Some CPUs' BLAS is exact to about a rounding of the result; two of them are always allowed.
    assert error <= 2 * naive_error + 2 * torch.finfo(torch.float32).eps * largest


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("block_size", [8, 16, 32])
def test_rows_are_bitwise_the_same_in_every_chunking_batch_and_thread_count(
    dtype: torch.dtype, window: int | None, block_size: int
) -> None:
    torch.manual_seed(0)
    ops, context = operations("cpu"), 1800  # enough for the context to be split between threads
    q = torch.randn(context, 4, 32).to(dtype)
    keys, values = torch.randn(2, context, 2, 32).to(dtype)
    kv, table = paged(ops, keys, values, block_size)
    whole = attend(ops, q, kv, table, context, window=window)
    for chunk in (1, 7, 16, 17):
        end = context
        assert torch.equal(attend(ops, q[end - chunk :], kv, table, end, window=window), whole[end - chunk :])
    lens = torch.tensor([0, 1, 0, 40, 3])
    arguments = (
        torch.cat([q[600:601], q[960:1000], q[-3:]]), kv, table.expand(4, -1), lens.cumsum(0).int(),
        torch.tensor([601, 9, 1000, context]).int(), 40,
    )  # fmt: skip
    together = ops.attention(*arguments, scale=32**-0.5, window=window)
    assert torch.equal(together, torch.cat([whole[600:601], whole[960:1000], whole[-3:]]))
    torch.set_num_threads(2)
    assert torch.equal(attend(ops, q[-1:], kv, table, context, window=window), whole[-1:])
    assert torch.equal(attend(ops, q, kv, table, context, window=window), whole)


@settings(deadline=None, max_examples=50)
@given(seed=st.integers(0, 2**32), cut=st.integers(1, 4), empty=st.booleans())
def test_merging_splits_does_not_depend_on_the_grouping(seed: int, cut: int, empty: bool) -> None:
    torch.manual_seed(seed)
    scores, values = torch.randn(5, 3, 7, dtype=torch.float64) * 10, torch.randn(5, 7, 4, dtype=torch.float64)
    if empty:
        scores[1, 0] = -torch.inf
    lses = scores.logsumexp(dim=-1)  # [splits, rows]
    outputs = torch.softmax(scores, dim=-1).nan_to_num() @ values
    grouped = torch.stack([merge_splits(outputs[:cut], lses[:cut]), merge_splits(outputs[cut:], lses[cut:])])
    merged = merge_splits(grouped, torch.stack([lses[:cut].logsumexp(dim=0), lses[cut:].logsumexp(dim=0)]))
    together = torch.softmax(scores.permute(1, 0, 2).flatten(1), dim=-1) @ values.flatten(0, 1)
    torch.testing.assert_close(merge_splits(outputs, lses), together, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(merged, together, rtol=1e-9, atol=1e-12)


def test_twin_holds_no_square_score_matrix() -> None:
    context = 8192
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            if isinstance(result, Tensor):
                largest = max(largest, result.numel())
            return result

    kv = torch.zeros(context // 16, 2, 1, 16, 8)
    starts, contexts = torch.tensor([0, 1024]).int(), torch.tensor([context]).int()
    with Watch():
        attention(
            torch.zeros(1024, 1, 8),
            kv,
            torch.arange(context // 16).int().view(1, -1),
            starts,
            contexts,
            1024,
            scale=1.0,
        )
    assert 0 < largest <= 0.02 * context**2


@pytest.mark.parametrize(
    ("shape", "dtype", "window", "message"),
    [((1, 3, 8), torch.float32, None, "heads"), ((1, 2, 4), torch.float32, None, "head_dim"),
     ((1, 2, 8), torch.bfloat16, None, "bfloat16"), ((1, 2, 8), torch.float32, 0, "window")],
)  # fmt: skip
def test_twin_names_what_does_not_fit(
    shape: tuple[int, ...], dtype: torch.dtype, window: int | None, message: str
) -> None:
    kv, table = paged(reference(), torch.zeros(4, 2, 8), torch.zeros(4, 2, 8), 4)
    with pytest.raises(ValueError, match=message):
        attend(reference(), torch.zeros(shape, dtype=dtype), kv, table, 4, window=window)
