"""Decode steps as CUDA graphs: what the host launches for one is recorded, once for each of a few batch sizes.

With few requests a GPU runs a kernel in less time than the host takes to launch it; a recorded step is one launch. All
that changes from step to step lies in buffers that stay where they are. A batch is padded to the next size with rows
that write no KV and see none.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from shoal.engine.layers.attention import AttentionBatch
from shoal.engine.models.registry import Model
from shoal.engine.runner.batch import StepBatch
from shoal.engine.runner.kv_store import KVStore
from shoal.engine.sampling.batch import SampleBatch
from shoal.engine.sampling.draw import draw_settings
from shoal.engine.sampling.transfer import staged, to_device
from shoal.kernels.dispatch import Operations

Array = npt.NDArray[np.generic]
Replay = Callable[[], Tensor]


class GraphCapture(Protocol):
    """Records what `run` makes the device do. The answer repeats it, and gives what it computed, in the same memory."""

    def __call__(self, run: Replay) -> Replay: ...


class CudaCapture:
    """CUDA graphs that share one pool of memory, as only one of them runs at a time."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]

    def __call__(self, run: Replay) -> Replay:
        # Once before: kernels are compiled and libraries take their workspaces, neither of which can be recorded.
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            run()
        torch.cuda.current_stream().wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        # What other threads ask of CUDA meanwhile, such as whether a copy is done, is no part of it.
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            result = run()

        def replay() -> Tensor:
            graph.replay()
            return result

        return replay


def decode_sizes(most: int) -> list[int]:
    """Batch sizes that get a graph of their own, ascending: what padding adds stays below an eighth from 64 on."""
    sizes = [1, 2, 4, *range(8, 256, 8), *range(256, most, 32)]
    return [*(size for size in sizes if size < most), most]


