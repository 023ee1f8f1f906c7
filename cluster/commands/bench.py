"""`shoal bench`: the engine of one replica, in this process: how many tokens it makes, or what its steps cost.

`--calibrate` times a designed set of steps and writes the hardware profile that `shoal simulate` replays traces with.
"""

from __future__ import annotations

import platform
import random
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import yaml

from shoal.cluster.config import ClusterConfig, ModelSettings, locate_model
from shoal.cluster.simulation.calibrate import Fit, Limits, Scene, Timing, calibrate
from shoal.engine.config import ConfigError, EngineOptions, count_cores
from shoal.engine.core import EngineCore
from shoal.engine.executor import EngineFactory, Executor, ExecutorError, ExecutorInfo
from shoal.engine.plan import StepPlan, StepResult
from shoal.engine.request import Request, RequestId, SamplingParams
from shoal.engine.step_time import StepWork, work_of

REQUEST_COUNTS: Final = (1, 8, 32)
NUM_PROMPT: Final = 128
NUM_NEW: Final = 64


def bench(config: ClusterConfig, *, is_calibrating: bool = False, out: str | None = None) -> int:
    """Measure the first model of `config` as one of its replicas would run here. Answers the exit code.

    Raises ConfigError.
    """
    _check_out(out, is_calibrating=is_calibrating)
    model = config.models[0]
    options = model.options(locate_model(model.model))
    if is_calibrating:
        options = replace(options, speculative=None)  # a profile is of steps without drafts
    start = time.perf_counter()
    _say(f"loading {model.name}")
    try:
        with closing(BenchEngine(_engine_factory(options))) as engine:
            engine.start()
            start_s = time.perf_counter() - start
            if is_calibrating:
                _write(_profile(model, engine, start_s), out)
            else:
                _print_throughput(model, engine)
    except ExecutorError as error:
        print(f"shoal: error: {error}", file=sys.stderr)
        return 1
    return 0


