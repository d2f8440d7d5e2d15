"""From what a user asks for to a layout: sizes, memory, layers, ports, command lines."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from gguf.constants import GGMLQuantizationType

from core.errors import InvalidInput, NotFound, PlanImpossible
from core.models.llama.config import LlamaConfig
from services.coordinator.roster import parse_roster
from services.local.layout import MeshLayout, ReplicaLayout
from services.local.memory import (
    SERVICE_BYTES,
    STAGE_BYTES,
    MemoryNeeds,
    choose_kv_blocks,
    packing_bytes,
)
from services.local.number_format import automatic_formats
from services.local.partition import model_costs, plan_stages, stage_block_bytes
from services.local.ports import HeldPorts
from services.local.prepare import prepare, read_model
from services.local.recut import plan_recut
from services.local.room import check_room
from services.local.settings import MeshSettings, parse_bytes, parse_counts, parse_factors
from tests.support.models import TinyModel, write_gguf, write_servable

GIB = 2**30

SMOLLM2 = LlamaConfig(
    family="llama",
    num_layers=30,
    hidden_size=576,
    intermediate_size=1536,
    num_heads=9,
    num_kv_heads=3,
    head_dim=64,
    vocab_size=49152,
    context_length=8192,
    norm_eps=1e-5,
    rope_theta=100000.0,
    tied_head=True,
)


def needs(**changes: int) -> MemoryNeeds:
    fields = {
        "available_bytes": 8 * GIB,
        "weights_bytes": GIB,
        "kv_block_bytes": 2**20,
        "packing_bytes": 2**28,
        "num_replicas": 2,
        "num_services": 2,
        "most_blocks": 10**9,
    }
    return MemoryNeeds(**(fields | changes))


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1000", 1000),
        ("2GiB", 2 * GIB),
        ("2 gib", 2 * GIB),
        ("512M", 512_000_000),
        ("1.5KiB", 1536),
        ("1TB", 10**12),
    ],
)
def test_sizes_are_read_in_decimal_and_binary_units(text: str, size: int) -> None:
    assert parse_bytes("kv_memory", text) == size


@pytest.mark.parametrize("text", ["", "much", "-1", "1XB", "1GiB2", "nan", "1e9"])
def test_what_is_no_size_is_refused_by_name(text: str) -> None:
    with pytest.raises(InvalidInput, match="kv_memory"):
        parse_bytes("kv_memory", text)


def test_the_cache_gets_a_quarter_of_what_is_free_after_the_weights() -> None:
    free = 7 * GIB - 2**28 - 2 * STAGE_BYTES - 2 * SERVICE_BYTES
    assert choose_kv_blocks(needs(), kv_memory_bytes=None) == free // 4 // 2**20


@pytest.mark.parametrize("num_stages", [1, 2, 5])
def test_packing_takes_a_layer_a_stage(num_stages: int) -> None:
    costs = model_costs(SMOLLM2, number_format="fp32")
    layer = 4 * (2 * 576 * (576 + 192) + 3 * 576 * 1536)
    assert packing_bytes(costs, num_replicas=num_stages) == num_stages * layer


def test_the_cache_is_no_bigger_than_all_sequences_can_fill() -> None:
    assert choose_kv_blocks(needs(most_blocks=7), kv_memory_bytes=None) == 7
    assert choose_kv_blocks(needs(most_blocks=7), kv_memory_bytes=GIB) == 7


def test_the_cache_is_as_big_as_asked_for() -> None:
    assert choose_kv_blocks(needs(), kv_memory_bytes=GIB) == 1024


@pytest.mark.parametrize(
    ("changes", "kv_memory_bytes"),
    [({"weights_bytes": 8 * GIB}, None), ({}, 8 * GIB), ({"available_bytes": GIB}, None)],
)
def test_what_does_not_fit_is_refused_with_the_numbers(
    changes: dict[str, int], kv_memory_bytes: int | None
) -> None:
    with pytest.raises(PlanImpossible, match=r"weights .* GiB.* need .* GiB, and .* available"):
        choose_kv_blocks(needs(**changes), kv_memory_bytes=kv_memory_bytes)


def test_a_cache_of_less_than_a_block_is_refused() -> None:
    with pytest.raises(InvalidInput, match="one block of 16 tokens"):
        choose_kv_blocks(needs(), kv_memory_bytes=1000)


def test_the_last_stage_has_fewer_layers_because_it_has_the_head() -> None:
    plan = plan_stages(SMOLLM2, number_format="bf16", num_stages=2)
    assert plan.split == "0:18,18:30"


def test_a_split_overrides_the_balance() -> None:
    plan = plan_stages(SMOLLM2, number_format="bf16", num_stages=2, split="0:10,10:30")
    assert plan.split == "0:10,10:30"


def test_weights_are_counted_in_the_number_format() -> None:
    def weights(number_format: str) -> int:
        plan = plan_stages(SMOLLM2, number_format=number_format, num_stages=1)
        return plan.stages[0].weights_bytes

    assert weights("fp32") == 2 * weights("bf16")
    # The embedding stays as it is, and 64 weights share a scale.
    embedding = 2 * 49152 * 576
    int8 = (weights("bf16") - embedding) / 2 * (1 + 4 / 64) + embedding
    assert weights("int8") == pytest.approx(int8)
    head = (1 + 4 / 64) * 49152 * 576
    int4 = (int8 - embedding - head) / (1 + 4 / 64) * (1 / 2 + 4 / 32) + embedding + head
    assert weights("int4") == pytest.approx(int4)
    # 134.5 M parameters; the head is a second copy of the embedding it is tied to.
    assert weights("bf16") == pytest.approx(2 * (134.5e6 + 49152 * 576), rel=0.01)


def test_nodes_that_are_too_small_are_refused_with_the_numbers() -> None:
    with pytest.raises(PlanImpossible, match="do not fit"):
        plan_stages(SMOLLM2, number_format="bf16", num_stages=2, memory_bytes=(10**8, 10**8))


Lay = Callable[..., MeshLayout]


@pytest.fixture
def ports() -> Iterator[HeldPorts]:
    with HeldPorts() as held:
        yield held


@pytest.fixture
def lay(tmp_path: Path, ports: HeldPorts) -> Lay:
    """Prepares meshes of a tiny model of four layers."""
    folder = write_servable(tmp_path / "tiny")

    def prepare_tiny(**changes: object) -> MeshLayout:
        fields: dict[str, object] = {"model": str(folder), "grpc_port": 0, "metrics_port": 0}
        return prepare(MeshSettings(**(fields | changes)), ports=ports)

    return prepare_tiny


def test_a_layout_survives_the_way_to_the_background_process(lay: Lay) -> None:
    layout = lay()
    assert MeshLayout.from_json(layout.to_json()) == layout


def test_every_part_listens_somewhere_else(lay: Lay) -> None:
    layout = lay(stages=3)
    commands = layout.commands()
    addresses = {command.address for command in commands}
    metrics = {command.metrics_port for command in commands}
    assert [command.name for command in commands] == [
        *("stage-0", "stage-1", "stage-2", "coordinator", "gateway")
    ]
    assert len(addresses) == len(metrics) == 5
    assert all(address.startswith("127.0.0.1:") for address in addresses)


def test_metrics_ports_count_upwards_from_the_gateway(lay: Lay) -> None:
    with HeldPorts() as held:
        base = held.take()
    layout = lay(metrics_port=base)
    ports = {command.name: command.metrics_port for command in layout.commands()}
    assert ports == {
        "gateway": base,
        "coordinator": base + 1,
        "stage-0": base + 2,
        "stage-1": base + 3,
    }


def test_a_stage_is_told_its_layers_and_its_share_of_the_cache(lay: Lay) -> None:
    layout = lay(split="0:1,1:4", kv_memory_bytes=2**20)
    command = layout.commands()[1]
    options = dict(zip(command.arguments[::2], command.arguments[1::2], strict=True))
    assert options["--layers"] == "1:4"
    assert options["--kv-blocks"] == str(layout.kv_blocks)
    assert options["--name"] == "tiny"


def test_replicas_and_spares_are_processes_of_their_own(lay: Lay) -> None:
    layout = lay(stages=3, replicas=(1, 2, 1), spares=(1, 0, 0))
    commands = layout.commands()
    assert [command.name for command in commands] == [
        *("stage-0", "stage-0-b", "stage-1", "stage-1-b", "stage-2", "coordinator", "gateway")
    ]
    assert len({command.address for command in commands}) == 7
    addresses = [command.address for command in commands]
    stages = "{}|{},{}|{},{}".format(*addresses[:5])
    assert layout.roster == parse_roster(stages, spares=addresses[1])


def test_coordinators_that_stand_by_are_known_to_the_gateway(lay: Lay) -> None:
    layout = lay(coordinators=3)
    *_, first, second, third, gateway = layout.commands()
    names = [command.name for command in (first, second, third)]
    assert names == ["coordinator", "coordinator-b", "coordinator-c"]
    options = dict(zip(gateway.arguments[::2], gateway.arguments[1::2], strict=False))
    assert options["--coordinator"] == f"{first.address},{second.address},{third.address}"
    assert MeshLayout.from_json(layout.to_json()) == layout


def test_more_replicas_leave_each_a_smaller_cache(lay: Lay) -> None:
    single = lay(kv_memory_bytes=2**20)
    double = lay(kv_memory_bytes=2**20, replicas=(2,))
    assert double.kv_blocks == single.kv_blocks // 2


@pytest.mark.parametrize("number_format", ["bf16", "int8", "int4"])
def test_a_head_that_takes_six_layers_time_leaves_its_stage_twelve_of_thirty(
    number_format: str,
) -> None:
    slices = plan_stages(SMOLLM2, number_format=number_format, num_stages=2).slices
    assert slices[0].end_layer == 18


def test_the_rows_that_a_stage_sent_take_room_beside_its_cache() -> None:
    plan = plan_stages(SMOLLM2, number_format="bf16", num_stages=2)
    costs = model_costs(SMOLLM2, number_format="bf16")
    layer = 16 * 2 * 192 * 2
    for wire, row_bytes in (("f32", 576 * 4), ("bf16", 576 * 2), ("int8", 576 + 576 // 32 * 2)):
        first, last = stage_block_bytes(SMOLLM2, plan.slices, costs, wire=wire)
        assert (first, last) == (18 * layer + 16 * row_bytes, 12 * layer)


def test_all_stages_are_told_the_wire_and_one_that_does_not_fit_is_refused(lay: Lay) -> None:
    stages = lay(wire="int8").commands()[:2]
    told = [one.arguments[one.arguments.index("--wire") + 1] for one in stages]
    assert told == ["int8", "int8"]
    with pytest.raises(InvalidInput, match="beside weights in fp32"):
        lay(wire="bf16", dtype="fp32")
    with pytest.raises(InvalidInput, match="f32 or bf16 or int8"):
        lay(wire="fp8")


def test_a_layout_changes_by_replicas(lay: Lay) -> None:
    layout = lay(replicas=(2,))
    added = ReplicaLayout(number=2, address="127.0.0.1:1", metrics_port=2, model_path="new")
    changed = layout.with_replica(1, added).without_replica(layout.stages[1].replicas[0].address)
    names = [command.name for command in changed.commands()]
    assert names[:4] == ["stage-0", "stage-0-b", "stage-1-b", "stage-1-c"]
    assert "new" in changed.commands()[3].arguments
    with pytest.raises(NotFound, match="no replica listens"):
        layout.without_replica("127.0.0.1:1")
    with pytest.raises(InvalidInput, match="stage_index"):
        layout.with_replica(2, added)


@pytest.mark.parametrize("text", ["", "a", "1,", "-1", "1.5"])
def test_what_is_no_count_is_refused_by_name(text: str) -> None:
    assert parse_counts("replicas", "1, 2") == (1, 2)
    with pytest.raises(InvalidInput, match="replicas"):
        parse_counts("replicas", text)


def test_a_stage_can_be_slowed_down(lay: Lay) -> None:
    commands = lay(slow_down=parse_factors("slow", "1=2.5")).commands()
    slow_downs = [one.arguments[one.arguments.index("--slow-down") + 1] for one in commands[:2]]
    assert slow_downs == ["1.0", "2.5"]


@pytest.mark.parametrize("text", ["", "1", "1=", "=2", "1=-2", "a=1", "1=2,"])
def test_what_is_no_factor_is_refused_by_name(text: str) -> None:
    assert parse_factors("slow", "0=1.5, 1=2") == {0: 1.5, 1: 2.0}
    with pytest.raises(InvalidInput, match="slow"):
        parse_factors("slow", text)


def test_any_taken_metrics_port_is_refused(lay: Lay) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(InvalidInput, match=f"metrics_port is {port}"):
            lay(metrics_port=port - 2)


@pytest.mark.parametrize(
    ("block_type", "number_format"), [("F32", "bf16"), ("BF16", "bf16"), ("Q8_0", "int8")]
)
def test_auto_is_int8_where_the_file_is_quantised(
    block_type: str, number_format: str, tmp_path: Path
) -> None:
    kind = GGMLQuantizationType[block_type]
    path = write_gguf(tmp_path / "tiny.gguf", TinyModel(), block_type=kind)
    assert read_model(path, dtype="auto").number_format == number_format
    assert read_model(path, dtype="fp32").number_format == "fp32"


@pytest.mark.parametrize("block_type", ["Q4_0", "Q4_1"])
def test_auto_takes_4_bits_where_they_are_faster_than_8(block_type: str, tmp_path: Path) -> None:
    kind = GGMLQuantizationType[block_type]
    path = write_gguf(tmp_path / "tiny.gguf", TinyModel(), block_type=kind)
    assert read_model(path, dtype="auto").number_format == automatic_formats()[0]
    assert read_model(path, dtype="int4").number_format == "int4"


def test_int4_is_refused_where_the_file_has_no_weights_of_4_bits(tmp_path: Path) -> None:
    kind = GGMLQuantizationType.Q8_0
    path = write_gguf(tmp_path / "tiny.gguf", TinyModel(), block_type=kind)
    with pytest.raises(InvalidInput, match="no blocks of Q4_0"):
        read_model(path, dtype="int4")


def test_a_part_is_not_used_by_two_meshes(lay: Lay) -> None:
    assert lay().gateway_address != lay().gateway_address


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"stages": 0}, "stages"),
        ({"dtype": "int3"}, "dtype"),
        ({"replicas": (0,)}, "replicas"),
        ({"replicas": (1, 2, 3)}, "replicas"),
        ({"spares": ()}, "spares"),
        ({"threads": 0}, "threads"),
        ({"threads": 10_000}, "threads"),
        ({"coordinators": 0}, "coordinators"),
        ({"slow_down": {2: 2.0}}, "slow"),
        ({"slow_down": {1: 0.5}}, "slow"),
    ],
)
def test_settings_that_make_no_sense_are_refused(changes: dict[str, object], field: str) -> None:
    with pytest.raises(InvalidInput, match=f"^{field} is "):
        MeshSettings(**changes)


def test_a_new_stage_has_the_processes_of_the_old_one_with_its_first_layer(
    lay: Lay, ports: HeldPorts
) -> None:
    layout = lay(split="0:2,2:4", replicas=(1, 2), spares=(1, 0))
    names = {command.name for command in layout.commands()}
    recut = plan_recut(layout, "0:1,1:2,2:4", taken_names=names, ports=ports)
    assert [(one.stage_index, one.replica.number, one.replica.is_spare) for one in recut.new] == [
        *((0, 2, False), (0, 3, True), (1, 2, False), (1, 3, True))
    ]
    assert recut.layout.stages[2] == layout.stages[1]
    assert recut.leaving == {one.address for one in layout.stages[0].replicas}
    assert recut.layout.roster != layout.roster


def test_where_the_wire_rounds_at_the_cut_there_is_no_other_cut(lay: Lay, ports: HeldPorts) -> None:
    layout = lay(split="0:2,2:4", wire="int8")
    with pytest.raises(PlanImpossible, match="rounded to int8 where the model is cut"):
        plan_recut(layout, "0:1,1:4", taken_names=(), ports=ports)


def test_layers_of_several_models_are_not_put_into_one_stage(lay: Lay, ports: HeldPorts) -> None:
    layout = lay(split="0:2,2:4")
    added = ReplicaLayout(number=1, address="127.0.0.1:1", metrics_port=2, model_path="new")
    old = layout.stages[1].replicas[0].address
    layout = layout.with_replica(1, added).without_replica(old)
    with pytest.raises(PlanImpossible, match="layers 1:4 have weights of several models"):
        plan_recut(layout, "0:1,1:4", taken_names=(), ports=ports)
    recut = plan_recut(layout, "0:2,2:3,3:4", taken_names=(), ports=ports)
    assert [one.replica.model_path for one in recut.new] == ["new", "new"]


def test_processes_that_do_not_fit_beside_a_mesh_are_refused_with_the_numbers(lay: Lay) -> None:
    layout = lay(split="0:2,2:4", kv_memory_bytes=2**20)
    slices = [layout.slice_of(stage) for stage in layout.stages]
    check_room(slices, layout)
    with pytest.raises(PlanImpossible, match=r"2 more processes .* need .* and .* are available"):
        check_room(slices, replace(layout, kv_blocks=10**12))
