"""`python -m tests.benchmarks`: measures a mesh under closed-loop and open-loop load.

Closed loop: S clients, each sends its next request when the one before has ended: 16 to 64
random prompt tokens, 128 new tokens, greedy, end-of-sequence ignored; then prompts of 1,024
tokens with one new token each. Open loop: arrivals and lengths of a real trace, first with as
many clients as saturate the mesh to find its rate, then in the trace's own pattern at a share
of that rate.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
import uvloop

from services.cli.console import out as console
from services.cli.console import say
from tests.benchmarks.machine import machine
from tests.benchmarks.measurements import Plan, measure
from tests.benchmarks.report import Figures, latency_table, memory_line, process_table
from tests.benchmarks.systems import System, started_mesh


def main(
    streams: Annotated[
        str, typer.Option(envvar="PENSTOCK_STREAMS", help="Numbers of clients, such as '1 64'.")
    ] = "1 8 32 64 128 256",
    seconds: Annotated[
        float, typer.Option(envvar="PENSTOCK_SECONDS", help="Length of each measurement.")
    ] = 20.0,
    requests: Annotated[
        int | None,
        typer.Option(envvar="PENSTOCK_REQUESTS", help="Ends each after so many requests instead."),
    ] = None,
    open_loop_seconds: Annotated[
        float, typer.Option(help="Length of the trace's replay; 0 leaves it out.")
    ] = 60.0,
    one_call: Annotated[
        bool,
        typer.Option(envvar="PENSTOCK_ONE_CALL", help="GenerateMany, not a call for each request."),
    ] = False,
    address: Annotated[
        str | None,
        typer.Option(envvar="PENSTOCK_ADDRESS", help="A running mesh; by default one is started."),
    ] = None,
    json_path: Annotated[
        Path | None, typer.Option("--json", envvar="PENSTOCK_JSON", help="Where to write JSON.")
    ] = None,
    model: Annotated[str | None, typer.Option(envvar="PENSTOCK_MODEL")] = None,
    stages: Annotated[str | None, typer.Option(envvar="PENSTOCK_STAGES")] = None,
    dtype: Annotated[str | None, typer.Option(envvar="PENSTOCK_DTYPE")] = None,
    device: Annotated[str | None, typer.Option(envvar="PENSTOCK_DEVICE")] = None,
    threads: Annotated[str | None, typer.Option(envvar="PENSTOCK_THREADS")] = None,
    kv_memory: Annotated[str | None, typer.Option(envvar="PENSTOCK_KV_MEMORY")] = None,
    split: Annotated[str | None, typer.Option(envvar="PENSTOCK_SPLIT")] = None,
    speculation: Annotated[str | None, typer.Option(envvar="PENSTOCK_SPECULATION")] = None,
    certs: Annotated[
        str | None, typer.Option(envvar="PENSTOCK_CERTS", help="Of `penstock mesh`: auto.")
    ] = None,
    shortcuts: Annotated[
        bool, typer.Option(envvar="PENSTOCK_SHORTCUTS", help="Of `penstock mesh`.")
    ] = True,
    ca: Annotated[
        Path | None, typer.Option(envvar="PENSTOCK_CA", help="Of the mesh at that address.")
    ] = None,
    prefix_cache: Annotated[
        bool,
        typer.Option(
            envvar="PENSTOCK_PREFIX_CACHE",
            help="It changes little here: no two prompts of the loads begin alike.",
        ),
    ] = True,
) -> None:
    """Measures and prints a table."""
    plan = Plan(
        streams=tuple(int(count) for count in streams.split()),
        seconds=seconds,
        requests=requests,
        open_loop_seconds=open_loop_seconds,
        one_call=one_call,
    )
    chosen = {"--model": model, "--stages": stages, "--dtype": dtype, "--split": split}
    chosen |= {"--device": device, "--threads": threads, "--kv-memory": kv_memory}
    chosen |= {"--speculation": speculation, "--certs": certs}
    options = [part for name, value in chosen.items() if value for part in (name, value)]
    options.append("--prefix-cache" if prefix_cache else "--no-prefix-cache")
    options.append("--shortcuts" if shortcuts else "--no-shortcuts")
    running = (
        nullcontext(System(name="penstock", address=address, ca=ca))
        if address
        else started_mesh(options)
    )
    with running as system:
        if system.start_s is not None:
            say(f"from the command to the first token: {system.start_s:.2f} s")
        number_format, figures = uvloop.run(measure(system, plan, say=say))
    show(figures, number_format)
    if json_path is not None:
        json_path.write_text(
            json.dumps(document(system, plan, options, number_format, figures), indent=1) + "\n"
        )
    if any(row.num_errors for row in figures):
        raise typer.Exit(code=1)


def show(figures: Sequence[Figures], number_format: str) -> None:
    """Prints everything."""
    say()
    console.print(latency_table(figures, number_format))
    if figures[0].peak_memory_bytes:
        console.print(process_table(figures))
        say(memory_line(figures[-1]))
    for error in sorted({error for row in figures for error in row.errors}):
        say(f"error: {error}")


def document(
    system: System,
    plan: Plan,
    options: Sequence[str],
    number_format: str,
    figures: Sequence[Figures],
) -> dict[str, object]:
    """What goes into the JSON file."""
    return {
        "system": system.name,
        "options": list(options),
        "number_format": number_format,
        "plan": asdict(plan),
        "machine": machine(),
        "start_to_first_token_s": system.start_s,
        "figures": [asdict(row) for row in figures],
    }


if __name__ == "__main__":
    typer.run(main)
