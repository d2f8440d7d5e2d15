"""A stage that answers every message, and holds nothing.

`python -m tests.support.echoing_stage [CERTS]` serves one until its standard input ends, with the
identity of that folder if one is given, and prints its port.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from penstock.v1 import stage_pb2, stage_pb2_grpc

from services.common.credentials import Credentials
from services.common.health import HealthService
from services.common.servers import bind, create_server, run_until_stopped
from services.common.telemetry import no_telemetry


class EchoingStage(stage_pb2_grpc.StageServiceServicer):
    """One answer for each message."""

    async def Control(
        self, requests: AsyncIterator[Any], context: Any
    ) -> AsyncIterator[stage_pb2.ControlResponse]:
        async for _ in requests:
            yield stage_pb2.ControlResponse(report=stage_pb2.StageReport())

    async def Activate(
        self, requests: AsyncIterator[Any], context: Any
    ) -> AsyncIterator[stage_pb2.ActivateResponse]:
        async for _ in requests:
            yield stage_pb2.ActivateResponse(credits=1)


@asynccontextmanager
async def echoing_stage(
    credentials: Credentials | None, *, is_public: bool = False
) -> AsyncIterator[tuple[Any, int]]:
    """The server and its port. A public one asks for no certificates, and lets everyone in."""
    server = create_server(no_telemetry(), credentials=None if is_public else credentials)
    stage_pb2_grpc.add_StageServiceServicer_to_server(EchoingStage(), server)
    health = HealthService()
    await health.add_to(server)
    port = bind(server, "127.0.0.1:0", credentials=credentials, is_public=is_public)
    await server.start()
    await health.set("", serving=True)
    try:
        yield server, port
    finally:
        await server.stop(None)


async def main() -> None:
    credentials = Credentials(Path(sys.argv[1])) if len(sys.argv) > 1 else None
    async with echoing_stage(credentials) as (server, port):
        print(port, flush=True)
        await run_until_stopped(server, exit_with_parent=True)


if __name__ == "__main__":
    asyncio.run(main())
