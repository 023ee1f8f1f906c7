"""The Triton kernels compile for an H100, by the wheel's own assembler, wherever the tests run.

The interpreter takes much that the compiler refuses. Kernels are launched as they serve, with the compiler's dry run in
place of the launch.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from shoal.kernels.dispatch import operations

triton = pytest.importorskip("triton")

SHARED_BYTES = 227 * 1024  # that a program may use
HIDDEN, INTER, VOCAB, BLOCK = 4096, 14336, 128256, 16


class _H100:
    """What Triton asks of a driver before it compiles."""

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 1000  # apart from those that are here: Triton keeps kernels by device

    def get_current_stream(self, _: int) -> int:
        return 0


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """What was compiled in place of being launched."""
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    from shoal.kernels.triton_ops import attention

    kernels: list[Any] = []
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        kernels.append(run(self, *args, grid=grid, warmup=True, **options))

    monkeypatch.setattr(JITFunction, "run", compile_only)
    monkeypatch.setattr(attention, "_device", lambda _: attention._Device(132, SHARED_BYTES))
    before = driver._active
    driver.set_active(_H100())
    yield kernels
    driver._active = before
    assert kernels
    for kernel in kernels:
        assert kernel.metadata.shared <= SHARED_BYTES, kernel.name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_all_but_attention(compiled: list[Any], dtype: torch.dtype) -> None:
    ops = operations("cuda")
    x = torch.empty(3, HIDDEN, dtype=dtype)
    ops.rms_norm(x, torch.empty(HIDDEN), 1e-5)
    ops.add_rms_norm(x, x, torch.empty(HIDDEN), 1e-5)
    ops.gated_activation(torch.empty(3, 2 * INTER, dtype=dtype), "silu")
    ops.gated_activation(torch.empty(3, 2 * INTER, dtype=dtype), "gelu_tanh")
    q, k, v = torch.empty(3, 48, 128, dtype=dtype).split([32, 8, 8], dim=1)
    ops.rotary(q, k, torch.zeros(3).long(), torch.empty(64, 128))
    ops.kv_write(k, v, torch.empty(4, 3, 2, 8, BLOCK, 128, dtype=dtype)[:, 1], torch.zeros(3).long())
    packed = ops.pack_experts(torch.empty(8, 2 * 64, 128, dtype=dtype), torch.empty(8, 128, 64, dtype=dtype))
    chosen = torch.tensor([[0, 3], [1, 2], [0, 7]])
    ops.experts(torch.empty(3, 128, dtype=dtype), packed, chosen, torch.empty(3, 2), "silu")
    off = torch.zeros(3)
    ops.sample(torch.empty(3, VOCAB), off, off.int(), off, off, off)
    assert len(compiled) == 11


@pytest.mark.parametrize(
    ("dtype", "heads", "kv_heads", "head_dim", "window", "softcap"),
    [
        (torch.bfloat16, 32, 8, 128, None, None),
        (torch.bfloat16, 14, 2, 64, 512, 30.0),
        (torch.bfloat16, 8, 4, 256, None, 30.0),
        (torch.bfloat16, 32, 32, 80, 512, None),
        (torch.float32, 8, 2, 64, None, None),
    ],
)
def test_attention(
    compiled: list[Any], dtype: torch.dtype, heads: int, kv_heads: int, head_dim: int, window: int | None,
    softcap: float | None,
) -> None:  # fmt: skip
    """Decoding and prompts, which are laid out for Hopper's tensor cores; keys come while others are computed."""
    kv = torch.empty(4, 3, 2, kv_heads, BLOCK, head_dim, dtype=dtype)[:, 1]
    lens = [1, 700]
    q, starts = torch.empty(sum(lens), heads, head_dim, dtype=dtype), torch.tensor([0, *lens]).cumsum(0).int()
    tables, contexts = torch.zeros(len(lens), 256).int(), torch.tensor(lens).int()
    operations("cuda").attention(q, kv, tables, starts, contexts, max(lens), scale=0.1, window=window, softcap=softcap)
    attention = [kernel.asm["ptx"] for kernel in compiled if kernel.name == "_attention_kernel"]
    assert len(attention) == 2
    assert all("cp.async" in code for code in attention)
    assert dtype == torch.float32 or "wgmma" in attention[0]
