"""CoordinatorService: RPCs to and from the conductor, and nothing else."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from penstock.v1 import coordinator_pb2, coordinator_pb2_grpc

from services.coordinator.conductor import Conductor
from services.coordinator.gateway_stream import GatewayStream


class CoordinatorServicer(coordinator_pb2_grpc.CoordinatorServiceServicer):
    """See coordinator.proto."""

    def __init__(self, conductor: Conductor) -> None:
        self._conductor = conductor

    async def Connect(
        self, requests: AsyncIterator[coordinator_pb2.ConnectRequest], context: Any
    ) -> AsyncIterator[coordinator_pb2.ConnectResponse]:
        gateway = self._conductor.connect()
        reader = asyncio.ensure_future(self._read(gateway, requests))
        try:
            while (message := await gateway.next_message()) is not None:
                yield message
            if reader.done():
                reader.result()
        finally:
            reader.cancel()
            self._conductor.disconnect(gateway)

    async def _read(
        self, gateway: GatewayStream, requests: AsyncIterator[coordinator_pb2.ConnectRequest]
    ) -> None:
        """Ends the stream when the gateway ends its side, or sends what cannot be read."""
        try:
            async for request in requests:
                self._conductor.receive(gateway, request)
        finally:
            gateway.close()

    async def GetMesh(
        self, request: coordinator_pb2.GetMeshRequest, context: Any
    ) -> coordinator_pb2.GetMeshResponse:
        return self._conductor.describe()
