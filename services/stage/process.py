"""A stage process from start to end."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from functools import partial
from typing import TypeVar

from penstock.v1 import stage_pb2, stage_pb2_grpc

from services.common.channels import Dial, open_channel
from services.common.credentials import Credentials, load_credentials
from services.common.health import HealthService, add_reflection
from services.common.identity import STAGE, stage_role
from services.common.servers import bind, create_server, run_until_stopped
from services.common.telemetry import start_telemetry
from services.stage.model import LoadedModel, load_model
from services.stage.servicer import StageServicer
from services.stage.settings import StageSettings
from services.stage.stage import Stage
from services.stage.worker import Worker

_LOG = logging.getLogger(__name__)
# A step in hand takes less; a hung one must not keep the process.
STOP_TIMEOUT_S = 3.0
Load = Callable[[StageSettings], LoadedModel]
Result = TypeVar("Result")


async def run_stage(settings: StageSettings, *, load: Load = load_model) -> None:
    """Serves until a signal. The port is open, and not serving, while the model loads.

    Raises whatever loading raises: a stage without a model is of no use.
    """
    layers = f"{settings.first_layer}:{settings.end_layer}"
    credentials = load_credentials(settings.certs, kind=STAGE)
    telemetry = start_telemetry(
        "penstock-stage",
        metrics_port=settings.metrics_port,
        attributes={"penstock.model": settings.name, "penstock.layers": layers},
    )
    loop = asyncio.get_running_loop()
    worker: Worker[LoadedModel] = Worker(_post_to(loop))
    health = HealthService()
    stage = Stage(
        worker,
        health=health,
        telemetry=telemetry,
        offers_shortcuts=settings.offers_shortcuts,
        dial=dialling_next(credentials),
    )
    server = create_server(telemetry, credentials=credentials)
    stage_pb2_grpc.add_StageServiceServicer_to_server(StageServicer(stage), server)
    await health.add_to(server)
    add_reflection(server, services=[stage_pb2.DESCRIPTOR.services_by_name["StageService"]])
    try:
        port = bind(server, settings.listen, credentials=credentials, insecure=settings.insecure)
        await server.start()
        facts = {"port": port, "metrics_port": telemetry.metrics_port}
        _LOG.info("stage listens", extra={**facts, "layers": layers})
        await run_until_stopped(
            server,
            tasks=[_load(settings, load=load, worker=worker, stage=stage), stage.watch()],
            drain=stage.close,
            exit_with_parent=settings.exit_with_parent,
        )
    finally:
        worker.stop(timeout_s=STOP_TIMEOUT_S)
        telemetry.shutdown()


def dialling_next(credentials: Credentials | None) -> Dial:
    """How a stage dials the next one; with credentials, whoever answers must be that."""
    if credentials is None:
        return open_channel
    index = credentials.identity.stage_index
    assert index is not None, "no other identity is loaded"
    return partial(open_channel, credentials=credentials, role=stage_role(index + 1))


async def _load(
    settings: StageSettings, *, load: Load, worker: Worker[LoadedModel], stage: Stage
) -> None:
    loaded: asyncio.Future[LoadedModel] = asyncio.get_running_loop().create_future()
    worker.start(
        lambda: load(settings),
        engine_of=lambda model: model.engine,
        on_loaded=lambda model: _settle(loaded, model, None),
        on_failure=lambda error: _settle(loaded, None, error),
    )
    try:
        model = await loaded
    except Exception:
        await stage.close()  # those who wait for the model need not wait for the server to stop
        raise
    await stage.set_model(model)
    manifest = model.manifest
    facts = {
        "layers": f"{manifest.first_layer}:{manifest.end_layer}",
        "weights_bytes": manifest.weights_bytes,
        "bytes_read": manifest.bytes_read,
        "seconds": round(model.load_duration_s, 2),
    }
    _LOG.info("stage ready", extra=facts)
    await _watch(model, stage)


async def _watch(model: LoadedModel, stage: Stage) -> None:
    """Waits until weights in memory are found changed, and takes the stage out of service."""
    loop = asyncio.get_running_loop()
    damaged: asyncio.Future[str] = loop.create_future()
    model.watch.start(lambda array: _post_to(loop)(_settle, damaged, array, None))
    try:
        await stage.distrust(await damaged)
    finally:
        model.watch.stop()


def _settle(
    future: asyncio.Future[Result], result: Result | None, error: BaseException | None
) -> None:
    if future.done():  # cancelled: the process is stopping
        return
    if result is not None:
        future.set_result(result)
    elif error is not None:
        future.set_exception(error)


def _post_to(loop: asyncio.AbstractEventLoop) -> Callable[..., None]:
    def post(function: Callable[..., object], *arguments: object) -> None:
        try:
            loop.call_soon_threadsafe(function, *arguments)
        except RuntimeError:  # the loop is closed: the process ends, nobody listens
            return

    return post
