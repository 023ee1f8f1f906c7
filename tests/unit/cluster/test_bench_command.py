"""`shoal bench`, from a model to a profile: its rates are those of the device that ran the steps."""

from __future__ import annotations

import re
from collections import deque
from pathlib import Path

import pytest
import torch
import transformers

from shoal.cluster import cli
from shoal.cluster.commands.bench import BenchEngine
from shoal.cluster.simulation.calibrate import Scene, calibrate
from shoal.cluster.simulation.profile import load_profile
from shoal.engine.config import EngineConfig, EngineOptions, Machine, ModelConfig, resolve
from shoal.engine.executor import ExecutorInfo, Progress, RankInfo
from shoal.engine.plan import StepPlan, StepResult
from shoal.engine.request import RequestId
from shoal.engine.step_time import StepTime, StepWork, work_of

KNOWN = StepTime(base=0.01, per_prefill_token=1e-3, per_decode_token=2e-3, per_context_token=1e-6)
MODEL = ModelConfig(
    path="tiny", architecture="LlamaForCausalLM", num_layers=2, hidden_size=8, num_heads=4, num_kv_heads=2, head_dim=2,
    vocab_size=997, max_position=4096, layer_windows=(None, None), stored_dtype="float32", num_parameters=1000,
    eos_token_ids=(0,), hf_config={},
)  # fmt: skip


class TimedDevice:
    """An executor whose steps take what KNOWN says, by its own clock."""

    def __init__(self) -> None:
        self.now = 0.0
        self._known: dict[RequestId, int] = {}
        self._in_flight: deque[StepPlan] = deque()

    def clock(self) -> float:
        return self.now

    def start(self) -> ExecutorInfo:
        return ExecutorInfo(2000, (RankInfo(0, 0, "here", 1, "fake", 0, 2, 0, 0),))

    def submit(self, plan: StepPlan) -> None:
        self._in_flight.append(plan)

    def collect(self) -> StepResult:
        plan = self._in_flight.popleft()
        self.now += KNOWN.seconds(*work_of(plan))
        for new in plan.new:
            self._known[new.request_id] = len(new.token_ids)
        for continued in plan.continued:
            self._known[continued.request_id] += len(continued.new_token_ids) + continued.num_pending
        sampled = [
            entry.request_id
            for entry in (*plan.new, *plan.continued)
            if entry.num_computed + entry.num_new == self._known[entry.request_id]
        ]
        return StepResult(plan.step, dict.fromkeys(sampled, (1,)))

    def check(self) -> None:
        pass

    def close(self) -> None:
        pass


def bench_engine(*, is_ahead: bool) -> BenchEngine:
    device = TimedDevice()
    options = EngineOptions("tiny", max_step_tokens=256, max_running_requests=16, async_scheduling=is_ahead)

    def make(progress: Progress) -> tuple[EngineConfig, TimedDevice]:
        return resolve(options, MODEL, Machine("cpu", 2**30, 1)), device

    engine = BenchEngine(make, clock=device.clock)
    engine.start()
    return engine


@pytest.mark.parametrize("is_ahead", [False, True])
def test_the_rates_are_those_of_the_device(is_ahead: bool) -> None:
    engine = bench_engine(is_ahead=is_ahead)
    found = calibrate(engine.limits, engine.run, on_progress=lambda done, total: None)
    for name in StepTime.__slots__:
        assert getattr(found.step_time, name) == pytest.approx(getattr(KNOWN, name), rel=1e-3), name
    assert found.p90_error < 1e-3


def test_a_scene_is_run_to_its_end() -> None:
    works = [timing.work for timing in bench_engine(is_ahead=False).run(Scene(2, 300, 3), seed=0)]
    assert sum(work.num_prefill for work in works) == 2 * 300
    assert works[-1] == StepWork(0, works[-1].num_decode, works[-1].num_context)
    assert sum(work.num_decode for work in works) == 2 * 2


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A configuration with a tiny model of random weights."""
    folder = tmp_path_factory.mktemp("bench")
    torch.manual_seed(0)
    fields = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=200, max_position_embeddings=256,
    )  # fmt: skip
    transformers.LlamaForCausalLM(fields).save_pretrained(folder / "model")
    path = folder / "cluster.yaml"
    path.write_text(
        "models: [{name: tiny, model: model, engine: {dtype: float32, max_step_tokens: 64, max_running_requests: 8, "
        "block_size: 8, kv_memory: 512KiB, num_threads: 1}}]"
    )
    return path


def test_a_profile_says_what_the_engine_is_and_can_be_simulated_with(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = config.with_name("profile.yaml")
    assert cli.main(["bench", str(config), "--calibrate", "--out", str(out)]) == 0
    profile = load_profile(out)
    assert profile.block_tokens == 8
    assert profile.max_step_tokens == 64
    assert profile.max_running_requests == 8
    assert 0 < profile.kv_tokens <= 512 * 1024 // (2 * 2 * 2 * 8 * 4)  # layers, K and V, heads, head size, bytes
    assert profile.step_time.seconds(64, 0, 0) > 0
    assert profile.start_s > 0
    assert "tiny" in profile.source
    told = capsys.readouterr().err
    assert re.search(r"median error [\d.]+%, p90 [\d.]+%, R2 ", told)
    assert str(out) in told


def test_throughput_is_printed_for_several_numbers_of_requests(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["bench", str(config)]) == 0
    rates = re.findall(r"(\d+) at once: +([\d.]+) tokens/s", capsys.readouterr().out)
    assert [int(count) for count, _ in rates] == [1, 8, 32]
    assert all(float(rate) > 0 for _, rate in rates)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--out", "profile.yaml"], "--calibrate"),
        (["--calibrate", "--out", "no/such/folder/profile.yaml"], "there is no folder no/such/folder"),
        (["no-such-model"], "there is no no-such-model"),
        (["--num-threads", "0"], "num_threads"),
    ],
)
def test_what_cannot_work_is_one_line_before_anything_starts(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["bench", *arguments]) == 2
    told = capsys.readouterr().err
    assert said in told
    assert told.startswith("shoal: error: ")