class BenchEngine:
    """An engine that runs scenes. Use it from one thread. `clock` gives seconds."""

    def __init__(self, factory: EngineFactory, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        config, executor = factory(lambda what, done, total: None)
        self._executor = _NotingExecutor(executor)
        self._core = EngineCore(config, self._executor)

    def start(self) -> None:
        """Raises ConfigError and ExecutorError."""
        self._core.start()
        stats, config = self._core.stats(), self._core.config
        self.block_size = stats.block_size
        self.limits = Limits(
            kv_tokens=stats.num_blocks * stats.block_size,
            max_model_len=self._core.max_model_len,
            max_step_tokens=config.max_step_tokens,
            max_running_requests=config.max_running_requests,
        )

    def close(self) -> None:
        self._core.close()

    @property
    def machine(self) -> str:
        """What the first rank runs on."""
        config = self._core.config
        if config.device != "cpu":
            return f"{config.num_ranks} x {self._core.info.ranks[0].device_name}"
        ranks = "" if config.num_ranks == 1 else f"{config.num_ranks} ranks of "
        return f"{_cpu_name()} with {count_cores()} cores, {ranks}{config.num_threads} threads"

    def run(self, scene: Scene, seed: int) -> list[Timing]:
        """The scene's steps in order. Prompts are random tokens, so that no cache knows them."""
        for request in self._requests(scene, seed):
            self._core.add(request)
        self._executor.works.clear()
        timings = []
        last = self._clock()
        while self._core.has_work:
            self._core.step()
            now = self._clock()
            timings.append(Timing(self._executor.works.popleft(), now - last))
            last = now
        return timings

    def _requests(self, scene: Scene, seed: int) -> Iterator[Request]:
        chance = random.Random(f"{scene} {seed}")
        vocab_size = self._core.config.model.vocab_size
        params = SamplingParams(max_tokens=scene.num_new, temperature=0, ignore_eos=True)
        for number in range(scene.num_requests):
            prompt = tuple(chance.randrange(vocab_size) for _ in range(scene.num_prompt))
            request = Request(RequestId(f"{seed}-{number}"), prompt, params, seed=0, arrival_s=time.monotonic())
            self._core.check_request(request)
            yield request


class _NotingExecutor:
    """Ranks, and what each plan that was handed to them computes."""

    def __init__(self, executor: Executor) -> None:
        self._executor = executor
        self.works: deque[StepWork] = deque()

    def start(self) -> ExecutorInfo:
        return self._executor.start()

    def submit(self, plan: StepPlan) -> None:
        self.works.append(work_of(plan))
        self._executor.submit(plan)

    def collect(self) -> StepResult:
        return self._executor.collect()

    def check(self) -> None:
        self._executor.check()

    def close(self) -> None:
        self._executor.close()


def _engine_factory(options: EngineOptions) -> EngineFactory:
    if options.num_ranks == 1:
        from shoal.engine.worker import local_engine  # brings torch

        return local_engine(options)
    from shoal.engine.group.coordinator import group_engine
    from shoal.engine.group.processes import ProcessLauncher

    return group_engine(options, ProcessLauncher())


def _print_throughput(model: ModelSettings, engine: BenchEngine) -> None:
    """Tokens a second for several numbers of requests at once."""
    num_new = min(NUM_NEW, engine.limits.max_model_len // 2)
    num_prompt = min(NUM_PROMPT, engine.limits.max_model_len - num_new)
    print(f"{model.name} on {engine.machine}, requests of {num_prompt} prompt tokens and {num_new} new ones")
    engine.run(Scene(1, num_prompt, num_new=2), seed=-1)
    for count in REQUEST_COUNTS:
        seconds = sum(timing.seconds for timing in engine.run(Scene(count, num_prompt, num_new), seed=count))
        print(f"  {count:3d} at once: {count * num_new / seconds:8.1f} tokens/s, {seconds:7.2f} s", flush=True)


def _profile(model: ModelSettings, engine: BenchEngine, start_s: float) -> dict[str, Any]:
    """Keys and values of a hardware profile; see cluster/simulation/profile.py."""
    started = time.perf_counter()

    def say(done: int, total: int) -> None:
        _say(f"{time.perf_counter() - started:5.1f} s  {done} of {total} scenes")

    found = calibrate(engine.limits, engine.run, on_progress=say)
    _say("\n".join(_fit_lines(found)))
    limits, step_time = engine.limits, found.step_time
    return {
        "name": model.name,
        "kv_tokens": limits.kv_tokens,
        "block_tokens": engine.block_size,
        "max_step_tokens": limits.max_step_tokens,
        "max_running_requests": limits.max_running_requests,
        "step_s": {
            "base": step_time.base,
            "per_prefill_token": step_time.per_prefill_token,
            "per_decode_token": step_time.per_decode_token,
            "per_context_token": step_time.per_context_token,
        },
        "start_s": round(start_s, 2),
        "source": f"shoal bench --calibrate of {model.name} on {engine.machine}, {time.strftime('%Y-%m-%d')}: "
        f"{found.num_steps} kinds of steps, median error {found.median_error:.1%}, p90 {found.p90_error:.1%}",
    }


def _cpu_name() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _fit_lines(found: Fit) -> Sequence[str]:
    step_time = found.step_time
    return (
        f"a step takes {step_time.base * 1e3:.3f} ms and {step_time.per_prefill_token * 1e6:.2f} µs per prefill token, "
        f"{step_time.per_decode_token * 1e6:.2f} µs per decoding request, "
        f"{step_time.per_context_token * 1e6:.4f} µs per token of context",
        f"{found.num_steps} kinds of steps: median error {found.median_error:.1%}, p90 {found.p90_error:.1%}, "
        f"R2 {found.r2:.4f}",
    )


def _check_out(out: str | None, *, is_calibrating: bool) -> None:
    if out is None:
        return
    if not is_calibrating:
        raise ConfigError("--out is for the profile that --calibrate makes: add that, or leave --out away", field="out")
    if not Path(out).absolute().parent.is_dir():
        raise ConfigError(f"--out {out}: there is no folder {Path(out).parent}", field="out")


def _write(profile: dict[str, Any], out: str | None) -> None:
    text = yaml.safe_dump(profile, sort_keys=False, width=120)
    if out is None:
        print(text, end="")
        return
    try:
        Path(out).write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot write the profile to {out}: {error.strerror}", field="out") from None
    _say(f"the profile is in {out}: shoal simulate --trace FILE --replicas N --hardware {out}")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
