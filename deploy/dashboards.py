"""Write Grafana dashboards and Prometheus rules from the metrics that Shoal has.

python deploy/dashboards.py                               # what is in this repository, anew
python deploy/dashboards.py --check                       # say whether it is up to date
python deploy/dashboards.py --ttft-s 1 --out /etc/shoal   # for other objectives
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path

from monitoring.alerts import alerts, recordings
from monitoring.engines import ENGINES
from monitoring.gateways import GATEWAYS
from monitoring.objectives import Objectives
from monitoring.overview import OVERVIEW
from monitoring.query import QueryError
from monitoring.rules import alerting_rules, recording_rules

from shoal.cluster.metrics import ITL, TTFT

ROOT = Path(__file__).resolve().parents[1]
RUNBOOK = "deploy/prometheus/RUNBOOK.md"
DASHBOARDS = (OVERVIEW, ENGINES, GATEWAYS)


def contents(objectives: Objectives, runbook: str = RUNBOOK) -> dict[str, str]:
    """Every file by its path in the repository. The chart's folder has copies: Helm reads nothing outside of it."""
    dashboards = {
        f"{dashboard.uid}.json": json.dumps(dashboard.json(objectives), indent=2) + "\n" for dashboard in DASHBOARDS
    }
    rules = {
        "rules.yaml": recording_rules(recordings(objectives)),
        "alerts.yaml": alerting_rules(alerts(objectives), runbook),
    }
    return {
        **_below("deploy/grafana/dashboards", dashboards),
        **_below("deploy/prometheus", rules),
        **_below("helm/shoal/dashboards", dashboards),
        **_below("helm/shoal/rules", rules),
    }


def outdated(root: Path, files: Mapping[str, str]) -> list[str]:
    """Those that are missing or have another content."""
    return [name for name, text in files.items() if not (root / name).is_file() or (root / name).read_text() != text]


def write(root: Path, files: Mapping[str, str]) -> None:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    try:
        files = contents(Objectives(options.ttft_s, options.itl_s, options.share), options.runbook)
    except QueryError as error:
        print(f"dashboards.py: {error}", file=sys.stderr)
        return 2
    if not options.check:
        write(options.out, files)
        return 0
    wrong = outdated(options.out, files)
    for name in wrong:
        print(f"{name} is not what deploy/dashboards.py writes: run it", file=sys.stderr)
    return 1 if wrong else 0


def _parser() -> argparse.ArgumentParser:
    default = Objectives()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 where a file is out of date")
    parser.add_argument("--out", type=Path, default=ROOT, help="folder to write below, by default this repository")
    for name, of, metric, bound_s in (
        ("--ttft-s", "the first token", TTFT, default.ttft_s),
        ("--itl-s", "a token after the one before", ITL, default.itl_s),
    ):
        bounds = " ".join(f"{bound:g}" for bound in metric.buckets)
        parser.add_argument(name, type=float, default=bound_s, choices=metric.buckets, metavar="SECONDS",
                            help=f"objective of {of}, one of {bounds} (default %(default)g)")  # fmt: skip
    parser.add_argument("--share", type=_share, default=default.share,
                        help="of them that are to be within it (default %(default)g)")  # fmt: skip
    parser.add_argument("--runbook", default=RUNBOOK, help="address of the runbook, for alerts (default %(default)s)")
    return parser


def _share(text: str) -> float:
    share = float(text)
    if not 0 < share < 1:
        raise argparse.ArgumentTypeError(f"{text} is no share between 0 and 1")
    return share


def _below(folder: str, files: Mapping[str, str]) -> dict[str, str]:
    return {f"{folder}/{name}": text for name, text in files.items()}


if __name__ == "__main__":
    sys.exit(main())
