"""What speculative decoding gives on prompts that a model copies or edits, and what it costs where nothing can be
guessed: off, ngram and suffix in turn, the embedded model in bfloat16.

    python bench/speculation.py [--rounds N] [--methods ngram,suffix] [--threads N] [--results bench/results]
    python bench/speculation.py --synthetic

The prompts are in bench/prompts/: "edit" asks for a Python file with one change, "quote" for a text word for word, and
"free" are open questions, answered greedily and at temperature 0.8. With one request at a time, each round plays the
next prompt of every workload in all modes, one after the other; with 32, all of them at once. Then the same over two
pipeline stages. No round knows of another: its cache salt keeps prompts out of the prefix cache and answers out of the
suffix tree. Whatever was guessed, the tokens must be those of plain decoding, or the run ends with an error.

A ratio is that of the medians of tokens per second over rounds, beside it the lowest and the highest of a single round.
Tokens per step are those that one step gives one request. The goals are at least 2.0 tokens per step and 1.4 times the
speed for one edit or quotation, and nowhere less than 0.97.

Before that, or alone with --synthetic: the real scheduler, a model that draws its tokens independently of each other,
and guesses that are right with probability a. A step with g of them should give (1 - a^(g+1)) / (1 - a) tokens
(Leviathan et al. 2023, arXiv:2211.17192, equation 1); the goal is within 3 %. Some twelve minutes in all.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import statistics
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import machine
import torch
from overlap import MODEL
from tqdm import tqdm

from shoal.cluster.config import EMBEDDED_MODEL, locate_model
from shoal.engine.config import EngineOptions, Machine, SpeculativeOptions, resolve
from shoal.engine.core import EngineCore
from shoal.engine.executor import ExecutorInfo, RankInfo
from shoal.engine.group.coordinator import group_engine
from shoal.engine.group.processes import ProcessLauncher
from shoal.engine.plan import ContinuedRequest, NewRequest, StepPlan, StepResult
from shoal.engine.request import NO_DRAFTS, DraftCounts, Request, RequestId, SamplingParams
from shoal.engine.speculation.proposer import Draft
from shoal.engine.tokenizer import Tokenizer
from shoal.engine.worker import local_engine

if TYPE_CHECKING:
    from matplotlib.axes import Axes

DOCS = Path(__file__).parents[1] / "docs"
PROMPTS = Path(__file__).parent / "prompts"
OFF = "off"
METHODS = ("ngram", "suffix")
KV_BYTES = 2**29
COLOURS = {"ngram": "#0072B2", "suffix": "#D55E00"}

ACCEPTANCES = (0.3, 0.5, 0.7, 0.9)
DRAFT_LENGTHS = (1, 2, 4, 8)
SYNTHETIC_REQUESTS = 32
SYNTHETIC_TOKENS = 1000  # of each request, so that the last step, which is cut short, is one among many


# -- prompts ---------------------------------------------------------------------------------------------------


class Prompt(NamedTuple):
    token_ids: tuple[int, ...]
    temperature: float = 0.0
    seed: int = 0


Workloads = Mapping[str, Sequence[Prompt]]


def load_workloads(tokenizer: Tokenizer) -> Workloads:
    """Prompts by workload, through the chat template. An answer to "edit" is begun for the model, up to the file: left
    alone, so small a model rather explains what it would change.
    """

    def chat(question: str, beginning: str = "") -> tuple[int, ...]:
        asked = tokenizer.encode_chat([{"role": "user", "content": question}])
        return (*asked, *tokenizer.encode(beginning, add_special_tokens=False)) if beginning else tuple(asked)

    edits = []
    for path in sorted((PROMPTS / "edit").glob("*.txt")):
        instruction, _, source = path.read_text().partition("\n\n")
        question = f"{instruction} Answer with the whole file, changed.\n\n```python\n{source}```"
        edits.append(Prompt(chat(question, "Here is the whole file with the change:\n\n```python\n")))
    quotes = [Prompt(chat(path.read_text().rstrip())) for path in sorted((PROMPTS / "quote").glob("*.txt"))]
    questions = [chat(question) for question in (PROMPTS / "free.txt").read_text().splitlines()]
    half = len(questions) // 2
    return {
        "edit": edits,
        "quote": quotes,
        "free": [Prompt(ids) for ids in questions[:half]],
        "free, 0.8": [Prompt(ids, 0.8, seed) for seed, ids in enumerate(questions[half:])],
    }


# -- the embedded model ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Setting:
    """How prompts are played. With `at_once`, those of all workloads together, otherwise one by one."""

    name: str
    stages: int
    at_once: bool
    rounds: int
    num_new: int


SETTINGS = (
    Setting("one request", stages=1, at_once=False, rounds=8, num_new=256),
    Setting("32 requests", stages=1, at_once=True, rounds=5, num_new=96),
    Setting("one request, two stages", stages=2, at_once=False, rounds=5, num_new=256),
    Setting("32 requests, two stages", stages=2, at_once=True, rounds=5, num_new=96),
)


@dataclass(frozen=True, slots=True)
class Played:
    """Prompts from first to last token in one mode."""

    seconds: float
    decode_seconds: float  # from when the last prompt was computed
    token_ids: list[list[int]]  # by prompt
    drafts: DraftCounts

    @property
    def num_tokens(self) -> int:
        return sum(map(len, self.token_ids))

    @property
    def tokens_per_s(self) -> float:
        return self.num_tokens / self.seconds

    @property
    def decode_tokens_per_s(self) -> float:
        return (self.num_tokens - len(self.token_ids)) / self.decode_seconds


class Engine:
    """The embedded model in one mode."""

    def __init__(self, mode: str, stages: int, threads: int) -> None:
        options = EngineOptions(
            locate_model(EMBEDDED_MODEL), dtype="bfloat16", device="cpu", kv_memory_bytes=KV_BYTES,
            pipeline_parallel=stages, num_threads=threads,
            speculative=SpeculativeOptions.of(None if mode == OFF else mode),
        )  # fmt: skip
        make = local_engine(options) if stages == 1 else group_engine(options, ProcessLauncher())
        self._core = EngineCore(*make(lambda what, done, total: None))
        self._core.start()

    def play(self, prompts: Sequence[Prompt], num_new: int, salt: str) -> Played:
        """All `prompts` at once, up to `num_new` tokens each."""
        start = time.monotonic()
        answers: dict[RequestId, list[int]] = {}
        for index, prompt in enumerate(prompts):
            request_id = RequestId(f"{salt} {start} {index}")
            answers[request_id] = []
            params = SamplingParams(max_tokens=num_new, temperature=prompt.temperature)
            request = Request(request_id, prompt.token_ids, params, prompt.seed, time.monotonic(), cache_salt=salt)
            self._core.add(request)
        finished, drafts = [], NO_DRAFTS
        while self._core.has_work:
            for output in self._core.step():
                answers[output.request_id] += output.token_ids
                drafts = drafts.plus(output)
                if output.times is not None:
                    finished.append(output.times)
        last_first = max(times.first_token_s or 0.0 for times in finished)
        end = max(times.finished_s for times in finished)
        return Played(end - start, end - last_first, list(answers.values()), drafts)

    def close(self) -> None:
        self._core.close()


Rounds = Mapping[str, Sequence[Played]]  # by mode, one per round


def measure(engines: Mapping[str, Engine], setting: Setting, workloads: Workloads) -> dict[str, Rounds]:
    """By workload. Modes take turns in going first."""
    if setting.at_once:
        batches = {"mixed": [[prompt for prompts in workloads.values() for prompt in prompts]]}
    else:
        batches = {name: [[prompt] for prompt in prompts] for name, prompts in workloads.items()}
    found: dict[str, dict[str, list[Played]]] = {name: {mode: [] for mode in engines} for name in batches}
    modes = deque(engines)
    with tqdm(total=setting.rounds * len(batches) * len(modes), desc=setting.name, leave=False, disable=None) as bar:
        for number in range(setting.rounds):
            for workload, plays in batches.items():
                prompts = plays[number % len(plays)]
                for mode in modes:
                    salt = f"{setting.name} {number}"
                    found[workload][mode].append(engines[mode].play(prompts, setting.num_new, salt))
                    bar.update()
                check_same(f"{setting.name}, {workload}, round {number + 1}", found[workload])
                modes.rotate()
    return {workload: dict(rounds) for workload, rounds in found.items()}


def check_same(where: str, rounds: Rounds) -> None:
    """End the run if speculation changed a token of the last round."""
    expected = rounds[OFF][-1].token_ids
    for mode in rounds:
        for prompt, (plain, guessed) in enumerate(zip(expected, rounds[mode][-1].token_ids, strict=True)):
            if plain != guessed:
                place = next(i for i, (a, b) in enumerate(zip_longest(plain, guessed)) if a != b)
                raise SystemExit(f"{where}: {mode} differs from plain decoding, prompt {prompt}, token {place}")


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table: a workload in one mode, beside plain decoding."""

    setting: str
    workload: str
    mode: str
    tokens_per_s: float  # median of the rounds
    ratio: float  # of the medians
    ratio_range: tuple[float, float]  # of single rounds
    decode_ratio: float  # of the medians, without the prompts
    tokens_per_step: float
    accepted_share: float  # of the drafted tokens
    accepted_at: tuple[float, ...]  # share of steps with drafts that accepted so many and one more
    rounds_tokens_per_s: tuple[float, ...]
    goals: Mapping[str, float]  # by field of this row: at least so much

    @property
    def is_met(self) -> bool:
        return all(getattr(self, field) >= goal for field, goal in self.goals.items())

    def __str__(self) -> str:
        low, high = self.ratio_range
        verdict = "" if self.mode == OFF else "met" if self.is_met else "MISSED"
        return (
            f"{self.setting:24} {self.workload:10} {self.mode:7} {self.tokens_per_s:9.1f} {self.ratio:6.2f} "
            f"{f'{low:.2f} to {high:.2f}':>13} {self.decode_ratio:7.2f} {self.tokens_per_step:8.2f} "
            f"{self.accepted_share:9.0%}  {verdict}"
        )


