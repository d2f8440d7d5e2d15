"""`penstock mesh`, `stop` and `status`: the local mesh and its state."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Annotated

import grpc
import grpc.aio
import typer
from penstock.v1.generation_pb2 import SamplingParameters

from core.errors import NotFound
from services.cli import console
from services.cli.fetching import fetch_display
from services.cli.generate import make_request, stream_answer
from services.cli.how_to_call import HOW_TO_GET_A_KEY, QUESTION, how_to_call
from services.cli.options import Key, NumberFormat, SealKeysFolder
from services.cli.starting import StartDisplay
from services.cli.status import headline, status_table
from services.common.channels import open_public_channel
from services.common.identity import OPERATOR
from services.local.background import start_in_background
from services.local.background import stop as stop_mesh
from services.local.catalogue import DEFAULT_MODEL
from services.local.coordinators import Serving, open_coordinators
from services.local.fork_server import launched
from services.local.identities import authority_of, credentials_for
from services.local.layout import MeshLayout
from services.local.ports import HeldPorts
from services.local.prepare import prepare
from services.local.run_folder import MeshRecord, RunFolder, default_folder
from services.local.settings import (
    MeshSettings,
    default_keys_folder,
    parse_bytes,
    parse_counts,
    parse_factors,
)
from services.local.supervisor import Listener, supervise

FIRST_ANSWER_TOKENS = 64


def mesh(
    *,
    model: Annotated[
        str,
        typer.Option(
            envvar="PENSTOCK_MODEL",
            help="A name that `penstock models` shows, a .gguf or .bin file, a Hugging Face "
            "folder, a sealed folder, or a hub id.",
        ),
    ] = DEFAULT_MODEL,
    stages: Annotated[
        int, typer.Option(envvar="PENSTOCK_STAGES", help="How many processes share the layers.")
    ] = 2,
    replicas: Annotated[
        str,
        typer.Option(
            envvar="PENSTOCK_REPLICAS",
            help="Processes of each stage that share its sequences: 2, or 1,2 stage by stage.",
        ),
    ] = "1",
    spares: Annotated[
        str,
        typer.Option(
            envvar="PENSTOCK_SPARES",
            help="Processes of each stage that wait until one fails: 1, or 0,1 stage by stage.",
        ),
    ] = "0",
    coordinators: Annotated[
        int,
        typer.Option(
            envvar="PENSTOCK_COORDINATORS",
            help="Coordinators: one serves, the others wait until it is lost.",
        ),
    ] = 1,
    slow: Annotated[
        str | None,
        typer.Option(
            envvar="PENSTOCK_SLOW",
            help="Stages that take so many times as long, such as 1=2.0, to try out slow nodes.",
        ),
    ] = None,
    dtype: NumberFormat = "auto",
    device: Annotated[
        str,
        typer.Option(
            envvar="PENSTOCK_DEVICE",
            help="Where stages compute: cpu, cuda, or auto: a GPU where one can be used.",
        ),
    ] = "cpu",
    wire: Annotated[
        str,
        typer.Option(
            envvar="PENSTOCK_WIRE",
            help="How activations travel between stages: f32, bf16 (half the bytes), or int8 "
            "(a quarter, with the cut a part of what is computed).",
        ),
    ] = "f32",
    split: Annotated[
        str | None,
        typer.Option(
            envvar="PENSTOCK_SPLIT",
            help="Layers of each stage, such as 0:14,14:30, instead of a balanced plan.",
        ),
    ] = None,
    keys: SealKeysFolder = None,
    manifest: Annotated[
        Path | None,
        typer.Option(
            envvar="PENSTOCK_MANIFEST",
            help="A file of `penstock manifest make`: stages load no other bytes. Models of the "
            "catalogue have one.",
        ),
    ] = None,
    rehash_minutes: Annotated[
        float,
        typer.Option(
            envvar="PENSTOCK_REHASH_MINUTES",
            help="How often stages hash their weights in memory again, and stop serving where a "
            "bit has changed; 0: never.",
        ),
    ] = 10.0,
    kv_memory: Annotated[
        str | None,
        typer.Option(
            envvar="PENSTOCK_KV_MEMORY",
            help="KV cache of all stages together, such as 2GiB. Default: a quarter of the "
            "memory that is free.",
        ),
    ] = None,
    prefix_cache: Annotated[
        bool,
        typer.Option(
            envvar="PENSTOCK_PREFIX_CACHE",
            help="Computes prompts that begin alike once, as far as they do.",
        ),
    ] = True,
    speculation: Annotated[
        int,
        typer.Option(
            envvar="PENSTOCK_SPECULATION",
            help="Most tokens of a request that are guessed and verified at a time, where the "
            "pipeline has time for it; 0: none.",
        ),
    ] = 16,
    require_keys: Annotated[
        bool,
        typer.Option(
            envvar="PENSTOCK_KEYS",
            help="Answers only requests with an API key, such as `penstock keys create` makes.",
        ),
    ] = False,
    key: Key = None,
    grpc_port: Annotated[
        int,
        typer.Option(envvar="PENSTOCK_GRPC_PORT", help="Port of the public API; 0: any free one."),
    ] = 8001,
    metrics_port: Annotated[
        int,
        typer.Option(
            envvar="PENSTOCK_METRICS_PORT",
            help="Port of the gateway's metrics; those of the other processes follow. 0: any.",
        ),
    ] = 8002,
    threads: Annotated[
        int | None,
        typer.Option(
            envvar="PENSTOCK_THREADS",
            help="Threads of each stage that compute a micro-batch. Default: all stages "
            "together three quarters of the cores.",
        ),
    ] = None,
    shortcuts: Annotated[
        bool,
        typer.Option(
            envvar="PENSTOCK_SHORTCUTS",
            help="Lets the parts talk over sockets beside gRPC, since they are on one machine; "
            "without, all goes as it would between machines.",
        ),
    ] = True,
    certs: Annotated[
        str | None,
        typer.Option(
            envvar="PENSTOCK_CERTS",
            help="Has the processes prove who they are and encrypt what they say (mTLS): the "
            "folder of `penstock certs init`, or auto, which makes one for this mesh.",
        ),
    ] = None,
    detach: Annotated[
        bool,
        typer.Option(
            "--detach",
            envvar="PENSTOCK_DETACH",
            help="Leaves the mesh running in the background once it is ready.",
        ),
    ] = False,
) -> None:
    """Starts a mesh on this machine, shows a first answer, and serves until Ctrl-C."""
    run_folder = RunFolder(default_folder())
    settings = MeshSettings(
        model=model,
        stages=stages,
        replicas=parse_counts("replicas", replicas),
        spares=parse_counts("spares", spares),
        coordinators=coordinators,
        slow_down={} if slow is None else parse_factors("slow", slow),
        dtype=dtype,
        device=device,
        wire=wire,
        split=split,
        seal_keys=keys or default_keys_folder(),
        manifest=manifest,
        rehash_minutes=rehash_minutes,
        kv_memory_bytes=None if kv_memory is None else parse_bytes("kv_memory", kv_memory),
        prefix_cache=prefix_cache,
        speculation=speculation,
        require_keys=require_keys,
        grpc_port=grpc_port,
        metrics_port=metrics_port,
        threads=threads,
        shortcuts=shortcuts,
        certs=run_folder.path / "certs" if certs == "auto" else Path(certs) if certs else None,
        makes_certs=certs == "auto",
    )
    run_folder.refuse_if_claimed()
    with HeldPorts() as ports:
        with fetch_display() as report:
            layout = prepare(settings, ports=ports, report=report)
        asyncio.run(_start(layout, run_folder=run_folder, key=key or None, detach=detach))


def stop() -> None:
    """Ends the running mesh."""
    record = stop_mesh(RunFolder(default_folder()))
    if record is None:
        console.say("no mesh is running")
    else:
        console.say(f"stopped {record.model} at {record.gateway}")


def status() -> None:
    """Shows the running mesh: its stages, their layers, health, memory and load."""
    record = RunFolder(default_folder()).running()
    if record is None:
        raise NotFound("no mesh is running: start one with `make mesh`")
    serving = asyncio.run(_ask_mesh(record))
    console.say(headline(record, serving))
    console.out.print(status_table(record, serving.mesh))


async def _start(
    layout: MeshLayout, *, run_folder: RunFolder, key: str | None, detach: bool
) -> None:
    address, ca = layout.gateway_address, authority_of(layout.certs)
    with StartDisplay(layout) as display:

        async def ready() -> None:
            display.__exit__()
            console.say(f"{layout.model_name} is ready after {display.seconds:.1f} s\n")
            if layout.require_keys and key is None:
                console.say(HOW_TO_GET_A_KEY)
            else:
                await _show_first_answer(address, ca=ca, key=key)
            console.say(how_to_call(address, ca=ca))
            ending = "`make stop` ends it" if detach else "Ctrl-C ends it"
            console.say(f"Serving at {address}; logs in {run_folder.path}; {ending}")

        listener = Listener(progress=display.update, ready=ready, say=_say)
        if detach:
            await start_in_background(
                layout, run_folder=run_folder, listener=listener, fork_server=launched()
            )
        else:
            await supervise(
                layout, run_folder=run_folder, listener=listener, fork_server=launched()
            )


def _say(line: str) -> None:
    console.say(line, to=console.err)


async def _show_first_answer(address: str, *, ca: Path | None, key: str | None) -> None:
    """Asks a first question through the public API; a failure is shown and ends nothing."""
    channel = open_public_channel(address, ca=ca)
    sampling = SamplingParameters(max_tokens=FIRST_ANSWER_TOKENS, temperature=0)
    console.say(f"> {QUESTION}", style="bold")
    try:
        request = await make_request(
            channel, QUESTION, model="", system=None, raw=False, sampling=sampling, key=key
        )
        await stream_answer(channel, request, write=_write, key=key)
        console.say("\n")
    except grpc.RpcError as error:
        console.show_error(console.describe_rpc_error(error))
    finally:
        await channel.close()


def _write(text: str) -> None:
    console.out.out(text, end="")
    console.out.file.flush()


async def _ask_mesh(record: MeshRecord) -> Serving:
    credentials = credentials_for(record.certs, OPERATOR)
    async with open_coordinators(record.coordinators, credentials=credentials) as coordinators:
        return await coordinators.serving()
