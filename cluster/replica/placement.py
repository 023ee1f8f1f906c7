"""Where a replica's ranks go: placement group bundles as a pure function of the shape.

A bundle holds one stage. Ray puts a bundle on one node, so the tensor ranks of a stage, which talk several times a
layer, never part; the strategy is about the stages. The coordinator rides in bundle 0, with the first stage.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

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


Room: TypeAlias = Mapping[str, tuple[Mapping[str, float], Mapping[str, str]]]  # by node: what is free there, its labels


def take(placement: Placement, room: Room) -> Room | None:
    """What is free once a replica has taken its place; None if none is certain.

    First fit, and only labels that must be equal count as met. Ray may find a place where this does not.
    """
    left = dict(room)
    taken: set[str] = set()
    for bundle, labels in zip(placement.bundles, placement.label_selectors, strict=True):
        is_alone = placement.strategy == "STRICT_SPREAD"
        node = next((n for n in left if not (is_alone and n in taken) and _fits(bundle, labels, *left[n])), None)
        if node is None:
            return None
        taken.add(node)
        free, own_labels = left[node]
        left[node] = {name: free.get(name, 0.0) - bundle.get(name, 0.0) for name in free}, own_labels
    return left


def _fits(
    bundle: Mapping[str, float], labels: Mapping[str, str], free: Mapping[str, float], own_labels: Mapping[str, str]
) -> bool:
    has_room = all(free.get(name, 0.0) >= amount for name, amount in bundle.items())
    return has_room and all(own_labels.get(key) == value for key, value in labels.items())