HEADER = (
    f"{'':24} {'':10} {'mode':7} {'tokens/s':>9} {'ratio':>6} {'single rounds':>13} {'decode':>7} {'per step':>8} "
    f"{'accepted':>9}  goal"
)


def rows_of(setting: Setting, workload: str, rounds: Rounds) -> list[Row]:
    plain = rounds[OFF]
    rows = []
    for mode, plays in rounds.items():
        ratios = [off.seconds / play.seconds for off, play in zip(plain, plays, strict=True)]
        drafts = sum([play.drafts for play in plays], NO_DRAFTS)
        # The first token of each comes with its prompt; every later step gives one and what was accepted.
        num_tokens = sum(play.num_tokens - len(play.token_ids) for play in plays)
        goals = {} if mode == OFF else {"ratio": 0.97}
        if mode != OFF and workload in ("edit", "quote"):
            goals = {"ratio": 1.4, "tokens_per_step": 2.0}
        rates = tuple(play.tokens_per_s for play in plays)
        rows.append(
            Row(
                setting=setting.name,
                workload=workload,
                mode=mode,
                tokens_per_s=statistics.median(rates),
                ratio=statistics.median(rates) / statistics.median(play.tokens_per_s for play in plain),
                ratio_range=(min(ratios), max(ratios)),
                decode_ratio=statistics.median(play.decode_tokens_per_s for play in plays)
                / statistics.median(play.decode_tokens_per_s for play in plain),
                tokens_per_step=num_tokens / (num_tokens - drafts.num_accepted),
                accepted_share=drafts.num_accepted / max(1, drafts.num_drafted),
                accepted_at=tuple(count / drafts.num_steps for count in drafts.accepted_at),
                rounds_tokens_per_s=rates,
                goals=goals,
            )
        )
    return rows


