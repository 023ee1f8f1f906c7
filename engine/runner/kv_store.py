"""The physical KV pool of one rank: its own layers and heads of every block."""

from __future__ import annotations

import ctypes
import os
import sys
import threading
import weakref

import torch
from torch import Tensor

from shoal.engine.memory.kv_layout import KVLayout

_AHEAD_BYTES = 64 * 2**20  # of host memory that is made ready before it is needed
_CHUNK_BYTES = 4 * 2**20
_MADV_POPULATE_WRITE = 23  # Linux 5.14
_LOWEST_PRIORITY = 19


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

    def expect_use(self, block: int) -> None:
        """Blocks up to this one are in use, and those behind it come next."""
        if self._memory is not None:
            self._memory.expect_use((block + 1) * self.pool.stride(0) * self.pool.element_size())


class _HostMemory:
    """Has the operating system give pages to the part of a pool that will be used next, while cores are idle.

    It gives one at the first write to it, and takes a tenth of a prompt's time for that.
    """

    def __init__(self, address: int, num_bytes: int) -> None:
        page = os.sysconf("SC_PAGE_SIZE")
        self._start, self._end = -(-address // page) * page, (address + num_bytes) // page * page
        self._wanted = _AHEAD_BYTES
        self._is_closed = False
        self._changed = threading.Condition()
        threading.Thread(target=self._populate, name="kv-memory", daemon=True).start()

    def expect_use(self, end: int) -> None:
        """The first `end` bytes are in use."""
        if end + _AHEAD_BYTES // 2 > self._wanted:
            with self._changed:
                self._wanted = end + _AHEAD_BYTES
                self._changed.notify()

    def close(self) -> None:
        with self._changed:
            self._is_closed = True
            self._changed.notify()

    def _populate(self) -> None:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _LOWEST_PRIORITY)
        madvise = ctypes.CDLL(None).madvise
        for at in range(self._start, self._end, _CHUNK_BYTES):
            with self._changed:
                while at - self._start >= self._wanted and not self._is_closed:
                    self._changed.wait()
            # An error where the system is too old; pages then come as they are written to. It writes nothing, so that
            # memory which was given back meanwhile is none the worse.
            size = min(_CHUNK_BYTES, self._end - at)
            if self._is_closed or madvise(ctypes.c_void_p(at), ctypes.c_size_t(size), _MADV_POPULATE_WRITE):
                return
