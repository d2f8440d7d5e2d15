"""The coordinators of a mesh: one serves, the others wait until it is lost."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any, NamedTuple

import grpc
from penstock.v1 import coordinator_pb2 as pb
from penstock.v1.coordinator_pb2_grpc import CoordinatorServiceStub

from core.errors import PenstockError, Unavailable
from services.common.channels import open_channel
from services.common.credentials import Credentials
from services.common.identity import COORDINATOR
from services.common.statuses import error_from_rpc

# One that has stopped must not hold up what another one answers.
_ASKING_TIMEOUT_S = 5.0


class Serving(NamedTuple):
    """The coordinator that serves, and what it says of the mesh."""

    address: str
    stub: Any
    mesh: pb.GetMeshResponse


class Coordinators:
    """Those that there are; see `serving`."""

    def __init__(self, stubs: Sequence[tuple[str, Any]]) -> None:
        """`stubs` of CoordinatorService, by address."""
        self._stubs = stubs

    async def serving(self) -> Serving:
        """The one that took the stages over last; raises what keeps one from answering, or else
        Unavailable where all wait."""
        answers = await asyncio.gather(*(_ask(address, stub) for address, stub in self._stubs))
        serving = [one for one in answers if isinstance(one, Serving) and one.mesh.term]
        if serving:
            return max(serving, key=lambda one: one.mesh.term)
        errors = (one for one in answers if isinstance(one, PenstockError))
        raise next(errors, Unavailable("no coordinator serves yet"))


@asynccontextmanager
async def open_coordinators(
    addresses: Sequence[str], *, credentials: Credentials | None
) -> AsyncIterator[Coordinators]:
    """Connects with all of them."""
    async with AsyncExitStack() as stack:
        stubs = []
        for address in addresses:
            channel = open_channel(address, credentials=credentials, role=COORDINATOR)
            await stack.enter_async_context(channel)
            stubs.append((address, CoordinatorServiceStub(channel)))
        yield Coordinators(stubs)


async def _ask(address: str, stub: Any) -> Serving | PenstockError:
    try:
        mesh = await stub.GetMesh(pb.GetMeshRequest(), timeout=_ASKING_TIMEOUT_S)
    except grpc.aio.AioRpcError as error:
        return error_from_rpc(error)
    return Serving(address, stub, mesh)