def run(methods: Sequence[str], rounds: int | None, threads: int) -> list[Row]:
    """Every setting, printed as it comes. With two stages each rank has one thread."""
    workloads = load_workloads(Tokenizer.load(locate_model(EMBEDDED_MODEL)))
    rows = []
    print(f"\n{HEADER}", flush=True)
    for stages in sorted({setting.stages for setting in SETTINGS}):
        with contextlib.ExitStack() as stack:
            engines = {}
            for mode in (OFF, *methods):
                engines[mode] = Engine(mode, stages, threads if stages == 1 else 1)
                stack.callback(engines[mode].close)
                for prompts in workloads.values():  # what is learned about steps is learned before
                    engines[mode].play(prompts[:2], 32, salt="before")
            for setting in SETTINGS:
                if setting.stages == stages:
                    chosen = replace(setting, rounds=rounds or setting.rounds)
                    for workload, found in measure(engines, chosen, workloads).items():
                        for row in rows_of(chosen, workload, found):
                            rows.append(row)
                            print(row, flush=True)
    return rows


# -- the synthetic model -------------------------------------------------------------------------------------------


def token_at(request_id: RequestId, position: int) -> int:
    """What the synthetic model draws: each token independently of all others."""
    return random.Random(f"{request_id} {position}").randrange(1, MODEL.vocab_size)


