"""Replicas are opened, checked, connected with their neighbours, and missed when they are gone."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import pytest
from penstock.v1 import stage_pb2, tensor_pb2

from core.errors import InvalidInput, NotFound
from core.pipeline.events import (
    CutChosen,
    Event,
    LinkLost,
    LinkReady,
    PipelineKnown,
    ReplicaDraining,
    ReplicaLost,
    ReplicaReady,
)
from services.coordinator.replica_link import Incarnation
from services.coordinator.replicas import Replicas
from services.coordinator.roster import Roster
from services.coordinator.settings import CoordinatorSettings
from tests.services.coordinator.conftest import by_stage
from tests.support.changes import Changes
from tests.support.fake_stages import FakeStage, fake_stages

DEADLINE_S = 20.0
Kind = TypeVar("Kind", bound=Event)


class Listener:
    """Keeps what the scheduler would hear, and lets tests wait for it."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self._changes = Changes()

    def post(self, event: Event) -> None:
        self.events.append(event)
        self.on_mesh_changed()

    def on_sampled(self, message: stage_pb2.SampledTokens) -> None: ...

    def on_report(self, replica: Incarnation, report: stage_pb2.StageReport) -> None: ...

    def on_mesh_changed(self) -> None:
        self._changes.tell()

    async def wait_until(self, is_so: Callable[[], bool]) -> None:
        async with asyncio.timeout(DEADLINE_S):
            await self._changes.wait_until(is_so)

    def of(self, kind: type[Kind]) -> list[Kind]:
        return [event for event in self.events if isinstance(event, kind)]

    async def wait_for(self, kind: type[Kind], count: int = 1) -> list[Kind]:
        await self.wait_until(lambda: len(self.of(kind)) >= count)
        return self.of(kind)


class Running:
    """Replicas that are kept open, and who hears of them."""

    def __init__(self, stages: Sequence[FakeStage], spares: Sequence[int], **settings: Any) -> None:
        self.listener = Listener()
        self.replicas = Replicas(
            CoordinatorSettings(
                listen="127.0.0.1:0",
                roster=Roster(
                    stages=by_stage(stages),
                    spares=frozenset(stages[spare].address for spare in spares),
                ),
                **settings,
            ),
            self.listener,
        )

    def problem(self, stage: FakeStage) -> str:
        return self.replicas.by_address(stage.address).problem

    def id_of(self, stage: FakeStage) -> int:
        incarnation = self.replicas.by_address(stage.address).incarnation
        assert incarnation is not None, "it is not open"
        return incarnation.replica_id


@asynccontextmanager
async def running(
    stages: Sequence[FakeStage], spares: Sequence[int] = (), **settings: Any
) -> AsyncIterator[Running]:
    mesh = Running(stages, spares, **settings)
    task = asyncio.create_task(mesh.replicas.run())
    try:
        yield mesh
        assert not task.done(), task.exception()
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_the_scheduler_hears_of_the_model_then_of_all_replicas_and_their_links() -> None:
    async with fake_stages(3, replicas=[2, 1, 2]) as stages, running(stages, spares=[1]) as mesh:
        links = await mesh.listener.wait_for(LinkReady, 4)
        first = mesh.listener.events[0]
        assert isinstance(first, PipelineKnown)
        assert (first.facts.num_layers, first.facts.context_length) == (6, 512)
        replicas = mesh.listener.of(ReplicaReady)
        assert sorted(r.facts.part.first_layer for r in replicas) == [0, 0, 2, 4, 4]
        assert [r.facts.is_spare for r in replicas].count(True) == 1
        assert {r.facts.part.weights for r in replicas} == {
            ("w0", "w1"),
            ("w2", "w3"),
            ("w4", "w5"),
        }
        (chosen,) = mesh.listener.of(CutChosen)
        assert chosen.cut.split == "0:2,2:4,4:6"
        ids = [mesh.id_of(stage) for stage in stages]
        assert {(link.upstream_id, link.downstream_id) for link in links} == {
            *((ids[0], ids[2]), (ids[1], ids[2]), (ids[2], ids[3]), (ids[2], ids[4]))
        }


async def test_nothing_is_known_before_there_is_a_replica_of_each_stage() -> None:
    async with fake_stages(2) as stages:
        stages[1].may_load.clear()
        async with running(stages) as mesh:
            await mesh.listener.wait_until(lambda: not mesh.problem(stages[0]))
            assert mesh.replicas.is_stage_ready(0)
            assert not mesh.replicas.is_stage_ready(1)
            assert not mesh.listener.events
            stages[1].may_load.set()
            await mesh.listener.wait_for(LinkReady)


