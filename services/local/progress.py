"""How far the start of a mesh has come, asked of its public and inner services."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from core.errors import PenstockError
from services.common.channels import open_channel
from services.common.credentials import Credentials
from services.common.identity import GATEWAY
from services.local.coordinators import Coordinators, open_coordinators
from services.local.layout import replica_name

POLL_INTERVAL_S = 0.1
CALL_TIMEOUT_S = 5.0


@dataclass(frozen=True, kw_only=True)
class StageProgress:
    """What is known of one replica. `load_s` and `weights_bytes` count once it is ready."""

    index: int  # of its stage
    replica: int = 0
    ready: bool
    weights_bytes: int = 0
    bytes_read: int = 0
    load_s: float = 0.0
    problem: str = ""
    compiling: bool = False

    @property
    def name(self) -> str:
        """Of its process."""
        return replica_name(self.index, self.replica)


async def wait_until_ready(
    gateway: str,
    coordinators: Sequence[str],
    *,
    credentials: Credentials | None,
    report: Callable[[list[StageProgress]], None],
    is_compiling: Callable[[str], bool],
) -> None:
    """Returns when all replicas are ready and the gateway's health says that a request would be
    served.

    Until then calls `report` with the state of all replicas whenever it has changed.
    `is_compiling` says whether a process that is not ready compiles its kernels.
    """
    seen: list[StageProgress] = []
    async with (
        open_coordinators(coordinators, credentials=credentials) as inner,
        open_channel(gateway, credentials=credentials, role=GATEWAY) as outer,
    ):
        while True:
            now = [
                stage if stage.ready else replace(stage, compiling=is_compiling(stage.name))
                for stage in await _ask_stages(inner)
            ]
            if now and now != seen:
                report(now)
                seen = now
            if all(stage.ready for stage in now) and await _is_serving(outer):
                return
            await asyncio.sleep(POLL_INTERVAL_S)


async def _ask_stages(coordinators: Coordinators) -> list[StageProgress]:
    """The replicas' states; none while no coordinator serves yet."""
    try:
        mesh = (await coordinators.serving()).mesh
    except PenstockError:
        return []
    return [
        StageProgress(
            index=stage.index,
            replica=stage.replica,
            ready=stage.ready,
            weights_bytes=stage.weights_bytes,
            bytes_read=stage.bytes_read,
            load_s=stage.load_duration.ToTimedelta().total_seconds(),
            problem=stage.problem,
        )
        for stage in mesh.stages
    ]


async def _is_serving(channel: grpc.aio.Channel) -> bool:
    request = health_pb2.HealthCheckRequest(service="")
    try:
        answer = await health_pb2_grpc.HealthStub(channel).Check(request, timeout=CALL_TIMEOUT_S)
    except grpc.aio.AioRpcError:
        return False
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)
