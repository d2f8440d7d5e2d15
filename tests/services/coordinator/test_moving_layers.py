"""Layers move between stages while requests run, and nobody notices."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any, NamedTuple

import grpc
import pytest
from penstock.v1 import coordinator_pb2 as pb
from penstock.v1 import tensor_pb2

from tests.services.coordinator.conftest import Gateway, RunningCoordinator, coordinator
from tests.support.fake_engine import completion
from tests.support.fake_stages import FakeStage, fake_stages

OLD, FINER = "0:2,2:4", "0:2,2:3,3:4"


class Moving(NamedTuple):
    """Two stages of two layers; replicas of layers 2 and 3 that are not in the mesh."""

    stages: list[FakeStage]
    running: RunningCoordinator
    gateway: Gateway

    @property
    def new(self) -> list[FakeStage]:
        return self.stages[2:]

    async def add_new(self) -> None:
        for index, stage in enumerate(self.new, start=1):
            await self.gateway.stub.AddReplica(
                pb.AddReplicaRequest(stage_index=index, address=stage.address, split=FINER)
            )

    async def choose(self, split: str) -> None:
        await self.gateway.stub.ChooseCut(pb.ChooseCutRequest(split=split))

    async def drain(self, stages: Sequence[FakeStage], *, moves: bool) -> None:
        for stage in stages:
            request = pb.DrainReplicaRequest(address=stage.address, moves=moves)
            async for _ in self.gateway.stub.DrainReplica(request):
                pass

    async def begin(self, prompts: Sequence[Sequence[int]]) -> list[int]:
        requests = [await self.gateway.submit(prompt, 100) for prompt in prompts]
        for request in requests:
            await self.gateway.next_update(request)
        return requests

    async def finish(self, requests: Sequence[int], prompts: Sequence[Sequence[int]]) -> None:
        for prompt, request in zip(prompts, requests, strict=True):
            tokens, last = await self.gateway.finish(request)
            assert not last.HasField("refusal"), last.refusal.message
            assert tokens == completion(prompt, 100)[-len(tokens) :]
        assert [stage.violations for stage in self.stages] == [[]] * 4


@asynccontextmanager
async def moving(**fields: Any) -> AsyncIterator[Moving]:
    async with fake_stages(2, replicas=[1, 3], seconds_a_batch=0.002, **fields) as stages:
        for stage, layer in zip(stages[2:], (2, 3), strict=True):
            stage.first_layer, stage.end_layer = layer, layer + 1
        async with coordinator(stages[:2]) as running, running.gateway() as gateway:
            await gateway.wait_until_ready()
            yield Moving(stages, running, gateway)


PROMPTS = [[start] for start in range(1, 9)]


@pytest.mark.parametrize("moves", [False, True])
async def test_two_stages_become_three_and_two_again(moves: bool) -> None:
    async with moving() as mesh:
        requests = await mesh.begin(PROMPTS)
        await mesh.add_new()
        await mesh.gateway.until_all_are_ready()
        assert mesh.gateway.mesh.model.num_stages == 2
        await mesh.choose(FINER)
        await mesh.gateway.wait_for_mesh(lambda state: list(state.stages_ready) == [True] * 3)
        assert await mesh.gateway.generate([6, 7], 5) == completion([6, 7], 5)
        assert mesh.new[1].num_batches >= 5
        await mesh.drain(mesh.stages[1:2], moves=moves)
        state = await mesh.gateway.get_mesh()
        assert (state.split, bool(state.sequences_moved)) == (FINER, moves)
        assert [(one.index, one.first_layer, one.end_layer) for one in state.stages] == [
            *((0, 0, 2), (1, 2, 3), (2, 3, 4))
        ]
        await mesh.gateway.stub.AddReplica(
            pb.AddReplicaRequest(stage_index=1, address=mesh.stages[1].address, split=OLD)
        )
        await mesh.gateway.until_all_are_ready()
        await mesh.choose(OLD)
        await mesh.drain(mesh.new, moves=moves)
        await mesh.finish(requests, PROMPTS)
        assert mesh.gateway.mesh.model.num_stages == 2
        assert not mesh.running.health.is_serving("fake/stage/2")
        assert len(mesh.stages[0].epochs) == 1


async def test_a_cut_on_trial_is_shown_and_taken_by_its_probe_alone() -> None:
    async with moving() as mesh:
        await mesh.add_new()
        await mesh.gateway.until_all_are_ready()
        assert await mesh.gateway.generate([4, 5], 5) == completion([4, 5], 5)
        assert [stage.num_batches for stage in mesh.new] == [0, 0]
        answer = await mesh.gateway.stub.ProbeReplica(
            pb.ProbeReplicaRequest(
                address=mesh.new[0].address, token_ids=[8], max_tokens=4, split=FINER
            )
        )
        assert list(answer.token_ids) == completion([8], 4)
        assert min(stage.num_batches for stage in mesh.new) >= 4
        passed_over = [one.passed_over for one in (await mesh.gateway.get_mesh()).stages]
        assert passed_over == [False, False, True, True]


async def test_a_new_replica_that_dies_before_its_cut_is_chosen_disturbs_nobody() -> None:
    async with moving() as mesh:
        requests = await mesh.begin(PROMPTS)
        await mesh.add_new()
        await mesh.gateway.until_all_are_ready()
        await mesh.new[0].stop()
        await mesh.drain(mesh.new, moves=True)
        await mesh.finish(requests, PROMPTS)
        assert (await mesh.gateway.get_mesh()).sequences_moved == 0


async def test_what_began_on_a_new_cut_goes_back_when_that_is_taken_back() -> None:
    async with moving() as mesh:
        await mesh.add_new()
        await mesh.gateway.until_all_are_ready()
        await mesh.choose(FINER)
        requests = await mesh.begin(PROMPTS)
        await mesh.new[1].stop()
        await mesh.choose(OLD)
        await mesh.drain(mesh.new, moves=True)
        await mesh.finish(requests, PROMPTS)


async def test_a_replica_of_other_layers_than_its_cut_says_is_refused() -> None:
    async with moving() as mesh:
        mesh.new[0].end_layer = 4
        await mesh.add_new()
        while "layers are 2:4, not 2:3" not in str((await mesh.gateway.get_mesh()).stages):
            pass


async def test_where_a_codec_rounds_at_the_cut_there_is_no_other_cut() -> None:
    async with moving(codec=tensor_pb2.CODEC_INT8) as mesh:
        with pytest.raises(grpc.aio.AioRpcError, match="rounded to int8") as caught:
            await mesh.add_new()
        assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
        assert len((await mesh.gateway.get_mesh()).stages) == 2
        request = pb.AddReplicaRequest(stage_index=1, address="127.0.0.1:1", split=OLD)
        await mesh.gateway.stub.AddReplica(request)


async def test_other_weights_are_no_cut_of_the_same_model() -> None:
    async with moving() as mesh:
        mesh.new[1].weights = "v"
        await mesh.add_new()
        await mesh.gateway.until_all_are_ready()
        stub = mesh.gateway.stub
        probe = pb.ProbeReplicaRequest(
            address=mesh.new[1].address, token_ids=[8], max_tokens=4, split=FINER
        )
        calls = (
            (stub.ChooseCut(pb.ChooseCutRequest(split=FINER)), "NOT_FOUND", "3:4 with the weights"),
            (stub.ProbeReplica(probe), "UNAVAILABLE", "other weights"),
            (stub.ChooseCut(pb.ChooseCutRequest(split="0:3")), "INVALID_ARGUMENT", "split"),
            (
                stub.AddReplica(pb.AddReplicaRequest(stage_index=3, address="x:1", split=FINER)),
                *("INVALID_ARGUMENT", "below 3"),
            ),
        )
        for call, code, words in calls:
            with pytest.raises(grpc.aio.AioRpcError, match=words) as caught:
                await call
            assert caught.value.code().name == code
        assert (await mesh.gateway.get_mesh()).split == OLD