async def test_a_replica_that_died_comes_back_with_another_id_and_a_later_epoch() -> None:
    async with fake_stages(2, replicas=[1, 2]) as stages, running(stages) as mesh:
        await mesh.listener.wait_for(LinkReady, 2)
        before, other = mesh.id_of(stages[1]), mesh.id_of(stages[2])
        await stages[1].stop()
        (lost,) = await mesh.listener.wait_for(ReplicaLost)
        assert lost.replica_id == before
        assert stages[1].address in lost.reason
        assert mesh.replicas.is_stage_ready(1)
        await stages[1].restart()
        await mesh.listener.wait_for(LinkReady, 3)
        assert mesh.id_of(stages[1]) not in (before, other)
        assert mesh.id_of(stages[2]) == other
        assert stages[1].epochs == sorted(set(stages[1].epochs))
        assert len(stages[2].epochs) == 1


async def test_a_replica_that_falls_silent_is_lost_and_found_again() -> None:
    async with (
        fake_stages(2, replicas=[1, 2]) as stages,
        running(stages, pulse_timeout_s=0.2) as mesh,
    ):
        await mesh.listener.wait_for(LinkReady, 2)
        silent = mesh.id_of(stages[2])
        stages[2].may_answer.clear()
        (lost,) = await mesh.listener.wait_for(ReplicaLost)
        assert lost.replica_id == silent
        assert "no pulse for 0.2 s" in lost.reason
        stages[2].may_answer.set()
        await mesh.listener.wait_for(ReplicaReady, 4)


async def test_a_replica_that_computes_for_long_keeps_its_pulse() -> None:
    async with fake_stages(1) as stages, running(stages, pulse_timeout_s=0.1) as mesh:
        await mesh.listener.wait_for(ReplicaReady)
        stages[0].may_compute.clear()
        batch = stage_pb2.MicroBatch(id=1, slots=[0], first_positions=[0], num_rows=[1])
        mesh.replicas.send(mesh.id_of(stages[0]), stage_pb2.ControlRequest(micro_batch=batch))
        await asyncio.sleep(0.5)
        assert not mesh.listener.of(ReplicaLost)


async def test_a_link_that_breaks_is_followed_by_another_one() -> None:
    async with fake_stages(2) as stages, running(stages) as mesh:
        (ready,) = await mesh.listener.wait_for(LinkReady)
        pair = (ready.upstream_id, ready.downstream_id)
        before = mesh.replicas.neighbours.id_of(*pair)
        stages[0].cut_links()
        (lost,) = await mesh.listener.wait_for(LinkLost)
        assert (lost.upstream_id, lost.downstream_id) == pair
        assert not mesh.replicas.is_stage_ready(0)
        assert not mesh.replicas.is_stage_ready(1)
        stages[0].may_link.set()
        await mesh.listener.wait_for(LinkReady, 2)
        assert mesh.replicas.neighbours.id_of(*pair) > before
        assert mesh.replicas.is_stage_ready(1)
        assert len(stages[0].epochs) == len(stages[1].epochs) == 1


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("fingerprint", "another", "numerics_fingerprint is 'another', not 'f'"),
        ("context_length", 1024, "context_length is 1024, not 512"),
        ("codec", tensor_pb2.CODEC_INT8, "codec is 'CODEC_INT8', not 'CODEC_F32'"),
        ("first_layer", 3, "layers are 3:5, not 2:4"),
        ("num_kv_blocks", 0, "has 0 KV blocks"),
    ],
)
async def test_a_replica_that_does_not_fit_is_refused_until_it_does(
    field: str, value: Any, words: str
) -> None:
    async with fake_stages(3, replicas=[1, 2, 1]) as stages:
        stages[2].may_load.clear()
        async with running(stages) as mesh:
            await mesh.listener.wait_for(LinkReady, 2)
            right = getattr(stages[2], field)
            setattr(stages[2], field, value)
            stages[2].may_load.set()
            await mesh.listener.wait_until(lambda: words in mesh.problem(stages[2]))
            assert stages[2].address in mesh.problem(stages[2])
            setattr(stages[2], field, right)
            await mesh.listener.wait_for(LinkReady, 4)


async def test_the_wrong_one_may_come_first() -> None:
    async with fake_stages(2) as stages:
        stages[0].may_load.clear()
        stages[1].fingerprint = "wrong"
        async with running(stages) as mesh:
            await mesh.listener.wait_until(lambda: not mesh.problem(stages[1]))
            stages[0].may_load.set()
            await mesh.listener.wait_until(lambda: "fingerprint" in mesh.problem(stages[0]))
            await stages[1].stop()
            stages[1].fingerprint = "f"
            await stages[1].restart()
            await mesh.listener.wait_for(LinkReady)


