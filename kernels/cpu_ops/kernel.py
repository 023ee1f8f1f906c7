"""Calling the C++ kernels: one at a time, or all of a step in one call.

A step of a small batch is some hundred kernels of a few microseconds each, and calling them one by one from Python
takes about as long as running them. So such a step is captured: its calls are noted, and made again by one team of
threads.
"""

from __future__ import annotations

import ctypes
import functools
import math
import struct
import threading
import weakref
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from shoal.kernels.cpu_ops.library import library
from shoal.kernels.torch_ops.capture import NotCapturableError, Tensors

# The arguments of each kernel in the order of its struct in the .cpp file, in the letters of Python's struct module.
_ARGUMENTS = {
    "add": "PPqqqqi",
    "add_rms_norm": "PPPPqiqqfi",
    "attention": "PPPPPPiiiiiqqqiffi",
    "gated_activation": "PPqiqii",
    "gated_linear": "PPPPqqqqi",
    "kv_write": "PPPPqiiiqqqi",
    "linear": "PPPPqqqqi",
    "pack_panels": "PPqq",
    "pack_quantized": "PPqqi",
    "quantized_linear": "PPPPqqqqiii",
    "quantized_rows": "PPPqqii",
    "rms_norm": "PPPqqiqqfi",
    "rotary": "PPPPqiiiiqqi",
    "sample": "PPPPPPPqiq",
    "take_rows": "PPPqqqfi",
}
# Elements of work below which waking threads (about 10 us) costs more than it saves.
_SERIAL_ELEMENTS = 32768
_LINE = 64  # bytes of a cache line


class Kernel:
    """A kernel of the library. A call runs it, and notes it if this thread captures."""

    def __init__(self, name: str) -> None:
        self._name = f"shoal_{name}"
        self._pack = struct.Struct(_ARGUMENTS[name]).pack

    @functools.cached_property
    def _address(self) -> int:
        return ctypes.cast(getattr(library(), self._name), ctypes.c_void_p).value or 0

    def __call__(self, work: int, *arguments: float) -> None:
        """`work` is in elements: little of it stays on the calling thread. Pointers are addresses, 0 is null."""
        packed = self._pack(*arguments)
        if _thread.capture is not None:
            _thread.capture.calls.append((self._address, packed))
        threads = torch.get_num_threads() if work > _SERIAL_ELEMENTS else 1
        library().shoal_run_one(self._address, packed, threads)


def empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """An uninitialised tensor, in the capture's memory if this thread captures."""
    if _thread.capture is None:
        return torch.empty(shape, dtype=dtype)
    return _thread.capture.workspace.empty(shape, dtype)


def new_capture() -> Capture:
    """As torch_ops.capture: of steps that call nothing but kernels of this folder, on the calling thread."""
    return Capture()


class Workspace:
    """Memory in pieces. A piece is free again when no tensor lies in it any more, or once it is released."""

    def __init__(self) -> None:
        self._free: dict[int, list[ctypes.Array[ctypes.c_uint8]]] = defaultdict(list)  # by bytes
        self._in_use: dict[int, weakref.finalize[..., Any]] = {}  # by address

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        count = math.prod(shape)
        size = 1 << (max(count * dtype.itemsize, _LINE) - 1).bit_length()
        free = self._free[size]
        piece = free.pop() if free else (ctypes.c_uint8 * (size + _LINE))()
        address = -(-ctypes.addressof(piece) // _LINE) * _LINE
        # The tensor and all views of it hold this array, which goes with the last of them.
        held = (ctypes.c_uint8 * size).from_address(address)
        self._in_use[address] = weakref.finalize(held, free.append, piece)
        return torch.frombuffer(held, dtype=dtype)[:count].view(tuple(shape))

    def release(self, tensor: Tensor) -> None:
        """Others may use the tensor's piece, though the tensor goes on to lie in it."""
        self._in_use[_memory(tensor)]()


class Capture:
    """See torch_ops.capture."""

    def __init__(self) -> None:
        self.workspace = Workspace()
        self.calls: list[tuple[int, bytes]] = []

    def __call__(self, run: Callable[[], Tensors]) -> tuple[Tensors, Callable[[], None]]:
        self.calls = []
        _thread.capture = self
        try:
            with _OnlyViews():  # type: ignore[no-untyped-call]
                results = run()
        finally:
            _thread.capture = None
        for tensor in results:
            self.workspace.release(tensor)
        return results, _Program(self.calls)


class _Program:
    """Calls of kernels, laid out as shoal_run wants them."""

    def __init__(self, calls: Sequence[tuple[int, bytes]]) -> None:
        self._arguments = [packed for _, packed in calls]  # the addresses below point into these
        self._calls = (ctypes.c_void_p * (2 * len(calls)))()
        for index, (address, packed) in enumerate(calls):
            self._calls[2 * index] = address
            self._calls[2 * index + 1] = ctypes.cast(ctypes.c_char_p(packed), ctypes.c_void_p).value
        self._count = len(calls)

    def __call__(self) -> None:
        library().shoal_run(self._calls, self._count, torch.get_num_threads())


class _OnlyViews(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Raises where torch itself computes something, which a program would leave out."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        seen = {_memory(given) for given in args if isinstance(given, Tensor)}
        made = result if isinstance(result, tuple | list) else (result,)
        if func._schema.is_mutable or not all(isinstance(one, Tensor) and _memory(one) in seen for one in made):
            raise NotCapturableError(f"{func} of torch")
        return result


def _memory(tensor: Tensor) -> int:
    """Where its storage lies; what oneDNN laid out has none of its own."""
    return 0 if tensor.is_mkldnn else tensor.untyped_storage().data_ptr()


class _Thread(threading.local):
    capture: Capture | None = None


_thread = _Thread()
