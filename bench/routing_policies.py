"""Routing policies on recorded traces, in the simulator: Shoal's own and its peers', each with its published defaults.

    python bench/routing_policies.py [--data ../shared/data] [--results bench/results]

`--data` is the folder that holds traces/mooncake_conversation.jsonl (github.com/kvcache-ai/Mooncake, FAST'25 release)
and traces/azure_2023_conv.csv (github.com/Azure/AzurePublicDataset). Writes routing_policies.json and, beside the
documents, a picture. Some minutes.
"""

from __future__ import annotations

import argparse
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from machine import RESULTS, facts, write_result

from shoal.cluster.simulation.peers import SIMULATED_POLICIES
from shoal.cluster.simulation.plots import save_plots
from shoal.cluster.simulation.profile import HardwareProfile, load_profile, parse_profile
from shoal.cluster.simulation.report import Comparison
from shoal.cluster.simulation.result import Objectives, SimulationResult
from shoal.cluster.simulation.simulator import simulate
from shoal.cluster.simulation.trace import load_trace

DOCS = Path(__file__).parents[1] / "docs"
PREFILL_ONLY = parse_profile(
    {
        "name": "8,000 prompt tokens a second, decoding in no time",
        "kv_tokens": 762_880,
        "step_s": {"base": 0, "per_prefill_token": 1 / 8000, "per_decode_token": 0, "per_context_token": 0},
    }
)
H100 = load_profile("h100-8b")
# Left out: production_stack's longest match alone sends nearly all requests to one replica, where thousands wait.
POLICIES = tuple(name for name in SIMULATED_POLICIES if name != "production_stack")
PICTURES = {"mooncake, 16 x h100-8b": "routing_policies.svg"}
# name -> (trace, times as fast as recorded, replicas, hardware, objectives)
CASES: dict[str, tuple[str, float, int, HardwareProfile, Objectives]] = {
    "mooncake, prefill only": ("mooncake_conversation.jsonl", 2.0, 16, PREFILL_ONLY, Objectives(ttft_s=4.0)),
    "mooncake, 16 x h100-8b": ("mooncake_conversation.jsonl", 2.0, 16, H100, Objectives(ttft_s=2.0, tpot_s=0.05)),
    "mooncake, 8 x h100-8b": ("mooncake_conversation.jsonl", 2.0, 8, H100, Objectives(ttft_s=2.0, tpot_s=0.05)),
    "azure (nothing shared), 8 x h100-8b": ("azure_2023_conv.csv", 20.0, 8, H100, Objectives(ttft_s=2.0, tpot_s=0.05)),
}


def play(case: str, policy: str, data: Path) -> SimulationResult:
    trace, speed, num_replicas, profile, objectives = CASES[case]
    loaded = load_trace(data / "traces" / trace, speed=speed)
    return simulate(loaded, profile, SIMULATED_POLICIES[policy](), num_replicas, objectives=objectives)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="default: %(default)s")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for the result (default: %(default)s)")
    given = parser.parse_args()
    found = {}
    with ProcessPoolExecutor() as pool:
        runs = {
            case: {name: pool.submit(play, case, name, given.data) for name in SIMULATED_POLICIES} for case in CASES
        }
        for case, (trace, speed, num_replicas, profile, objectives) in CASES.items():
            results = {name: run.result() for name, run in runs[case].items()}
            loaded = load_trace(given.data / "traces" / trace, speed=speed)
            comparison = Comparison(loaded, num_replicas, profile, objectives, results)
            found[case] = comparison.as_json()
            print(case, flush=True)
            for name, report in comparison.reports.items():
                times = f"TTFT {report.ttft_mean_s:.3f} s, p99 {report.ttft_p99_s:.2f} s"
                print(f"  {name:20} hits {report.hit_rate:6.1%}  {times}  goodput {report.goodput:.3f}/s", flush=True)
            if case in PICTURES:
                save_plots(comparison, DOCS / PICTURES[case])
    write_result(given.results, "routing_policies", {"machine": facts(1), "cases": found})


if __name__ == "__main__":
    main()
