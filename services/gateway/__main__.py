"""`python -m services.gateway`: the public face of a mesh."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from core.errors import PenstockError
from core.tokens.tokenizer import load_tokenizer
from core.weights.sealed.identity import read_seal_keys
from services.common.credentials import load_credentials
from services.common.data_folder import default_data_folder
from services.common.identity import GATEWAY
from services.common.logs import configure_logging
from services.common.options import Certs, Insecure
from services.common.servers import exit_with, run_process
from services.common.telemetry import start_telemetry
from services.gateway.gateway import Gateway
from services.gateway.settings import GatewaySettings


async def serve(settings: GatewaySettings) -> None:
    """Runs a gateway until it is stopped; raises errors of ours when it cannot start."""
    credentials = load_credentials(settings.certs, kind=GATEWAY)
    telemetry = start_telemetry("penstock-gateway", metrics_port=settings.metrics_port)
    try:
        keys = None if settings.sealer is None else read_seal_keys(settings.sealer)
        tokenizer = load_tokenizer(settings.model, keys=keys)
        gateway = Gateway(settings, tokenizer, telemetry, credentials=credentials)
        await gateway.start()
        await gateway.run()
    finally:
        telemetry.shutdown()


def main(
    coordinator: Annotated[str, typer.Option(help="host:port, then of those that stand by")],
    model: Annotated[Path, typer.Option(help="weight file or folder with the tokenizer")],
    sealer: Annotated[
        Path | None, typer.Option(help="public key of who has sealed the model, where it is sealed")
    ] = None,
    listen: Annotated[str, typer.Option(help="host:port to serve on")] = "127.0.0.1:8001",
    metrics_port: Annotated[int | None, typer.Option(help="port of /metrics")] = None,
    drain_s: Annotated[float, typer.Option(help="seconds open requests have at the end")] = 10.0,
    resume_limit_s: Annotated[
        float, typer.Option(help="seconds requests wait for a coordinator when theirs was lost")
    ] = 30.0,
    certs: Certs = None,
    insecure: Insecure = False,
    require_keys: Annotated[
        bool | None,
        typer.Option(help="ask for API keys; by default if anybody beyond this machine can call"),
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="folder of API keys and audit log; default: the user's")
    ] = None,
    log_level: Annotated[str, typer.Option(help="DEBUG, INFO, WARNING or ERROR")] = "INFO",
    exit_with_parent: Annotated[
        bool, typer.Option(help="stop when standard input is closed")
    ] = False,
) -> None:
    """Serves the public API of a mesh: generation, Open Inference Protocol, health, reflection."""
    configure_logging("gateway", level=log_level)
    # Each text is tokenised on the thread that asks; one that hangs must not keep the library's.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        settings = GatewaySettings(
            coordinators=tuple(address.strip() for address in coordinator.split(",")),
            model=model,
            sealer=sealer,
            listen=listen,
            metrics_port=metrics_port,
            drain_s=drain_s,
            resume_limit_s=resume_limit_s,
            certs=certs,
            insecure=insecure,
            require_keys=require_keys,
            data_folder=data or default_data_folder(),
            exit_with_parent=exit_with_parent,
        )
    except PenstockError as error:
        exit_with(error)
    run_process(serve(settings))


if __name__ == "__main__":
    typer.run(main)