class Draws:
    """An Executor whose model draws `token_at`, and verifies guesses as the ranks do."""

    def __init__(self) -> None:
        self.num_steps = 0  # of single requests, those aside that end a prompt
        self.num_tokens = 0  # that these steps gave
        self._num_known: dict[RequestId, int] = {}
        self._plans: deque[StepPlan] = deque()

    def start(self) -> ExecutorInfo:
        return ExecutorInfo(20_000, (RankInfo(0, 0, "here", 0, "synthetic", 0, MODEL.num_layers, 0, 0),))

    def submit(self, plan: StepPlan) -> None:
        self._plans.append(plan)

    def collect(self) -> StepResult:
        plan = self._plans.popleft()
        tokens = {}
        for new in plan.new:
            self._num_known[new.request_id] = len(new.token_ids)
            if new.num_computed + new.num_new == len(new.token_ids):
                tokens[new.request_id] = self._verify(new, ())
        for known in plan.continued:
            self._num_known[known.request_id] += len(known.new_token_ids)
            if known.num_computed + known.num_new == self._num_known[known.request_id] + len(known.draft_ids):
                tokens[known.request_id] = self._verify(known, known.draft_ids)
                if known.new_token_ids:
                    self.num_steps += 1
                    self.num_tokens += len(tokens[known.request_id])
        return StepResult(plan.step, tokens)

    def _verify(self, entry: NewRequest | ContinuedRequest, draft_ids: tuple[int, ...]) -> tuple[int, ...]:
        """Tokens up to and including the first that was not guessed."""
        drawn: list[int] = []
        start = self._num_known[entry.request_id]
        for guess in (*draft_ids, None):
            drawn.append(token_at(entry.request_id, start + len(drawn)))
            if drawn[-1] != guess:
                break
        return tuple(drawn)

    def check(self) -> None:
        pass

    def close(self) -> None:
        pass


class Guesser:
    """A Proposer that knows the next token with probability `acceptance`, each one independently."""

    def __init__(self, acceptance: float) -> None:
        self._acceptance = acceptance
        self._numbers = random.Random(0)

    def propose(self, request: Request, most: int) -> Draft:
        guesses = []
        for place in range(most):
            token = token_at(request.request_id, request.num_known + place)
            is_right = self._numbers.random() < self._acceptance
            guesses.append(token if is_right else token % (MODEL.vocab_size - 1) + 1)
        return Draft(tuple(guesses), (0,) * most)

    def forget(self, request: Request) -> None:
        pass


@dataclass(frozen=True, slots=True)
class Expectation:
    """Tokens per step of one request."""

    acceptance: float
    num_drafts: int
    measured: float

    @property
    def formula(self) -> float:
        return (1 - self.acceptance ** (self.num_drafts + 1)) / (1 - self.acceptance)

    @property
    def deviation(self) -> float:
        return self.measured / self.formula - 1


def expect(acceptance: float, num_drafts: int) -> Expectation:
    speculative = SpeculativeOptions(method="ngram", num_speculative_tokens=num_drafts, adaptive=False)
    options = EngineOptions(
        "", async_scheduling=False, enable_prefix_caching=False, max_running_requests=SYNTHETIC_REQUESTS,
        speculative=speculative,
    )  # fmt: skip
    device = Draws()
    core = EngineCore(resolve(options, MODEL, Machine("cpu", 2**34, 2)), device, proposer=Guesser(acceptance))
    with contextlib.closing(core):
        core.start()
        params = SamplingParams(max_tokens=SYNTHETIC_TOKENS, ignore_eos=True)
        for index in range(SYNTHETIC_REQUESTS):
            core.add(Request(RequestId(f"r{index}"), (1,) * 8, params, seed=0, arrival_s=float(index)))
        while core.has_work:
            core.step()
    return Expectation(acceptance, num_drafts, device.num_tokens / device.num_steps)


