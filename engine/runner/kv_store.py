"""The physical KV pool of one rank: its own layers and heads of every block."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
import threading
import time
import weakref
from collections.abc import Iterator

import torch
from torch import Tensor

from shoal.engine.memory.kv_layout import KVLayout

_AHEAD_BYTES = 128 * 2**20  # of host memory that is made ready before it is needed
_CHUNK_BYTES = 2**20  # a third of a millisecond
_IDLE_S = 0.02  # without a step
_MADV_POPULATE_WRITE = 23  # Linux 5.14


class KVStore:
    """One tensor for all layers, so that a block is one contiguous region: copying, moving or offloading it is one
    move.

    pool: [num_blocks, layers, 2, kv_heads, block_size, head_dim]; `layers[i]` is a view of it.
    """

    def __init__(self, layout: KVLayout, num_blocks: int, dtype: torch.dtype, device: torch.device) -> None:
        self.pool = torch.empty(layout.shape(num_blocks), dtype=dtype, device=device)
        # [num_blocks, 2, kv_heads, block_size, head_dim] each
        self.layers: tuple[Tensor, ...] = self.pool.unbind(1)
        self._memory: _HostMemory | None = None
        if device.type == "cpu" and sys.platform == "linux":
            self._memory = _HostMemory(self.pool.data_ptr(), self.num_bytes)
            weakref.finalize(self, self._memory.close)

    @property
    def num_bytes(self) -> int:
        return self.pool.numel() * self.pool.element_size()

    @contextlib.contextmanager
    def in_use(self, last_block: int) -> Iterator[None]:
        """A step runs, and uses blocks up to this one; those behind it come next."""
        if self._memory is None:
            yield
            return
        self._memory.is_in_use = True
        try:
            yield
        finally:
            self._memory.was_used((last_block + 1) * self.pool.stride(0) * self.pool.element_size())


class _HostMemory:
    """Has the operating system give pages to the part of a pool that will be used next, while no step runs.

    It gives one at the first write to it, which takes a tenth of a prompt's time. Doing that beside a step takes more:
    all threads of a step wait for the one whose core is taken.
    """

    def __init__(self, address: int, num_bytes: int) -> None:
        page = os.sysconf("SC_PAGE_SIZE")
        self._start, self._end = -(-address // page) * page, (address + num_bytes) // page * page
        self._wanted = _AHEAD_BYTES
        self.is_in_use = False
        self._used_s = 0.0  # when it was used last
        self._is_closed = False
        self._changed = threading.Condition()
        threading.Thread(target=self._populate, name="kv-memory", daemon=True).start()

    def was_used(self, end: int) -> None:
        """The first `end` bytes have been used by a step that is over."""
        self._used_s = time.monotonic()
        self.is_in_use = False
        if end + _AHEAD_BYTES // 2 > self._wanted:
            with self._changed:
                self._wanted = end + _AHEAD_BYTES
                self._changed.notify()

    def close(self) -> None:
        with self._changed:
            self._is_closed = True
            self._changed.notify()

    def _populate(self) -> None:
        madvise = ctypes.CDLL(None).madvise
        for at in range(self._start, self._end, _CHUNK_BYTES):
            size = min(_CHUNK_BYTES, self._end - at)
            # An error where the system is too old; pages then come as they are written to. It writes nothing, so that
            # memory which was given back meanwhile is none the worse.
            if not self._wait_until_due(at) or madvise(
                ctypes.c_void_p(at), ctypes.c_size_t(size), _MADV_POPULATE_WRITE
            ):
                return

    def _wait_until_due(self, at: int) -> bool:
        """Until the pages there are wanted and no step runs; False if the pool is gone."""
        with self._changed:
            while not self._is_closed:
                if at - self._start >= self._wanted:
                    self._changed.wait()
                elif self.is_in_use or time.monotonic() - self._used_s < _IDLE_S:
                    self._changed.wait(_IDLE_S)
                else:
                    return True
        return False
