"""A gateway put together: tokenizer, link, servicers and server."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from oip import grpc_service_pb2 as oip
from oip import grpc_service_pb2_grpc as oip_grpc
from penstock.v1 import generation_pb2, generation_pb2_grpc

from core.errors import Unavailable
from core.tokens.tokenizer import Tokenizer
from services.common.audit_trail import AuditTrail
from services.common.credentials import Credentials
from services.common.data_folder import AUDIT_NAME, STORE_NAME
from services.common.health import HealthService, add_reflection
from services.common.servers import bind, create_server, run_until_stopped
from services.common.telemetry import Telemetry
from services.gateway.access import Access, KeyAccess, OpenAccess
from services.gateway.access_interceptor import AccessInterceptor, Refusals
from services.gateway.coordinator_link import CoordinatorLink
from services.gateway.encoding_threads import EncodingThreads
from services.gateway.generation import TextGenerator
from services.gateway.inference_servicer import InferenceServicer
from services.gateway.key_ring import KeyRing
from services.gateway.mesh_view import MeshView
from services.gateway.open_requests import OpenRequests
from services.gateway.servicer import GenerationServicer
from services.gateway.settings import GatewaySettings

_LOG = logging.getLogger(__name__)
# After the drain, for the last messages to leave.
_WRITE_GRACE_S = 1.0


class Gateway:
    """Serves until stopped. To be made inside a running event loop."""

    def __init__(
        self,
        settings: GatewaySettings,
        tokenizer: Tokenizer,
        telemetry: Telemetry,
        *,
        credentials: Credentials | None = None,
        threads: EncodingThreads | None = None,
    ) -> None:
        self._settings = settings
        self._credentials = credentials
        self._tokenizer = tokenizer
        self.health = HealthService()
        mesh = MeshView(
            self.health,
            vocab_size=tokenizer.vocab_size,
            has_chat_template=tokenizer.has_chat_template,
        )
        self.requests = OpenRequests(resume_limit_s=settings.resume_limit_s)
        self.link = CoordinatorLink(
            settings.coordinators, self.requests, on_mesh=mesh.update, credentials=credentials
        )
        self._threads = threads or EncodingThreads()
        self._generator = TextGenerator(
            tokenizer, mesh, self.requests, telemetry, threads=self._threads
        )
        self._trail = _audit_trail(settings)
        self._server = create_server(
            telemetry,
            max_receive_bytes=settings.max_message_bytes,
            interceptors=[AccessInterceptor(_access(settings), Refusals(self._trail))],
        )

    async def start(self) -> int:
        """Starts serving and returns the port; raises InvalidInput. `run` does the rest."""
        self._tokenizer.prepare_chat()
        generation_pb2_grpc.add_GenerationServiceServicer_to_server(
            GenerationServicer(self._generator), self._server
        )
        oip_grpc.add_GRPCInferenceServiceServicer_to_server(
            InferenceServicer(self._generator), self._server
        )
        await self.health.add_to(self._server)
        services = (
            generation_pb2.DESCRIPTOR.services_by_name["GenerationService"],
            oip.DESCRIPTOR.services_by_name["GRPCInferenceService"],
        )
        add_reflection(self._server, services=services)
        port = bind(
            self._server,
            self._settings.listen,
            credentials=self._credentials,
            is_public=True,
            insecure=self._settings.insecure,
        )
        await self._server.start()
        facts: dict[str, Any] = {"port": port, "coordinators": self._settings.coordinators}
        facts["requires_keys"] = self._settings.requires_keys
        _LOG.info("gateway listens", extra=facts)
        return port

    async def run(self) -> None:
        """Serves until SIGINT or SIGTERM, then drains and closes. To be called after `start`.

        Raises Unavailable where no text can be tokenised any more.
        """
        try:
            await run_until_stopped(
                self._server,
                tasks=[self.link.run(), self._watch_threads()],
                drain=self.drain,
                grace_s=_WRITE_GRACE_S,
                exit_with_parent=self._settings.exit_with_parent,
            )
        finally:
            await self.close()

    async def drain(self) -> None:
        """Refuses new requests, tells health so, and waits for the open ones up to `drain_s`."""
        self._generator.refuse_new()
        await self.health.stop_serving()
        try:
            async with asyncio.timeout(self._settings.drain_s):
                await self.requests.wait_until_idle()
        except TimeoutError:
            _LOG.warning("requests were cut off", extra={"open": self.requests.num_open})

    async def _watch_threads(self) -> None:
        await self._threads.wait_until_all_hang()
        await self.health.stop_serving()
        raise Unavailable("all encoding threads have hung; another process must take its place")

    async def close(self) -> None:
        """Cuts off what is still open and lets go of everything."""
        await self._server.stop(_WRITE_GRACE_S)
        self._tokenizer.close()
        self._threads.close()
        self._trail.close()


def _audit_trail(settings: GatewaySettings) -> AuditTrail:
    return AuditTrail(settings.data_folder / AUDIT_NAME if settings.requires_keys else None)


def _access(settings: GatewaySettings) -> Access:
    """Whom the gateway lets in; raises Unavailable where the keys cannot be read."""
    if not settings.requires_keys:
        return OpenAccess()
    # Here, since it takes time and memory that a gateway without keys need not have.
    from services.common.store import Store

    store = Store(settings.data_folder / STORE_NAME)
    return KeyAccess(KeyRing(store), salt_secret=store.salt_secret())