def run_synthetic() -> list[Expectation]:
    print(f"{'a':>4} {'g':>3} {'tokens/step':>12} {'formula':>8} {'deviation':>10}")
    cells = []
    for acceptance in ACCEPTANCES:
        for num_drafts in DRAFT_LENGTHS:
            cell = expect(acceptance, num_drafts)
            cells.append(cell)
            print(
                f"{acceptance:4.1f} {num_drafts:3d} {cell.measured:12.3f} {cell.formula:8.3f} {cell.deviation:+10.2%}",
                flush=True,
            )
    worst = max(abs(cell.deviation) for cell in cells)
    print(f"worst deviation {worst:.2%}, goal at most 3 %: {'met' if worst <= 0.03 else 'MISSED'}", flush=True)
    return cells


# -- the picture ----------------------------------------------------------------------------------------------------


def save_plot(rows: Sequence[Row], path: Path) -> None:
    """Left: speed beside plain decoding. Right: how many guesses in a row are right, with one request."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "svg.hashsalt": "shoal"}):
        figure = Figure(figsize=(11, 4.5), layout="constrained", facecolor="white")
        FigureCanvasAgg(figure)
        speed, acceptance = figure.subplots(1, 2, width_ratios=(3, 2))
        _plot_ratios(speed, [row for row in rows if row.mode != OFF])
        _plot_acceptance(acceptance, [row for row in rows if row.mode != OFF and row.setting == SETTINGS[0].name])
        figure.savefig(path)


def _plot_ratios(axes: Axes, rows: Sequence[Row]) -> None:
    names = list(dict.fromkeys(f"{row.setting}: {row.workload}" for row in rows))
    modes = list(dict.fromkeys(row.mode for row in rows))
    height = 0.8 / len(modes)
    for index, mode in enumerate(modes):
        chosen = [row for row in rows if row.mode == mode]
        places = [place + (index + 0.5) * height - 0.4 for place in range(len(names))]
        ranges = [
            [max(0.0, row.ratio - row.ratio_range[0]) for row in chosen],
            [max(0.0, row.ratio_range[1] - row.ratio) for row in chosen],
        ]
        ratios = [row.ratio for row in chosen]
        axes.barh(places, ratios, height, xerr=ranges, color=COLOURS[mode], ecolor="grey", label=mode)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.axvline(1.0, color="black", linewidth=1)
    axes.set(xlabel="times as fast as plain decoding (grey: single rounds)", xlim=(0, None))
    axes.legend(frameon=False, loc="lower right")


def _plot_acceptance(axes: Axes, rows: Sequence[Row]) -> None:
    dashes = dict(zip(dict.fromkeys(row.workload for row in rows), ("-", "--", ":", "-."), strict=False))
    for row in rows:
        shares = [100 * share for share in row.accepted_at]
        label = f"{row.mode}, {row.workload}"
        style = dashes[row.workload]
        axes.plot(range(1, len(shares) + 1), shares, style, color=COLOURS[row.mode], label=label)
    axes.set(xlabel="guesses accepted in a row, at least", ylabel="steps with guesses, %", ylim=(0, 100))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, help="of every setting (default: 8 with one request, otherwise 5)")
    parser.add_argument("--methods", default=",".join(METHODS), help="default: %(default)s; none: only plain decoding")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: %(default)s")
    parser.add_argument("--results", type=Path, default=machine.RESULTS, help="folder (default: %(default)s)")
    parser.add_argument("--synthetic", action="store_true", help="only the synthetic model; nothing is written")
    given = parser.parse_args()
    cells = run_synthetic()
    if given.synthetic:
        return
    methods = [method for method in given.methods.split(",") if method]
    rows = run(methods, given.rounds, given.threads)
    report: dict[str, Any] = {
        "machine": machine.facts(given.threads),
        "model": EMBEDDED_MODEL,
        "dtype": "bfloat16",
        "rows": [asdict(row) for row in rows],
        "synthetic": [
            {**asdict(cell), "formula": cell.formula, "deviation": cell.deviation} for cell in cells
        ],
    }  # fmt: skip
    print(f"\nwritten to {machine.write_result(given.results, 'speculation', report)}")
    if methods:
        save_plot(rows, DOCS / "speculation.svg")


if __name__ == "__main__":
    main()
