"""The examples do what they say."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from shoal.cluster.config import EMBEDDED_MODEL, HttpSettings, load_config, locate_model
from shoal.engine.config import EngineOptions, Machine, resolve
from shoal.engine.models.registry import read_model_config

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def run(example: str, *arguments: str) -> str:
    command = [sys.executable, str(EXAMPLES / example), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_offline_answers() -> None:
    assert "The capital of France is Paris." in run("offline.py")


def test_a_pipeline_of_two_processes_answers() -> None:
    first, second, *answer = run("pipeline.py").splitlines()
    assert first.partition(": ")[2].startswith("layers 0 to 14")
    assert second.partition(": ")[2].startswith("layers 15 to 29")
    assert answer == ["The capital of France is Paris."]


def test_speculation_repeats_a_poem_in_fewer_steps() -> None:
    *poem, steps, drafts = run("speculative.py").splitlines()
    assert (poem[0], poem[-1]) == ("The harbour wakes before the sun,", "comes home behind a yellow light.")
    num_tokens, num_steps = (int(word) for word in steps.partition(":")[0].split() if word.isdecimal())
    num_accepted = int(drafts.split()[0])
    assert num_tokens == num_steps + num_accepted
    assert num_accepted > 0


def test_parallel_sampling_shares_the_prompt() -> None:
    *samples, counts = run("parallel_sampling.py").splitlines()
    texts = [line.partition(": ")[2] for line in samples]
    assert len(set(texts)) == 4
    num_prompt, num_shared = (int(word) for word in counts.split() if word.isdecimal())
    assert num_shared == num_prompt * 3 // 4 - 3  # all samples but the first compute only the prompt's last token


def test_beams_come_best_first() -> None:
    best, second = run("beam_search.py").splitlines()
    scores = [float(line.partition("log-probability")[2].partition(":")[0]) for line in (best, second)]
    assert scores == sorted(scores, reverse=True)
    assert "Paris" in best


def test_chat_stream_asks_the_server_that_it_was_given() -> None:
    """Port 9 of this host discards, or refuses; the example with a real server is part of tests/e2e."""
    command = [sys.executable, str(EXAMPLES / "chat_stream.py"), "http://127.0.0.1:9/v1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert "APIConnectionError" in done.stderr


def test_the_configuration_loads() -> None:
    config = load_config(str(EXAMPLES / "config.yaml"))
    (model,) = config.models
    assert (model.name, model.model) == ("smollm2", EMBEDDED_MODEL)
    assert model.engine.kv_memory == 2**30
    assert config.http == HttpSettings()


def test_the_configuration_shows_the_defaults_of_a_cpu() -> None:
    (shown,), (default,) = load_config(str(EXAMPLES / "config.yaml")).models, load_config().models
    for key in ("replicas", "max_ongoing_requests", "max_queued_requests"):
        assert getattr(shown, key) == getattr(default, key), key
    model = locate_model(EMBEDDED_MODEL)
    machine = Machine("cpu", free_bytes=2**33, num_cores=1)
    decided = resolve(EngineOptions(model), read_model_config(model), machine)
    options = shown.options(model)
    for key in ("block_size", "max_step_tokens", "max_running_requests", "enable_prefix_caching", "scheduling_policy"):
        assert getattr(options, key) == getattr(decided, key), key
