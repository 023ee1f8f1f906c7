"""The benchmark for GPUs works, from the first check to the last line; only its figures want a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


def run_tiny(*arguments: str) -> str:
    pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, str(ROOT / "bench/gpu/run.py"), "--tiny", *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    return done.stdout


def test_it_checks_measures_and_writes_a_result(tmp_path: Path) -> None:
    printed = run_tiny("--results", str(tmp_path))
    assert printed.count("right ") == 10
    assert "answers are the same with graphs" in printed
    assert " met" not in printed, "an interpreter reaches no goal"
    result = json.loads((tmp_path / "gpu.json").read_text())
    assert set(result["models"]) == {"Llama-3.1-8B", "Qwen3-0.6B", "Mixtral, 8 layers"}
    for model in result["models"].values():
        assert model["weight_bytes"] > 0
        assert {name: model[name]["requests"] for name in ("one", "one_without_graphs", "many")} == {
            "one": 1, "one_without_graphs": 1, "many": 3,
        }  # fmt: skip
        assert all(0 < model[name]["share"] < 1 for name in ("one", "one_without_graphs", "many"))
    assert all(0 < each["share"] < 1 for each in result["attention_decode"] + result["attention_prefill"])


def test_it_sweeps_over_tiles() -> None:
    assert len(run_tiny("--sweep").splitlines()) == 2
