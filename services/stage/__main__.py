"""`python -m services.stage`: one stage of a pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from core.errors import PenstockError
from services.common.logs import configure_logging
from services.common.options import Certs, Insecure
from services.common.servers import exit_with, run_process
from services.stage.dumps import forbid_dumps
from services.stage.process import run_stage
from services.stage.settings import StageSettings, parse_layers


def stage(
    *,
    model: Annotated[Path, typer.Option(help="Weight file, or folder, maybe sealed")],
    name: Annotated[str, typer.Option(help="The model's name in the mesh")],
    layers: Annotated[str, typer.Option(help="Layers to hold, FIRST:END, end not included")],
    listen: Annotated[str, typer.Option(help="host:port; port 0 takes a free one")],
    metrics_port: Annotated[int | None, typer.Option(help="Prometheus; default none")] = None,
    dtype: Annotated[str, typer.Option(help="fp32, bf16, int8 or int4")] = "bf16",
    device: Annotated[str, typer.Option(help="cpu, cuda, or auto: a GPU if there is one")] = "cpu",
    wire: Annotated[
        str, typer.Option(help="Activations between stages: f32, bf16 or int8")
    ] = "f32",
    kv_blocks: Annotated[int, typer.Option(help="KV blocks in all")] = 1024,
    max_rows: Annotated[int, typer.Option(help="Most rows of a micro-batch")] = 512,
    threads: Annotated[
        int, typer.Option(help="Threads that compute a micro-batch together, on a CPU")
    ] = 1,
    threads_alone: Annotated[
        int, typer.Option(help="Likewise while no other replica computes, if more than --threads")
    ] = 1,
    max_sequences: Annotated[int, typer.Option(help="Most sequences at a time")] = 256,
    shortcuts: Annotated[
        bool, typer.Option(help="Sockets beside the gRPC streams, for peers on the same host")
    ] = True,
    slow_down: Annotated[
        float, typer.Option(help="Takes so many times as long to compute, to try out slow nodes")
    ] = 1.0,
    sealer: Annotated[
        Path | None, typer.Option(help="Public key of who has sealed the model; no other is opened")
    ] = None,
    identity_key: Annotated[
        Path | None, typer.Option(help="Private key that opens this stage's sealed layers")
    ] = None,
    manifest: Annotated[
        Path | None, typer.Option(help="The model's digests; other bytes are not loaded")
    ] = None,
    rehash_minutes: Annotated[
        float, typer.Option(help="How often weights in memory are hashed again; 0: never")
    ] = 10.0,
    slow_down_file: Annotated[
        Path | None,
        typer.Option(
            envvar="PENSTOCK_SLOW_DOWN_FILE",
            help="File that says so instead, while it is there; inf: hangs",
        ),
    ] = None,
    exit_with_parent: Annotated[
        bool, typer.Option("--exit-with-parent", help="Stop when standard input ends")
    ] = False,
    certs: Certs = None,
    insecure: Insecure = False,
    log_level: Annotated[str, typer.Option(help="DEBUG, INFO, WARNING or ERROR")] = "INFO",
) -> None:
    """Computes a run of a model's layers behind a gRPC service."""
    try:
        first_layer, end_layer = parse_layers(layers)
        settings = StageSettings(
            model=model.expanduser(),
            name=name,
            first_layer=first_layer,
            end_layer=end_layer,
            listen=listen,
            metrics_port=metrics_port,
            number_format=dtype,
            device=device,
            wire=wire,
            num_kv_blocks=kv_blocks,
            max_rows=max_rows,
            threads=threads,
            threads_alone=threads_alone,
            max_sequences=max_sequences,
            offers_shortcuts=shortcuts,
            slow_down=slow_down,
            sealer=sealer,
            identity_key=identity_key,
            manifest=manifest,
            rehash_minutes=rehash_minutes,
            slow_down_file=slow_down_file,
            exit_with_parent=exit_with_parent,
            certs=certs,
            insecure=insecure,
        )
    except PenstockError as error:
        exit_with(error)
    configure_logging(f"stage {layers}", level=log_level)
    if settings.sealer is not None:
        forbid_dumps()
    run_process(run_stage(settings))


if __name__ == "__main__":
    typer.run(stage)
