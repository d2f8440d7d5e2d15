"""Whom a stage sends activations to, and as whom."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import grpc
import pytest
from penstock.v1 import stage_pb2, stage_pb2_grpc

from services.stage.process import dialling_next
from tests.support.certificates import credentials, write_mesh
from tests.support.echoing_stage import echoing_stage


async def first_credits(address: str, folder: Path) -> int:
    """What the peer grants when stage 0 dials it as the next stage."""
    dial = dialling_next(credentials(folder, "stage/0"))
    async with dial(address) as channel:
        stub: Any = stage_pb2_grpc.StageServiceStub(channel)
        call = stub.Activate(timeout=30)
        await call.write(stage_pb2.ActivateRequest())
        return (await call.read()).credits


async def test_a_stage_feeds_the_next_one(tmp_path: Path) -> None:
    write_mesh(tmp_path, "stage/0", "stage/1")
    async with echoing_stage(credentials(tmp_path, "stage/1")) as (_, port):
        assert await first_credits(f"127.0.0.1:{port}", tmp_path) == 1


@pytest.mark.parametrize("role", ["stage/2", "stage/0", "coordinator"])
async def test_a_stage_sends_nothing_to_whoever_is_not_the_next_one(
    tmp_path: Path, role: str
) -> None:
    write_mesh(tmp_path, "stage/0", role)
    async with echoing_stage(credentials(tmp_path, role)) as (_, port):
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await first_credits(f"127.0.0.1:{port}", tmp_path)
    assert raised.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_a_stage_with_certificates_sends_nothing_in_the_clear(tmp_path: Path) -> None:
    write_mesh(tmp_path, "stage/0")
    async with echoing_stage(None) as (_, port):
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await first_credits(f"127.0.0.1:{port}", tmp_path)
    assert raised.value.code() is grpc.StatusCode.UNAVAILABLE