async def test_weights_of_a_stage_may_differ() -> None:
    async with fake_stages(2, replicas=[1, 2]) as stages:
        stages[2].weights = "v"
        async with running(stages) as mesh:
            await mesh.listener.wait_for(LinkReady, 2)
            changed = mesh.replicas.known_cut().with_part(mesh.replicas.part_with(1, "v1"))
            assert changed is not None
            mesh.replicas.choose(changed)
            chosen = mesh.listener.of(CutChosen)[-1].cut
            assert [part.weights for part in chosen.parts] == [("w0", "w1"), ("v2", "v3")]
            with pytest.raises(NotFound, match="there are v1, w1"):
                mesh.replicas.part_with(1, "x")


async def test_of_the_weights_that_it_begins_with_the_latest_replica_s_are_taken() -> None:
    """Also where that opens later; once an operator has chosen, what he chose."""
    async with fake_stages(2, replicas=[1, 2]) as stages:
        stages[2].weights = "v"
        stages[2].may_load.clear()
        async with running(stages) as mesh:
            await mesh.listener.wait_for(LinkReady)
            assert mesh.replicas.known_cut().parts[1].weights == ("w2", "w3")
            stages[2].may_load.set()
            await mesh.listener.wait_for(LinkReady, 2)
            assert mesh.replicas.known_cut().parts[1].weights == ("v2", "v3")
            old = mesh.replicas.known_cut().with_part(mesh.replicas.part_with(1, "w1"))
            assert old is not None
            mesh.replicas.choose(old)
            await stages[2].stop()
            await mesh.listener.wait_for(ReplicaLost)
            await stages[2].restart()
            await mesh.listener.wait_for(LinkReady, 3)
            assert mesh.replicas.known_cut() == old


async def test_a_replica_that_opens_while_it_is_let_go_gets_nothing_new() -> None:
    """As when the coordinator that was asked first has died, and the next one opens it."""
    async with fake_stages(2, replicas=[1, 2]) as stages:
        stages[2].may_load.clear()
        async with running(stages) as mesh:
            await mesh.listener.wait_for(LinkReady)
            mesh.replicas.drain(mesh.replicas.by_address(stages[2].address), moves=True)
            stages[2].may_load.set()
            (told,) = await mesh.listener.wait_for(ReplicaDraining)
            assert told == ReplicaDraining(replica_id=mesh.id_of(stages[2]), moves=True)


async def test_a_replica_can_be_added_and_let_go() -> None:
    async with fake_stages(2, replicas=[1, 2]) as stages, running(stages[:2]) as mesh:
        await mesh.listener.wait_for(LinkReady)
        added = mesh.replicas.add(1, stages[2].address, is_spare=False)
        assert added.place.number == 1
        await mesh.listener.wait_for(LinkReady, 2)
        leaving = mesh.replicas.by_address(stages[1].address)
        leaving_id = mesh.id_of(stages[1])
        mesh.replicas.drain(leaving, moves=True)
        assert mesh.listener.events[-1] == ReplicaDraining(replica_id=leaving_id, moves=True)
        mesh.replicas.remove(leaving)
        assert mesh.listener.of(ReplicaLost)[0].replica_id == leaving_id
        await stages[1].until_it_is_left()
        assert [link.place.address for link in mesh.replicas.links] == [
            *(stages[0].address, stages[2].address)
        ]
        assert len(stages[1].epochs) == 1


async def test_a_draining_replica_that_dies_is_not_opened_again() -> None:
    async with fake_stages(2, replicas=[1, 2]) as stages, running(stages) as mesh:
        await mesh.listener.wait_for(LinkReady, 2)
        mesh.replicas.drain(mesh.replicas.by_address(stages[2].address), moves=False)
        await stages[2].stop()
        await mesh.listener.wait_for(ReplicaLost)
        assert len(mesh.replicas.links) == 2


async def test_replicas_that_make_no_sense_are_not_added() -> None:
    async with fake_stages(1) as stages, running(stages) as mesh:
        with pytest.raises(InvalidInput, match="stage_index"):
            mesh.replicas.add(1, "127.0.0.1:1", is_spare=False)
        with pytest.raises(InvalidInput, match="address"):
            mesh.replicas.add(0, stages[0].address, is_spare=False)
        with pytest.raises(NotFound, match="no replica listens at 'nowhere:1'"):
            mesh.replicas.by_address("nowhere:1")


@pytest.mark.parametrize("fails_first", [True, False])
async def test_a_mesh_that_is_cancelled_while_a_replica_breaks_ends(fails_first: bool) -> None:
    async with fake_stages(2) as stages, asyncio.timeout(DEADLINE_S):
        mesh = Running(stages, ())
        task = asyncio.create_task(mesh.replicas.run())
        await mesh.listener.wait_for(LinkReady)
        if fails_first:
            mesh.replicas.drop(mesh.id_of(stages[0]), "a test breaks it")
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert not mesh.listener.of(ReplicaLost)
