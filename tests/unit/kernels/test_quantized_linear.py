"""Weights of 4 and 8 bits: the numbers are the gguf package's, products are as exact as 8-bit inputs can be, and a
row's result is its own.
"""

from __future__ import annotations

import ctypes
import platform
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

import gguf
import hypothesis.strategies as st
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from hypothesis import given, settings
from torch import Tensor

from shoal.kernels.cpu_ops import kernel, library
from shoal.kernels.dispatch import Operations, QuantizedType, QuantizedWeight, operations, reference
from shoal.kernels.torch_ops.quantized import BLOCK_BYTES, dequantize

TYPES: tuple[QuantizedType, ...] = ("Q8_0", "Q4_0", "Q4_1")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TABLES = {"cpu": operations, "reference": lambda _: reference()}


@pytest.fixture(autouse=True)
def _restore_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def quantize(values: Tensor, kind: QuantizedType) -> QuantizedWeight:
    return QuantizedWeight(torch.from_numpy(gguf.quants.quantize(values.numpy(), Kind[kind])), kind)


def numbers(weight: QuantizedWeight) -> Tensor:
    """As the gguf package reads them."""
    return torch.from_numpy(gguf.quants.dequantize(weight.blocks.numpy(), Kind[weight.type]).copy())


def random_weight(kind: QuantizedType, outputs: int, inputs: int, seed: int = 0) -> QuantizedWeight:
    return quantize(torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(seed)), kind)


def largest_error(x: Tensor, weight: Tensor) -> Tensor:
    """What rounding the inputs to 8 bits may change at most: half a step of each, times its weight. [rows, outputs]"""
    blocks = x.double().unflatten(1, (-1, 32))
    steps = (blocks.abs().amax(-1, keepdim=True) / 127).expand_as(blocks).flatten(1)
    return 0.5 * steps @ weight.double().abs().T


@pytest.mark.parametrize("kind", TYPES)
def test_golden_bytes(kind: QuantizedType) -> None:
    """Random bytes, with scales and minima in a sensible range: every bit of a weight is read as gguf reads it."""
    generator = torch.Generator().manual_seed(3)
    blocks = torch.randint(0, 256, (7, 4 * BLOCK_BYTES[kind]), dtype=torch.uint8, generator=generator)
    for half in range(1, 4 if kind == "Q4_1" else 2, 2):  # exponents of the float16 numbers at the start of a block
        blocks.view(-1, BLOCK_BYTES[kind])[:, half] &= 0b10111011
    weight = QuantizedWeight(blocks, kind)
    assert weight.shape == (7, 128)
    assert torch.equal(dequantize(blocks, kind), numbers(weight))
    table = operations("cpu")
    ids = torch.tensor([6, 0, 3, 3])
    for dtype in DTYPES:
        found = table.quantized_rows(table.pack_linear(weight), ids, dtype)
        assert torch.equal(found, numbers(weight)[ids].to(dtype))


@pytest.mark.parametrize("kind", TYPES)
@settings(deadline=None, max_examples=60)
@given(
    rows=st.integers(0, 70), outputs=st.integers(1, 100), num_blocks=st.integers(1, 9), has_bias=st.booleans(),
    dtype=st.sampled_from(DTYPES), seed=st.integers(0, 2**32 - 1), scale=st.sampled_from([1e-3, 1.0, 30.0]),
)  # fmt: skip
def test_products_are_those_of_the_numbers_within_half_a_step_of_each_input(
    kind: QuantizedType, rows: int, outputs: int, num_blocks: int, has_bias: bool, dtype: torch.dtype, seed: int,
    scale: float,
) -> None:  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    weight = random_weight(kind, outputs, 32 * num_blocks, seed)
    x = (torch.randn(rows, 32 * num_blocks, generator=generator) * scale).to(dtype)
    bias = torch.randn(outputs, generator=generator).to(dtype) if has_bias else None
    exact = x.double() @ numbers(weight).double().T + (0 if bias is None else bias.double())
    table = operations("cpu")
    found = table.linear(x, table.pack_linear(weight), bias, out_dtype=torch.float32)
    allowed = largest_error(x, numbers(weight)) + 1e-5 * (1 + scale * num_blocks)
    assert found.shape == (rows, outputs)
    assert ((found - exact).abs() <= allowed).all()
    rounded = table.linear(x, table.pack_linear(weight), bias)
    assert torch.equal(rounded, found.to(dtype))


