"""Starts a coordinator: `python -m services.coordinator --listen ... --stages 'A|B,C'`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from penstock.v1 import coordinator_pb2, coordinator_pb2_grpc

from core.errors import InvalidInput
from services.common.credentials import load_credentials
from services.common.health import HealthService, add_reflection
from services.common.identity import COORDINATOR
from services.common.logs import configure_logging
from services.common.options import Certs, Insecure
from services.common.servers import bind, create_server, exit_with, run_process, run_until_stopped
from services.common.telemetry import start_telemetry
from services.coordinator.conductor import Conductor
from services.coordinator.metrics import register_metrics
from services.coordinator.roster import parse_roster, read_roster
from services.coordinator.servicer import CoordinatorServicer
from services.coordinator.settings import CoordinatorSettings, parse_tenant_weights


async def serve(settings: CoordinatorSettings) -> None:
    """Runs a coordinator until it is told to stop."""
    credentials = load_credentials(settings.certs, kind=COORDINATOR)
    telemetry = start_telemetry("penstock-coordinator", metrics_port=settings.metrics_port)
    try:
        health = HealthService()
        conductor = Conductor(settings, telemetry, health, credentials=credentials)
        register_metrics(telemetry, conductor)
        server = create_server(telemetry, credentials=credentials)
        coordinator_pb2_grpc.add_CoordinatorServiceServicer_to_server(
            CoordinatorServicer(conductor, offers_shortcuts=settings.offers_shortcuts), server
        )
        await health.add_to(server)
        service = coordinator_pb2.DESCRIPTOR.services_by_name["CoordinatorService"]
        add_reflection(server, services=[service])
        bind(server, settings.listen, credentials=credentials, insecure=settings.insecure)
        await server.start()
        await run_until_stopped(
            server,
            tasks=[conductor.run()],
            drain=conductor.stop,
            exit_with_parent=settings.exit_with_parent,
        )
        conductor.trail.close()
    finally:
        telemetry.shutdown()


def main(
    listen: Annotated[str, typer.Option(help="host:port to serve on")],
    stages: Annotated[
        str, typer.Option(help="addresses: commas between stages, | between replicas of one")
    ] = "",
    spares: Annotated[
        str, typer.Option(help="of these, with commas, those used only when others fail")
    ] = "",
    stages_file: Annotated[
        Path | None,
        typer.Option(help="file that has both instead, read anew when the stages are taken over"),
    ] = None,
    metrics_port: Annotated[int | None, typer.Option(help="port of /metrics")] = None,
    max_sequences: Annotated[int, typer.Option(help="most requests running at a time")] = 256,
    max_waiting: Annotated[int, typer.Option(help="most requests waiting")] = 1024,
    speculation: Annotated[
        int, typer.Option(help="most guessed tokens of a request in a micro-batch; 0: none")
    ] = 16,
    micro_batch_timeout_s: Annotated[
        float, typer.Option(help="seconds without a result after which a stage has hung")
    ] = 10.0,
    lost_limit_s: Annotated[
        float, typer.Option(help="seconds that requests wait for a stage that has no replica")
    ] = 30.0,
    pulse_timeout_s: Annotated[
        float, typer.Option(help="seconds without a word after which a stage is lost")
    ] = 2.0,
    prefix_cache: Annotated[
        bool, typer.Option(help="compute prompts that begin alike once, as far as they do")
    ] = True,
    tenant_weights: Annotated[
        str, typer.Option(help="shares of tenants in what is admitted, gold=4,free=0.5; 1 else")
    ] = "",
    shortcuts: Annotated[
        bool, typer.Option(help="sockets beside the gRPC streams, for gateways on the same host")
    ] = True,
    open_timeout_s: Annotated[
        float, typer.Option(help="seconds that a stage has for loading its weights")
    ] = 600.0,
    certs: Certs = None,
    insecure: Insecure = False,
    audit: Annotated[Path | None, typer.Option(help="file of the audit log")] = None,
    log_level: Annotated[str, typer.Option(help="DEBUG, INFO, WARNING or ERROR")] = "INFO",
    exit_with_parent: Annotated[
        bool, typer.Option("--exit-with-parent", help="stop when standard input ends")
    ] = False,
) -> None:
    """Schedules one pipeline of stages for any number of gateways."""
    configure_logging("coordinator", level=log_level)
    try:
        settings = CoordinatorSettings(
            listen=listen,
            roster=read_roster(stages_file) if stages_file else parse_roster(stages, spares),
            stages_file=stages_file,
            metrics_port=metrics_port,
            max_sequences=max_sequences,
            max_waiting=max_waiting,
            speculation=speculation,
            micro_batch_timeout_s=micro_batch_timeout_s,
            lost_limit_s=lost_limit_s,
            pulse_timeout_s=pulse_timeout_s,
            prefix_cache=prefix_cache,
            tenant_weights=parse_tenant_weights(tenant_weights),
            offers_shortcuts=shortcuts,
            open_timeout_s=open_timeout_s,
            audit=audit,
            log_level=log_level,
            exit_with_parent=exit_with_parent,
            certs=certs,
            insecure=insecure,
        )
    except InvalidInput as error:
        exit_with(error)
    run_process(serve(settings))


if __name__ == "__main__":
    typer.run(main)
