"""CoordinatorService: RPCs to and from the conductor, and nothing else."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from penstock.v1 import coordinator_pb2, coordinator_pb2_grpc

from services.coordinator.administration import Administration
from services.coordinator.conductor import Conductor
from services.coordinator.gateway_stream import GatewayStream


class CoordinatorServicer(coordinator_pb2_grpc.CoordinatorServiceServicer):
    """See coordinator.proto."""

    def __init__(self, conductor: Conductor, *, offers_shortcuts: bool = True) -> None:
        """Without `offers_shortcuts` all news travel over gRPC."""
        self._conductor = conductor
        self._offers_shortcuts = offers_shortcuts
        self._requests = conductor.requests
        self._administration = Administration(conductor)

    async def Connect(
        self, requests: AsyncIterator[coordinator_pb2.ConnectRequest], context: Any
    ) -> AsyncIterator[coordinator_pb2.ConnectResponse]:
        gateway = self._conductor.connect()
        if self._offers_shortcuts:
            gateway.offer_shortcut()
        reader = asyncio.ensure_future(self._read(gateway, requests))
        try:
            while (message := await gateway.next_message()) is not None:
                yield message
            if reader.done():
                reader.result()
        finally:
            reader.cancel()
            self._requests.disconnect(gateway)

    async def _read(
        self, gateway: GatewayStream, requests: AsyncIterator[coordinator_pb2.ConnectRequest]
    ) -> None:
        """Ends the stream when the gateway ends its side, or sends what cannot be read."""
        try:
            async for request in requests:
                if request.take_over:
                    self._conductor.take_over()
                self._requests.receive(gateway, request)
        finally:
            gateway.close()

    async def GetMesh(
        self, request: coordinator_pb2.GetMeshRequest, context: Any
    ) -> coordinator_pb2.GetMeshResponse:
        return self._conductor.describe()

    async def AddReplica(
        self, request: coordinator_pb2.AddReplicaRequest, context: Any
    ) -> coordinator_pb2.AddReplicaResponse:
        self._administration.add(request, actor=context.peer())
        return coordinator_pb2.AddReplicaResponse()

    async def ProbeReplica(
        self, request: coordinator_pb2.ProbeReplicaRequest, context: Any
    ) -> coordinator_pb2.ProbeReplicaResponse:
        return await self._administration.probe(request)

    async def ChooseWeights(
        self, request: coordinator_pb2.ChooseWeightsRequest, context: Any
    ) -> coordinator_pb2.ChooseWeightsResponse:
        self._administration.choose_weights(request, actor=context.peer())
        return coordinator_pb2.ChooseWeightsResponse()

    async def ChooseCut(
        self, request: coordinator_pb2.ChooseCutRequest, context: Any
    ) -> coordinator_pb2.ChooseCutResponse:
        self._administration.choose_cut(request, actor=context.peer())
        return coordinator_pb2.ChooseCutResponse()

    async def DrainReplica(
        self, request: coordinator_pb2.DrainReplicaRequest, context: Any
    ) -> AsyncIterator[coordinator_pb2.DrainReplicaResponse]:
        async for held in self._administration.drain(request, actor=context.peer()):
            yield coordinator_pb2.DrainReplicaResponse(sequences=held)
