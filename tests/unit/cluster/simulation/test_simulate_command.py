"""`shoal simulate`, from the command line to a table, JSON and a picture."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from shoal.cluster import cli
from shoal.cluster.simulation.peers import SIMULATED_POLICIES
from shoal.cluster.simulation.profile import built_in_profiles

PROFILE = """
kv_tokens: 20480
step_s: {base: 0.01, per_prefill_token: 1e-4, per_decode_token: 1e-5, per_context_token: 1e-8}
usd_per_hour: 2
"""


@pytest.fixture
def inputs(tmp_path: Path) -> list[str]:
    """Thirty requests of three prefixes on two replicas, as arguments."""
    trace, profile = tmp_path / "short.jsonl", tmp_path / "small.yaml"
    trace.write_text(
        "".join(
            json.dumps(
                {
                    "timestamp": 300 * n,
                    "input_length": 2100,
                    "output_length": 1 + n % 4,
                    "hash_ids": [10 * (n % 3), 10 * (n % 3) + 1, 10 * (n % 3) + 2, 100 + n, 200 + n],
                }
            )
            + "\n"
            for n in range(30)
        )
    )
    profile.write_text(PROFILE)
    return ["simulate", "--trace", str(trace), "--replicas", "2", "--hardware", str(profile)]


def test_the_table_has_a_row_for_each_policy_and_the_best_marked(
    inputs: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([*inputs, "--policy", "prefix_aware,round_robin,sglang_cache_aware"]) == 0
    captured = capsys.readouterr()
    rows = {row.split()[0]: row for row in captured.out.splitlines() if row}
    assert {"prefix_aware", "round_robin", "sglang_cache_aware", "(pooled", "(endless"} <= rows.keys()
    hit_rates = {name: float(re.findall(r"([\d.]+)%", rows[name])[0]) for name in ("prefix_aware", "round_robin")}
    assert 0 < hit_rates["round_robin"] < hit_rates["prefix_aware"]
    assert "*" not in rows["round_robin"].split("%")[1][:1]
    assert [line.split(":")[0] for line in captured.err.splitlines()] == [
        "prefix_aware", "round_robin", "sglang_cache_aware",
    ]  # fmt: skip


def test_json_tells_every_policy_and_the_objective(inputs: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*inputs, "--json", "--policy", "all", "--ttft-ms", "250", "--speed", "2"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert set(data["policies"]) > {
        "prefix_aware",
        "round_robin",
        "ray_prefix",
        "sglang_cache_aware",
        "dynamo",
        "lmetric",
    }
    assert data["objective"] == {"ttft_s": 0.25, "tpot_s": None}
    assert data["trace"]["span_s"] == pytest.approx(29 * 0.15)
    assert all(0 <= report["hit_rate"] <= data["reference"]["unbounded_hit_rate"] + 1e-9
               for report in data["policies"].values())  # fmt: skip


def test_admission_refuses_what_would_miss_the_objective(
    inputs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Thirty prompts of 0.2 s each come to two replicas at once: of each replica's fifteen, five or so are in time."""
    burst = tmp_path / "burst.csv"
    burst.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n" + "2026-01-01 00:00:00,2000,1\n" * 30)

    def report(*options: str) -> dict[str, float]:
        arguments = [
            *inputs,
            "--trace",
            str(burst),
            "--json",
            "--policy",
            "prefix_aware",
            "--ttft-ms",
            "1100",
            *options,
        ]
        assert cli.main(arguments) == 0
        policies: dict[str, dict[str, float]] = json.loads(capsys.readouterr().out)["policies"]
        return policies["prefix_aware"]

    without, refusing = report(), report("--admission")
    assert without["rejected"] == 0 < refusing["rejected"] < 30
    assert refusing["ttft_p99_s"] < without["ttft_p99_s"]


