"""Where the ranks of a replica go."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ray.util.placement_group import validate_placement_group

from shoal.cluster.replica.placement import STRATEGIES, Resources, Room, StageSpread, place, take

CPU_RANK = Resources(num_cpus=4.0, num_gpus=0.0)
GPU_RANK = Resources(num_cpus=1.0, num_gpus=1.0)
NOTHING = Resources(0.0, 0.0)
ONE_CPU = Resources(1.0, 0.0)

amounts = st.sampled_from([0.0, 0.5, 1.0, 3.0])
resources = st.builds(Resources, amounts, amounts)
labels = st.dictionaries(st.sampled_from(["zone", "gpu"]), st.sampled_from(["a", "b"]))


def test_tensor_ranks_share_a_bundle_and_the_coordinator_rides_in_the_first() -> None:
    placement = place(2, 3, GPU_RANK, ONE_CPU, stages="pack", labels={})
    assert placement.bundles == ({"CPU": 3, "GPU": 2}, {"CPU": 2, "GPU": 2}, {"CPU": 2, "GPU": 2})
    assert placement.strategy == "PACK"


def test_a_coordinator_without_a_core_of_its_own_costs_nothing() -> None:
    placement = place(1, 2, CPU_RANK, NOTHING, stages="strict_spread", labels={})
    assert placement.bundles == ({"CPU": 4}, {"CPU": 4})
    assert placement.strategy == "STRICT_SPREAD"


def test_labels_are_of_all_stages_or_of_each() -> None:
    a, b = {"zone": "a"}, {"zone": "b"}
    assert place(1, 2, CPU_RANK, NOTHING, stages="pack", labels=a).label_selectors == (a, a)
    assert place(1, 2, CPU_RANK, NOTHING, stages="pack", labels=(a, b)).label_selectors == (a, b)


@given(st.integers(1, 8), st.integers(1, 6), resources, resources, st.sampled_from([*STRATEGIES]), labels | st.just({}))
def test_every_shape_is_a_placement_group_that_holds_all_of_it(
    tensor_parallel: int, pipeline_parallel: int, rank: Resources, coordinator: Resources, stages: str, labels: dict
) -> None:
    placement = place(tensor_parallel, pipeline_parallel, rank, coordinator, stages=stages, labels=labels)
    validate_placement_group(
        bundles=[dict(bundle) for bundle in placement.bundles],
        strategy=placement.strategy,
        bundle_label_selector=[dict(selector) for selector in placement.label_selectors],
    )
    assert len(placement.bundles) == len(placement.label_selectors) == pipeline_parallel
    for stage, bundle in enumerate(placement.bundles):
        assert bundle.get("GPU", 0) == tensor_parallel * rank.num_gpus + (coordinator.num_gpus if stage == 0 else 0)
        assert bundle.get("CPU", 0) >= tensor_parallel * rank.num_cpus + (coordinator.num_cpus if stage == 0 else 0)


def room(*free: tuple[float, float], labels: dict[str, str] | None = None) -> Room:
    return {f"n{i}": ({"CPU": cpus, "GPU": gpus}, labels or {}) for i, (cpus, gpus) in enumerate(free)}


@pytest.mark.parametrize(
    ("stages", "free", "left"),
    [
        ("pack", [(8, 4)], [(4, 0)]),
        ("strict_spread", [(8, 4)], None),  # a node for each stage
        ("strict_spread", [(8, 2), (8, 2)], [(6, 0), (6, 0)]),
        ("pack", [(8, 1), (8, 1), (8, 1)], None),  # enough of all, but nowhere a whole stage
    ],
)
def test_a_replica_takes_room_or_there_is_none(
    stages: StageSpread, free: list[tuple[float, float]], left: list[tuple[float, float]] | None
) -> None:
    placement = place(2, 2, Resources(1, 1), Resources(0, 0), stages=stages, labels={})
    assert take(placement, room(*free)) == (room(*left) if left is not None else None)


def test_room_with_other_labels_is_none() -> None:
    placement = place(1, 1, Resources(1, 0), Resources(0, 0), stages="pack", labels={"zone": "a"})
    assert take(placement, room((1, 0), labels={"zone": "b"})) is None
    assert take(placement, room((1, 0), labels={"zone": "a"})) is not None
