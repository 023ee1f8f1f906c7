"""Where a replica's ranks go: placement group bundles as a pure function of the shape.

A bundle holds one stage. Ray puts a bundle on one node, so the tensor ranks of a stage, which talk several times a
layer, never part; the strategy is about the stages. The coordinator rides in bundle 0, with the first stage.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

StageSpread = Literal["pack", "spread", "strict_spread"]
Strategy = Literal["PACK", "SPREAD", "STRICT_SPREAD"]

STRATEGIES: Mapping[StageSpread, Strategy] = {
    "pack": "PACK",
    "spread": "SPREAD",
    "strict_spread": "STRICT_SPREAD",
}
# Ray refuses an empty bundle.
_SOMETHING: Mapping[str, float] = {"CPU": 0.01}


@dataclass(frozen=True, slots=True)
class Resources:
    """What Ray sets aside; logical CPUs and GPUs."""

    num_cpus: float
    num_gpus: float

    def bundle(self, count: int = 1) -> dict[str, float]:
        """As Ray names them, for `count` of this."""
        amounts = {"CPU": count * self.num_cpus, "GPU": count * self.num_gpus}
        return {name: amount for name, amount in amounts.items() if amount}


@dataclass(frozen=True, slots=True)
class Placement:
    """The placement group of one replica; bundle i and label selector i are stage i's."""

    bundles: tuple[Mapping[str, float], ...]
    strategy: Strategy
    label_selectors: tuple[Mapping[str, str], ...]


def place(
    tensor_parallel: int,
    pipeline_parallel: int,
    rank: Resources,
    coordinator: Resources,
    *,
    stages: StageSpread,
    labels: Mapping[str, str] | Sequence[Mapping[str, str]],
) -> Placement:
    """Bundles for `pipeline_parallel` stages of `tensor_parallel` ranks, each with the resources of `rank`.

    `labels` is a Ray label selector for every stage, or one for each.
    """
    bundles = [rank.bundle(tensor_parallel) or dict(_SOMETHING) for _ in range(pipeline_parallel)]
    for name, amount in coordinator.bundle().items():
        bundles[0][name] = bundles[0].get(name, 0.0) + amount
    selectors = [labels] * pipeline_parallel if isinstance(labels, Mapping) else labels
    assert len(selectors) == pipeline_parallel, (labels, pipeline_parallel)
    return Placement(tuple(bundles), STRATEGIES[stages], tuple(selectors))
