"""A pool's memory is there before it is needed, and goes with the pool."""

from __future__ import annotations

import ctypes
import gc
import os
import sys
import threading
import time

import pytest
import torch

from shoal.engine.memory.kv_layout import KVLayout
from shoal.engine.runner import kv_store
from shoal.engine.runner.kv_store import KVStore

MIB = 2**20
BLOCK_BYTES = 2 * 16 * 1024 * 2 * 2  # of LAYOUT: layers, slots, numbers of a key, keys and values, bytes of a number
LAYOUT = KVLayout(num_layers=2, num_kv_heads=8, head_dim=128, block_size=16, element_bytes=2)
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="asks Linux for pages")


def threads() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name == "kv-memory"}


def resident_bytes(store: KVStore, start: int, end: int) -> int:
    """How much of that part of the pool has pages."""
    page = os.sysconf("SC_PAGE_SIZE")
    first = -(-(store.pool.data_ptr() + start) // page) * page
    count = (store.pool.data_ptr() + end - first) // page
    pages = (ctypes.c_ubyte * count)()
    assert ctypes.CDLL(None).mincore(ctypes.c_void_p(first), ctypes.c_size_t(count * page), pages) == 0
    return sum(each & 1 for each in pages) * page


def wait_until(condition, timeout_s: float = 20.0) -> None:  # type: ignore[no-untyped-def]
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_memory_is_made_ready_ahead_of_use_and_no_further(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_store, "_AHEAD_BYTES", 8 * MIB)
    assert LAYOUT.bytes_per_token * LAYOUT.block_size == BLOCK_BYTES
    store = KVStore(LAYOUT, 64 * MIB // BLOCK_BYTES, torch.bfloat16, torch.device("cpu"))
    wait_until(lambda: resident_bytes(store, 0, 8 * MIB) > 7.9 * MIB)
    time.sleep(0.1)
    assert resident_bytes(store, 16 * MIB, 64 * MIB) == 0
    with store.in_use(16 * MIB // BLOCK_BYTES):
        pass
    wait_until(lambda: resident_bytes(store, 16 * MIB, 24 * MIB) > 7.9 * MIB)
    time.sleep(0.1)
    assert resident_bytes(store, 40 * MIB, 64 * MIB) == 0


def test_memory_is_left_alone_while_a_step_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_store, "_AHEAD_BYTES", 8 * MIB)
    store = KVStore(LAYOUT, 64 * MIB // BLOCK_BYTES, torch.bfloat16, torch.device("cpu"))
    wait_until(lambda: resident_bytes(store, 0, 8 * MIB) > 7.9 * MIB)
    with store.in_use(8 * MIB // BLOCK_BYTES):
        pass
    with store.in_use(8 * MIB // BLOCK_BYTES):
        time.sleep(0.2)
        assert resident_bytes(store, 9 * MIB, 64 * MIB) == 0
    wait_until(lambda: resident_bytes(store, 9 * MIB, 16 * MIB) > 6.9 * MIB)


def test_nothing_is_left_of_a_pool_that_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_store, "_AHEAD_BYTES", 4 * MIB)
    before = threads()
    store = KVStore(LAYOUT, 64 * MIB // BLOCK_BYTES, torch.bfloat16, torch.device("cpu"))
    (thread,) = threads() - before
    del store
    gc.collect()
    wait_until(lambda: not thread.is_alive())
