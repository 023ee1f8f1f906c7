"""An executor over a group of ranks: the same over processes of this host and actors of a cluster."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

from shoal.engine.config import ConfigError, EngineConfig, EngineOptions, Machine, resolve
from shoal.engine.executor import EngineFactory, ExecutorError, ExecutorInfo, Progress
from shoal.engine.group.launcher import Launcher
from shoal.engine.group.messages import (
    Allocate,
    Configure,
    Found,
    FromRank,
    Hello,
    Loaded,
    Loading,
    Ready,
    Step,
    Stepped,
    Welcome,
)
from shoal.engine.group.rank_group import RankGroup
from shoal.engine.models.registry import read_draft_config, read_model_config
from shoal.engine.plan import StepPlan, StepResult
from shoal.engine.shapes import check_shape
from shoal.engine.sizing import ModelSizing

_Answer = TypeVar("_Answer", bound=FromRank)

_ANY_MACHINE = Machine("cpu", 2**60, 1)
HELLO_TIMEOUT_S = 180.0  # a rank imports torch first, and its host may have to fetch it from a slow disk


def group_engine(options: EngineOptions, launcher: Launcher) -> EngineFactory:
    """Ranks that `launcher` starts. What it makes raises as `open_group` does."""

    def make(progress: Progress) -> tuple[EngineConfig, GroupExecutor]:
        return open_group(options, launcher, progress)

    return make


def open_group(options: EngineOptions, launcher: Launcher, progress: Progress) -> tuple[EngineConfig, GroupExecutor]:
    """Start the ranks, see what they run on, and decide what is open in `options`. Nothing is loaded yet.

    Raises ConfigError for options that cannot work, before any rank starts where it does not take their machines to
    know, and ExecutorError, naming the rank, if one does not come up.
    """
    model, draft_model = read_model_config(options.model), read_draft_config(options)
    # What no machine could do is refused here; which shapes fit is known once the ranks have told what they run on.
    ModelSizing(resolve(options, model, _ANY_MACHINE, draft_model)).group(
        options.tensor_parallel, options.pipeline_parallel, options.stage_layers
    )
    group = RankGroup(options, launcher)
    try:
        nodes = _greet(group, options, progress)
        found = _gather(group, Found, options.step_timeout_s)
        machine = _weakest([answer.machine for answer in found], nodes)
        config = resolve(options, model, machine, draft_model)
        check_shape(config, machine, ranks_on_host=max(Counter(nodes).values()))
    except BaseException:
        group.close()
        raise
    return config, GroupExecutor(group, config, found[0], nodes, progress)


class GroupExecutor:
    """An Executor whose ranks are somewhere else. Made by `open_group`."""

    def __init__(
        self, group: RankGroup, config: EngineConfig, meeting: Found, nodes: list[str], progress: Progress
    ) -> None:
        """`meeting`: where the ranks' process groups meet. `nodes`: the host of each rank."""
        self._group = group
        self._config = config
        self._meeting = meeting
        self._nodes = nodes
        self._progress = progress
        self._in_flight: deque[int] = deque()  # steps, oldest first

    def start(self) -> ExecutorInfo:
        group, config, meeting = self._group, self._config, self._meeting
        on_host = Counter(self._nodes)
        for rank, node in enumerate(self._nodes):
            group.send([rank], Configure(config, meeting.store_host, meeting.store_port, on_host[node]))
        loading = _LoadingProgress(self._progress, group.size)
        num_blocks = min(a.num_blocks for a in _gather(group, Loaded, config.step_timeout_s, on_message=loading.take))
        group.send_all(Allocate(num_blocks))
        ready = _gather(group, Ready, config.step_timeout_s)
        return ExecutorInfo(num_blocks, tuple(answer.info for answer in ready))

    def submit(self, plan: StepPlan) -> None:
        self._group.send_all(Step(plan))
        self._in_flight.append(plan.step)

    def collect(self) -> StepResult:
        step, timeout_s = self._in_flight[0], self._config.step_timeout_s
        heard = self._group.receive(timeout_s)
        if heard is None:
            slow = ", ".join(self._group.name(rank) for rank in self._group.slowest())
            self._group.fail(ExecutorError(f"step {step} has taken more than {timeout_s:g} s; furthest behind: {slow}"))
        rank, message = heard
        if not isinstance(message, Stepped) or message.result.step != step:
            self._group.fail(ExecutorError(f"{self._group.name(rank)} sent {message} instead of step {step}"))
        self._in_flight.popleft()
        return replace(message.result, ranks=self._group.work)

    def check(self) -> None:
        self._group.check()

    def close(self) -> None:
        self._group.close()


class _LoadingProgress:
    """The ranks' loading as one progress, from when all have begun."""

    def __init__(self, progress: Progress, num_ranks: int) -> None:
        self._progress = progress
        self._num_ranks = num_ranks
        self._latest: dict[int, Loading] = {}

    def take(self, rank: int, message: FromRank) -> None:
        if isinstance(message, Loading):
            self._latest[rank] = message
            latest = self._latest.values()
            if len(latest) == self._num_ranks:
                self._progress("loading weights", sum(m.done for m in latest), sum(m.total for m in latest))


def _greet(group: RankGroup, options: EngineOptions, progress: Progress) -> list[str]:
    """Wait for the hello of all ranks: the host of each."""
    num_up = 0

    def count(rank: int, message: FromRank) -> None:
        nonlocal num_up
        num_up += 1
        progress("starting ranks", num_up, group.size)

    progress("starting ranks", 0, group.size)
    hellos = _gather(group, Hello, HELLO_TIMEOUT_S, on_message=count)
    group.send_all(Welcome(options.device, options.heartbeat_timeout_s))
    return [hello.node for hello in hellos]


def _gather(
    group: RankGroup,
    kind: type[_Answer],
    timeout_s: float,
    *,
    on_message: Callable[[int, FromRank], None] = lambda rank, message: None,
) -> list[_Answer]:
    """One answer of this kind from each rank, in rank order.

    Raises ExecutorError if nothing at all is heard for `timeout_s`, heartbeats apart.
    """
    answers: dict[int, _Answer] = {}
    while len(answers) < group.size:
        heard = group.receive(timeout_s)
        if heard is None:
            late = ", ".join(group.name(rank) for rank in range(group.size) if rank not in answers)
            group.fail(ExecutorError(f"no {kind.__name__} within {timeout_s:g} s from {late}"))
        rank, message = heard
        on_message(rank, message)
        if isinstance(message, kind):
            answers[rank] = message
    return [answers[rank] for rank in range(group.size)]


def _weakest(machines: list[Machine], nodes: list[str]) -> Machine:
    """What every rank has at least; ranks of one host share its cores. Raises ConfigError if the devices differ."""
    devices = {machine.device: rank for rank, machine in enumerate(machines)}
    if len(devices) > 1:
        told = " and ".join(f"rank {rank} has {device}" for device, rank in devices.items())
        raise ConfigError(
            f"all ranks need the same kind of device, but {told}: give each rank a GPU, or set device to 'cpu'",
            field="device",
        )
    on_host = Counter(nodes)
    return replace(
        machines[0],
        free_bytes=min(machine.free_bytes for machine in machines),
        num_cores=min(max(1, m.num_cores // on_host[node]) for m, node in zip(machines, nodes, strict=True)),
        has_fast_bfloat16=all(machine.has_fast_bfloat16 for machine in machines),
    )
