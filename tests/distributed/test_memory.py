"""Each rank holds its own share of the weights, and at no moment a whole copy."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import transformers

from shoal.engine.config import EngineOptions
from shoal.engine.group.coordinator import open_group
from shoal.engine.group.launcher import RankHandle, RankStart
from shoal.engine.group.processes import ProcessLauncher, RankProcess

SLACK_BYTES = 16 * 2**20  # threads, sockets, kernels
POLL_S = 0.005


class RecordingLauncher(ProcessLauncher):
    def launch(self, starts: Sequence[RankStart]) -> list[RankHandle]:
        handles = super().launch(starts)
        self.pids = [handle.pid for handle in handles if isinstance(handle, RankProcess)]
        return handles


def private_bytes(pid: int) -> int:
    """Memory of a process's own; pages of mapped files, which all processes share, are not in it."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no RssAnon")


class Peaks:
    """The most private memory that each process has had while this was entered."""

    def __init__(self, pids: Sequence[int]) -> None:
        self.bytes = {pid: private_bytes(pid) for pid in pids}
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Peaks:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._is_over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._is_over.wait(POLL_S):
            for pid in self.bytes:
                self.bytes[pid] = max(self.bytes[pid], private_bytes(pid))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """660 MB in bfloat16; what a layer reads at once is less than a tenth of it."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=2048, intermediate_size=8192, num_hidden_layers=4, num_attention_heads=16, num_key_value_heads=4,
        vocab_size=16_000, max_position_embeddings=512,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("large")
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    model.to_empty(device="cpu").save_pretrained(path)
    return path


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
@pytest.mark.parametrize(("tensor_ranks", "stages"), [(2, 1), (1, 2), (2, 2)])
def test_a_rank_holds_its_share_and_never_a_whole_copy(checkpoint: Path, tensor_ranks: int, stages: int) -> None:
    options = EngineOptions(
        str(checkpoint), dtype="bfloat16", tensor_parallel=tensor_ranks, pipeline_parallel=stages, num_threads=1,
        kv_memory_bytes=2**24, max_model_len=256,
    )  # fmt: skip
    launcher = RecordingLauncher()
    config, executor = open_group(options, launcher, lambda what, done, total: None)
    try:
        before = {pid: private_bytes(pid) for pid in launcher.pids}
        with Peaks(launcher.pids) as peaks:
            info = executor.start()
        whole = 2 * config.model.num_parameters
        for rank in info.ranks:
            held = private_bytes(rank.pid) - before[rank.pid]  # the KV pool is not touched yet
            most = peaks.bytes[rank.pid] - before[rank.pid]
            share = whole / (tensor_ranks * stages)
            print(f"{rank}: {held / 2**20:.0f} MiB held, {most / 2**20:.0f} at most, of {whole / 2**20:.0f} in all")
            assert rank.weight_bytes == pytest.approx(share, rel=0.1)
            assert held == pytest.approx(rank.weight_bytes, rel=0.1, abs=SLACK_BYTES)
            assert most < rank.weight_bytes * 1.1 + whole / 10 + SLACK_BYTES
    finally:
        executor.close()
