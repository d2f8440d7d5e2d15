"""The partitioner finds what exhaustive search finds, and says why when nothing fits."""

from __future__ import annotations

from itertools import combinations, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.errors import InvalidInput, PlanImpossible
from core.pipeline.costs import DecoderShape, ModelCosts, estimate_costs
from core.pipeline.partitioner import Node, parse_split, partition, plan_split

SMOLLM2 = DecoderShape(
    num_layers=30,
    hidden_size=576,
    intermediate_size=1536,
    query_size=576,
    kv_size=192,
    vocab_size=49152,
    bytes_per_weight=2,
)


def even_costs(num_layers: int, **fields: float) -> ModelCosts:
    return ModelCosts(
        layer_s=(1.0,) * num_layers,
        layer_bytes=(100,) * num_layers,
        kv_block_bytes=(10,) * num_layers,
        **fields,  # type: ignore[arg-type]
    )


@given(
    layer_s=st.lists(st.floats(0.1, 10), min_size=1, max_size=9),
    num_stages=st.integers(1, 4),
    head_s=st.floats(0, 10),
    speeds=st.lists(st.floats(0.5, 2), min_size=4, max_size=4),
    memory=st.lists(st.integers(100, 900), min_size=4, max_size=4),
)
def test_no_cut_has_a_faster_slowest_stage(
    layer_s: list[float], num_stages: int, head_s: float, speeds: list[float], memory: list[int]
) -> None:
    num_layers = len(layer_s)
    costs = ModelCosts(
        layer_s=tuple(layer_s),
        layer_bytes=(100,) * num_layers,
        kv_block_bytes=(1,) * num_layers,
        head_s=head_s,
    )
    nodes = [
        Node(speed=speed, memory_bytes=size)
        for speed, size in zip(speeds[:num_stages], memory[:num_stages], strict=True)
    ]
    possible = []
    for cut in combinations(range(1, num_layers), num_stages - 1):
        edges = [0, *cut, num_layers]
        text = ",".join(f"{a}:{b}" for a, b in pairwise(edges))
        slices = parse_split(text, num_layers=num_layers)
        try:
            possible.append(plan_split(costs, slices, nodes=nodes).bottleneck_s)
        except PlanImpossible:
            continue
    if not possible:
        with pytest.raises(PlanImpossible):
            partition(costs, num_stages=num_stages, nodes=nodes)
    else:
        plan = partition(costs, num_stages=num_stages, nodes=nodes)
        assert plan.bottleneck_s == pytest.approx(min(possible))


def test_two_stages_of_smollm2_have_18_and_12_layers_because_of_the_head() -> None:
    plan = partition(estimate_costs(SMOLLM2), num_stages=2)
    assert plan.split == "0:18,18:30"
    assert min(stage.time_share for stage in plan.stages) > 0.95


def test_stages_beside_the_slowest_are_even() -> None:
    costs = ModelCosts(layer_s=(9.0, *(1.0,) * 8), layer_bytes=(1,) * 9, kv_block_bytes=(1,) * 9)
    assert partition(costs, num_stages=3).split == "0:1,1:5,5:9"


def test_bytes_of_embedding_head_and_kv_are_counted() -> None:
    costs = even_costs(4, embedding_bytes=50, head_bytes=70)
    plan = partition(costs, num_stages=2, min_kv_blocks=3)
    assert [stage.weights_bytes for stage in plan.stages] == [250, 270]
    assert [stage.kv_bytes for stage in plan.stages] == [60, 60]


def test_a_small_node_gets_fewer_layers() -> None:
    nodes = [Node(memory_bytes=150), Node()]
    assert partition(even_costs(6), num_stages=2, nodes=nodes).split == "0:1,1:6"


def test_a_fast_node_gets_more_layers() -> None:
    plan = partition(even_costs(9), num_stages=2, nodes=[Node(speed=2), Node()])
    assert plan.split == "0:6,6:9"


def test_more_stages_than_layers_are_refused_with_the_numbers() -> None:
    with pytest.raises(PlanImpossible, match="5 stages for 4 layers"):
        partition(even_costs(4), num_stages=5)


def test_too_little_memory_is_refused_with_the_numbers() -> None:
    mib = 1024 * 1024
    costs = ModelCosts(layer_s=(1.0,) * 4, layer_bytes=(10 * mib,) * 4, kv_block_bytes=(mib,) * 4)
    nodes = [Node(memory_bytes=15 * mib)] * 2
    with pytest.raises(PlanImpossible, match=r"48\.0 MiB in all, the nodes have 30\.0 MiB"):
        partition(costs, num_stages=2, nodes=nodes, min_kv_blocks=2)


def test_a_stage_that_does_not_pay_for_its_hop_is_refused() -> None:
    partition(even_costs(8), num_stages=2, hop_s=3.9)
    with pytest.raises(PlanImpossible, match="stage 1 is useless"):
        partition(even_costs(8), num_stages=2, hop_s=4.0)


def test_a_stage_that_memory_demands_is_not_useless() -> None:
    nodes = [Node(memory_bytes=500), Node(memory_bytes=500)]
    plan = partition(even_costs(8), num_stages=2, nodes=nodes, hop_s=100.0)
    assert plan.split == "0:4,4:8"


def test_a_manual_split_that_does_not_fit_is_refused() -> None:
    slices = parse_split("0:1,1:4", num_layers=4)
    nodes = [Node(memory_bytes=250), Node(memory_bytes=250)]
    with pytest.raises(PlanImpossible, match=r"stage 1 \(layers 1:4\)"):
        plan_split(even_costs(4), slices, nodes=nodes)


def test_a_manual_split_is_read() -> None:
    slices = parse_split("0:14, 14:30", num_layers=30)
    assert [(part.first_layer, part.end_layer) for part in slices] == [(0, 14), (14, 30)]
    assert slices[0].is_first
    assert slices[1].is_last


@pytest.mark.parametrize(
    "text",
    ["", "0:14", "0:14,15:30", "1:30", "0:14,14:31", "0:0,0:30", "0:x", "0:30,", "14:30,0:14"],
)
def test_splits_that_do_not_cover_the_layers_are_refused(text: str) -> None:
    with pytest.raises(InvalidInput):
        parse_split(text, num_layers=30)


def test_one_stage_holds_everything() -> None:
    plan = partition(even_costs(3), num_stages=1)
    assert plan.split == "0:3"
    assert plan.stages[0].time_share == 1.0


@pytest.mark.parametrize("num_stages", [0, -1])
def test_a_number_of_stages_below_one_is_invalid(num_stages: int) -> None:
    with pytest.raises(InvalidInput):
        partition(even_costs(3), num_stages=num_stages)
