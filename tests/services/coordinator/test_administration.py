"""Replicas come and go while requests run, and nobody notices."""

from __future__ import annotations

from pathlib import Path

import grpc
import pytest
from penstock.v1 import coordinator_pb2 as pb

from services.common.audit_check import read_lines, verify
from services.coordinator.replicas import MOST_REPLICAS
from tests.services.coordinator.conftest import coordinator, mesh
from tests.support.fake_engine import completion
from tests.support.fake_stages import fake_stages


async def test_new_weights_are_tried_then_taken_while_old_sequences_end_with_the_old() -> None:
    async with fake_stages(2, replicas=[1, 2], seconds_a_batch=0.005) as stages:
        stages[2].weights = "v"
        async with coordinator(stages[:2]) as running, running.gateway() as gateway:
            await gateway.wait_until_ready()
            begun = await gateway.submit([1, 2, 3], 100)
            await gateway.next_update(begun)
            await gateway.stub.AddReplica(
                pb.AddReplicaRequest(stage_index=1, address=stages[2].address)
            )
            await gateway.until_all_are_ready()
            assert await gateway.generate([4, 5], 5) == completion([4, 5], 5)
            assert stages[2].num_batches == 0
            probe = pb.ProbeReplicaRequest(address=stages[2].address, token_ids=[8], max_tokens=4)
            answer = await gateway.stub.ProbeReplica(probe)
            assert list(answer.token_ids) == completion([8], 4)
            assert stages[2].num_batches >= 4
            choice = pb.ChooseWeightsRequest(stage_index=1, weights_digest="v1")
            await gateway.stub.ChooseWeights(choice)
            before = stages[2].num_batches
            assert await gateway.generate([6, 7], 5) == completion([6, 7], 5)
            assert stages[2].num_batches >= before + 5
            drain = gateway.stub.DrainReplica(pb.DrainReplicaRequest(address=stages[1].address))
            held = [message.sequences async for message in drain]
            assert held[0] == 1
            tokens, last = await gateway.finish(begun)
            assert not last.HasField("refusal")
            assert tokens == completion([1, 2, 3], 100)[-len(tokens) :]
            addresses = [one.address for one in (await gateway.get_mesh()).stages]
            assert addresses == [stages[0].address, stages[2].address]
            await stages[1].until_it_is_left()
            assert [stage.violations for stage in stages] == [[], [], []]


async def test_a_drained_replica_hands_its_sequences_to_others_when_told_so() -> None:
    async with mesh(2, replicas=[1, 2], seconds_a_batch=0.005) as m:
        prompts = [[start] for start in range(1, 9)]
        requests = [await m.gateway.submit(prompt, 100) for prompt in prompts]
        for request in requests:
            await m.gateway.next_update(request)
        drain = pb.DrainReplicaRequest(address=m.stages[1].address, moves=True)
        async for _ in m.gateway.stub.DrainReplica(drain):
            pass
        for prompt, request in zip(prompts, requests, strict=True):
            tokens, last = await m.gateway.finish(request)
            assert not last.HasField("refusal")
            assert tokens == completion(prompt, 100)[-len(tokens) :]
        assert [stage.violations for stage in m.stages] == [[], [], []]


async def test_orders_that_make_no_sense_are_told_by_their_status() -> None:
    async with mesh(1) as m:
        stub = m.gateway.stub
        calls = (
            (stub.AddReplica(pb.AddReplicaRequest(stage_index=1)), "INVALID_ARGUMENT"),
            (stub.AddReplica(pb.AddReplicaRequest(address="unix:/tmp/x")), "INVALID_ARGUMENT"),
            (stub.AddReplica(pb.AddReplicaRequest(address="h:99999")), "INVALID_ARGUMENT"),
            (stub.ChooseWeights(pb.ChooseWeightsRequest(weights_digest="x")), "NOT_FOUND"),
            (stub.ProbeReplica(pb.ProbeReplicaRequest(address="x")), "NOT_FOUND"),
            (stub.DrainReplica(pb.DrainReplicaRequest(address="x")).read(), "NOT_FOUND"),
        )
        for call, code in calls:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call
            assert caught.value.code().name == code


async def test_what_an_operator_does_is_in_the_audit_log(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    async with (
        fake_stages(1, replicas=[2]) as stages,
        coordinator(stages[:1], audit=path) as running,
        running.gateway() as gateway,
    ):
        await gateway.wait_until_ready()
        stub, address = gateway.stub, stages[1].address
        await stub.AddReplica(pb.AddReplicaRequest(stage_index=0, address=address))
        await gateway.until_all_are_ready()
        digest = (await gateway.get_mesh()).stages[1].weights_digest
        await stub.ChooseWeights(pb.ChooseWeightsRequest(weights_digest=digest))
        async for _ in stub.DrainReplica(pb.DrainReplicaRequest(address=address)):
            pass
        with pytest.raises(grpc.aio.AioRpcError):
            await stub.DrainReplica(pb.DrainReplicaRequest(address="x")).read()
        running.conductor.trail.close()
    verify(path)
    lines = [(line.event, line.details.get("address")) for line in read_lines(path)]
    assert lines == [
        ("replica added", address),
        ("weights chosen", None),
        ("replica drained", address),
    ]
    assert all(line.actor.startswith("ipv4:127.0.0.1:") for line in read_lines(path))


async def test_a_stage_takes_no_more_replicas_than_it_may_have() -> None:
    async with fake_stages(1) as stages, coordinator(stages) as running, running.gateway() as it:
        for port in range(1, MOST_REPLICAS):
            await it.stub.AddReplica(pb.AddReplicaRequest(address=f"127.0.0.1:{port}"))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await it.stub.AddReplica(pb.AddReplicaRequest(address="127.0.0.1:999"))
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