@pytest.mark.parametrize("kind", TYPES)
def test_integers_are_multiplied_exactly(kind: QuantizedType) -> None:
    """Where every block holds an input of 127, nothing is rounded: the largest products and sums that can be."""
    x = torch.randint(-127, 128, (5, 96), generator=torch.Generator().manual_seed(0)).float()
    x[:, ::32] = 127
    x[0] = 127
    x[1] = -127
    weight = torch.randint(-127, 128, (40, 96), generator=torch.Generator().manual_seed(1)).float()
    weight[0], weight[1], weight[:, ::32] = 127, -127, 127
    quantized = quantize(weight, kind)
    exact = x.double() @ numbers(quantized).double().T
    table = operations("cpu")
    found = table.linear(x, table.pack_linear(quantized))
    assert (found - exact).abs().max() <= 1e-6 * exact.abs().max()


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float32])
def test_a_row_is_bitwise_the_same_in_any_batch_and_with_any_threads(
    kind: QuantizedType, out_dtype: torch.dtype
) -> None:
    table = operations("cpu")
    x = torch.randn(150, 576).bfloat16()
    packed = table.pack_linear(random_weight(kind, 1001, 576))
    alone = torch.cat([table.linear(row, packed, out_dtype=out_dtype) for row in x.split(1)])
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for size in (1, 2, 5, 6, 7, 33, 64, 65, 150):
            together = torch.cat([table.linear(rows, packed, out_dtype=out_dtype) for rows in x.split(size)])
            assert torch.equal(together, alone), (threads, size)


@pytest.mark.parametrize("kind", TYPES)
def test_rows_may_stand_apart(kind: QuantizedType) -> None:
    table = operations("cpu")
    wide = torch.randn(6, 900).bfloat16()
    packed = table.pack_linear(random_weight(kind, 70, 288))
    for view in (wide[:, :288], wide[:, 301:589], wide[::2, 600:888], wide[:, :864:3]):
        assert torch.equal(table.linear(view, packed), table.linear(view.contiguous(), packed))


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("kind", TYPES)
def test_panels_take_the_bytes_that_blocks_took_and_zeros_are_zeros(kind: QuantizedType, name: str) -> None:
    table: Operations = TABLES[name]("cpu")
    weight = random_weight(kind, 64, 96)
    padded = QuantizedWeight(
        torch.cat((weight.blocks, torch.zeros(5, weight.blocks.shape[1], dtype=torch.uint8))), kind
    )
    assert table.pack_linear(weight).weight.nbytes == weight.nbytes == 64 * 3 * BLOCK_BYTES[kind]
    packed = table.pack_linear(padded)
    assert (packed.out_features, packed.in_features, packed.quantized) == (69, 96, kind)
    assert (table.linear(torch.randn(3, 96), packed)[:, 64:] == 0).all()
    assert (table.quantized_rows(packed, torch.arange(64, 69), torch.float32) == 0).all()


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="names CPUs of x86")
@pytest.mark.parametrize("cpu", ["haswell", "skylake-avx512", "x86-64"])
def test_other_cpus_add_up_the_same(cpu: str, tmp_path: Path) -> None:
    """AVX2, AVX-512 without VNNI, and neither: other instructions, the same sums of integers."""
    if cpu == "skylake-avx512" and "avx512bw" not in Path("/proc/cpuinfo").read_text():
        pytest.skip("this CPU has no AVX-512")
    sources = [str(Path(library.__file__).with_name(name)) for name in ("quantized_linear.cpp", "kernel.cpp")]
    path = tmp_path / "quantized_linear.so"
    subprocess.run(["c++", *library._FLAGS, "-Wno-psabi", f"-march={cpu}", *sources, "-o", str(path)], check=True)
    built = ctypes.CDLL(str(path))
    table = operations("cpu")
    # Whole numbers whose largest is 127 in each block: nothing depends on how inputs are rounded.
    x = torch.randint(-127, 128, (8, 160)).float()
    x[:, ::32] = 127
    for code, kind in enumerate(TYPES):
        packed = table.pack_linear(random_weight(kind, 45, 160))
        out = torch.empty(8, 45)
        arguments = struct.Struct(kernel._ARGUMENTS["quantized_linear"]).pack(
            out.data_ptr(), x.data_ptr(), packed.weight.data_ptr(), 0, 8, 45, 160, 160, code, 0, 0
        )
        built.shoal_quantized_linear(arguments)
        torch.testing.assert_close(out, table.linear(x, packed), rtol=1e-6, atol=1e-3)