class DecodeGraphs:
    """Runs steps in which each request has one token, up to `most` of them: forward pass, then draw.

    Graphs are recorded when they are first wanted.
    """

    def __init__(
        self,
        model: Model,
        kv: KVStore,
        ops: Operations,
        sampled: Tensor,
        *,
        most: int,
        max_blocks: int,
        capture: GraphCapture,
    ) -> None:
        """`sampled` [rows + 1] int64 has the last token of each row; the last place is written by rows that pad.

        max_blocks: of one request.
        """
        device = kv.pool.device
        self._model = model
        self._kv = kv
        self._sample = ops.sample
        self._sampled = sampled
        self._capture = capture
        self._sizes = decode_sizes(most)
        self._forwards: dict[int, Replay] = {}
        self._draws: dict[int, Replay] = {}
        self._size = 0  # of the step that was run last
        self._hidden: dict[int, Tensor] = {}  # by size, [size, hidden]
        self._inputs = _Rows(most, device, {
            "input_ids": (np.int64, 0), "positions": (np.int64, 0), "slots": (np.int64, -1),
            "context_lens": (np.int32, 0), "is_pending": (np.bool_, False), "source_rows": (np.int64, 0),
            "target_rows": (np.int64, len(sampled) - 1),
        })  # fmt: skip
        self._settings = _Rows(most, device, {
            "temperature": (np.float32, 0), "top_k": (np.int32, 0), "top_p": (np.float32, 1), "min_p": (np.float32, 0),
            "uniform": (np.float32, 0),
        })  # fmt: skip
        self._block_tables = torch.zeros((most, max_blocks), dtype=torch.int32, device=device)
        self._query_starts = torch.arange(most + 1, dtype=torch.int32, device=device)
        self._tables_there: npt.NDArray[np.int32] = np.zeros((0, 0), np.int32)

    def can_run(self, batch: StepBatch) -> bool:
        return batch.max_query_len == 1 and len(batch.rows) <= self._sizes[-1]

    def forward(self, batch: StepBatch) -> Tensor:
        """Hidden states [tokens, hidden] of a step that `can_run`; they last until the next one."""
        count = len(batch.rows)
        size = self._size = self._sizes[bisect.bisect_left(self._sizes, count)]
        self._put_tables(batch.block_tables)
        source_rows, is_pending = np.zeros(count, np.int64), np.zeros(count, np.bool_)
        source_rows[batch.pending] = batch.pending_rows
        is_pending[batch.pending] = True
        self._inputs.put(
            count, size, input_ids=batch.input_ids, positions=batch.positions, slots=batch.slots,
            context_lens=batch.context_lens, source_rows=source_rows, is_pending=is_pending, target_rows=batch.rows,
        )  # fmt: skip
        if size not in self._forwards:
            self._forwards[size] = self._capture(lambda: self._run_forward(size))
        hidden = self._hidden[size] = self._forwards[size]()
        return hidden[:count]

    def draw(self, batch: SampleBatch) -> Tensor:
        """Tokens [samples] int64 for all rows of the step that was run last, from their logits as they are. They also
        become the last ones of their rows.
        """
        count, size = len(batch.request_ids), self._size
        self._settings.put(count, size, **draw_settings(batch))
        if size not in self._draws:
            self._draws[size] = self._capture(lambda: self._run_draw(size))
        return self._draws[size]()[:count]

    def _run_forward(self, size: int) -> Tensor:
        """[size, hidden], from the buffers alone; running it twice changes nothing."""
        inputs = self._inputs
        attention = AttentionBatch(
            slots=inputs["slots"][:size],
            block_tables=self._block_tables[:size],
            query_starts=self._query_starts[: size + 1],
            context_lens=inputs["context_lens"][:size],
            max_query_len=1,
        )
        pending = self._sampled[inputs["source_rows"][:size]]  # [size]
        input_ids = torch.where(inputs["is_pending"][:size], pending, inputs["input_ids"][:size])
        return self._model.forward(input_ids, inputs["positions"][:size], attention, self._kv.layers)

    def _run_draw(self, size: int) -> Tensor:
        """[size] int64, from the hidden states of the step and the buffers."""
        logits = self._model.logits(self._hidden[size])  # [size, vocab]
        tokens = self._sample(logits, *(self._settings[name][:size] for name in self._settings.names))
        self._sampled[self._inputs["target_rows"][:size]] = tokens
        return tokens

    def _put_tables(self, tables: npt.NDArray[np.int32]) -> None:
        """Block tables change once in a block's length of steps."""
        if np.array_equal(tables, self._tables_there):
            return
        count, width = tables.shape
        self._block_tables[:count, :width].copy_(to_device(tables, self._block_tables.device))
        self._tables_there = tables


class _Rows:
    """Some values of each row of a batch, side by side in one buffer of the device: one copy a step brings them all."""

    def __init__(self, most: int, device: torch.device, fields: dict[str, tuple[type[np.generic], float]]) -> None:
        """fields: their types, and what they are for rows that pad a batch. `most` rows."""
        self.names = list(fields)
        self._pads = {name: pad for name, (_, pad) in fields.items()}
        most = -(-most // 16) * 16  # every field is aligned to 16 bytes
        num_bytes = sum(most * np.dtype(kind).itemsize for kind, _ in fields.values())
        self._host = np.zeros(num_bytes, np.uint8)
        self._device = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
        self._host_fields: dict[str, Array] = {}  # [most] each
        self._fields: dict[str, Tensor] = {}
        start = 0
        for name, (kind, _) in fields.items():
            end = start + most * np.dtype(kind).itemsize
            self._host_fields[name] = self._host[start:end].view(kind)
            self._fields[name] = self._device[start:end].view(torch.from_numpy(self._host_fields[name]).dtype)
            start = end

    def __getitem__(self, name: str) -> Tensor:
        """[most], on the device."""
        return self._fields[name]

    def put(self, count: int, size: int, **values: Array) -> None:
        """[count] of every field; rows from `count` to `size` pad."""
        for name, pad in self._pads.items():
            self._host_fields[name][:count] = values[name]
            self._host_fields[name][count:size] = pad
        self._device.copy_(staged(self._host, self._device.device), non_blocking=True)
