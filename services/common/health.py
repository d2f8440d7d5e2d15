"""The standard health service (grpc.health.v1) and server reflection."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection


class HealthService:
    """What a request to each name would meet.

    Names are "" (the whole process), a model's name, and MODEL/stage/N. A name never
    set is NOT_FOUND. Everything starts as not serving.
    """

    def __init__(self, names: Iterable[str] = ()) -> None:
        self._servicer = health.aio.HealthServicer()
        self._serving: dict[str, bool] = {}
        self._names = ("", *names)

    async def add_to(self, server: grpc.aio.Server) -> None:
        """Registers the service; to be called before the server starts."""
        for name in self._names:
            await self.set(name, serving=False)
        health_pb2_grpc.add_HealthServicer_to_server(self._servicer, server)

    async def set(self, name: str, *, serving: bool) -> None:
        """Says whether a request to `name` would be served now; watchers are told of changes."""
        self._serving[name] = serving
        status = health_pb2.HealthCheckResponse.ServingStatus
        await self._servicer.set(name, status.SERVING if serving else status.NOT_SERVING)

    def is_serving(self, name: str) -> bool:
        """Returns what was last set."""
        return self._serving.get(name, False)

    async def stop_serving(self) -> None:
        """Says "not serving" for every name from now on, whatever is set later."""
        self._serving = dict.fromkeys(self._serving, False)
        await self._servicer.enter_graceful_shutdown()


def add_reflection(server: grpc.aio.Server, *, services: Iterable[Any]) -> None:
    """Lets clients list `services` (their descriptors), health and reflection itself."""
    names = [service.full_name for service in services]
    reflection.enable_server_reflection(
        [*names, health.SERVICE_NAME, reflection.SERVICE_NAME], server
    )