def test_a_profile_may_have_smaller_blocks_than_the_trace(
    inputs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "small.yaml").write_text(PROFILE + "block_tokens: 16\n")
    assert cli.main([*inputs, "--json", "--policy", "prefix_aware"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert 0 < data["policies"]["prefix_aware"]["hit_rate"] <= data["reference"]["unbounded_hit_rate"]
    (tmp_path / "small.yaml").write_text(PROFILE + "block_tokens: 24\n")
    assert cli.main([*inputs, "--json"]) == 2
    assert "in blocks of 512 tokens" in capsys.readouterr().err


def test_the_help_names_every_policy_and_profile(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["simulate", "--help"])
    words = set(re.findall(r"[\w-]+", capsys.readouterr().out))
    assert {*SIMULATED_POLICIES, *built_in_profiles()} <= words


def test_a_seed_makes_a_run_repeat_itself(inputs: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    def ttfts(seed: str) -> dict[str, float]:
        assert cli.main([*inputs, "--json", "--policy", "random,power_of_two,ray_prefix,dynamo", "--seed", seed]) == 0
        policies = json.loads(capsys.readouterr().out)["policies"]
        return {name: report["ttft_mean_s"] for name, report in policies.items()}

    assert ttfts("1") == ttfts("1") != ttfts("2")


def test_replicas_follow_the_load_as_the_policy_says(
    tmp_path: Path, inputs: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """A load of two replicas for ten minutes, then one request every minute for twenty."""
    times = [500 * n for n in range(1200)] + [600_000 + 60_000 * n for n in range(20)]
    trace = tmp_path / "falling.jsonl"
    line = '{{"timestamp": {}, "input_length": 5120, "output_length": 1, "hash_ids": {}}}\n'
    trace.write_text("".join(line.format(at, list(range(10 * n, 10 * n + 10))) for n, at in enumerate(times)))
    at = inputs.index("--trace") + 1
    command = [*inputs[:at], str(trace), *inputs[at + 1 :], "--policy", "prefix_aware", "--json", "--ttft-ms", "4000"]

    def report(*options: str) -> dict[str, float]:
        assert cli.main([*command, *options]) == 0
        found: dict[str, float] = json.loads(capsys.readouterr().out)["policies"]["prefix_aware"]
        return found

    fixed, scaled = report("--replicas", "4"), report("--replicas", "4", "--autoscaling", "latency")
    assert scaled["goodput_share"] > 0.99
    assert scaled["replica_hours"] < 0.7 * fixed["replica_hours"]
    bound = report("--replicas", "4", "--autoscaling", "latency", "--min-replicas", "4")
    assert bound["replica_hours"] == pytest.approx(fixed["replica_hours"])
    few = report("--replicas", "1", "--autoscaling", "latency", "--max-replicas", "1")
    assert few["replica_hours"] == report("--replicas", "1")["replica_hours"]
    by_number = report("--replicas", "4", "--autoscaling", "ongoing_requests")
    assert scaled["replica_hours"] < by_number["replica_hours"] < fixed["replica_hours"]


@pytest.mark.parametrize("suffix", ["svg", "png"])
def test_a_picture_is_written_as_its_name_says(
    inputs: list[str], tmp_path: Path, suffix: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / f"plot.{suffix}"
    assert cli.main([*inputs, "--policy", "prefix_aware,round_robin", "--plot", str(path)]) == 0
    assert path.read_bytes().startswith(b"\x89PNG" if suffix == "png" else b"<?xml")


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--policy", "prefix_awar"], "there is no policy 'prefix_awar': use some of prefix_aware"),
        (["--policy", "nowhere:Policy"], "nowhere"),
        (["--policy", ","], "no policy is named"),
        (["--replicas", "0"], "at least 1 replica"),
        (["--ttft-ms", "0"], "--ttft-ms must be more than 0"),
        (["--admission"], "add --ttft-ms"),
        (["--autoscaling", "latency"], "--autoscaling latency needs an objective: add --ttft-ms"),
        (["--min-replicas", "1"], "--min-replicas needs a policy that stays within it: add --autoscaling"),
        (["--autoscaling", "ongoing_requests", "--min-replicas", "-1"], "--min-replicas must be 0 or more"),
        (["--autoscaling", "ongoing_requests", "--max-replicas", "0"], "--max-replicas must be at least 1"),
        (["--autoscaling", "ongoing_requests", "--max-replicas", "1"], "2 replicas to begin with"),
        (["--tpot-ms", "nan"], "--tpot-ms must be more than 0"),
        (["--plot", "out.pdf"], "ends in .svg or .png"),
        (["--plot", "/nowhere/at/all/out.svg"], "there is no folder"),
        (["--speed", "0"], "above 0"),
        (["--hardware", "h300"], "no hardware profile"),
        (["--trace", "none.jsonl"], "there is no trace"),
    ],
)
def test_bad_input_is_one_line_before_anything_runs(
    inputs: list[str], arguments: list[str], problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([*inputs, *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert line.startswith("shoal: error: ")
    assert problem in line
