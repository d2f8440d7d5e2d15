"""`penstock generate` and `tokenize`: requests to a running mesh."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Annotated, TypeVar

import grpc
import grpc.aio
import typer
from penstock.v1 import generation_pb2 as pb
from penstock.v1.generation_pb2_grpc import GenerationServiceStub

from core.errors import InvalidInput, Unavailable
from services.cli import console
from services.cli.generate import CONNECT_TIMEOUT_S, describe_usage, make_request, stream_answer
from services.cli.options import Key
from services.common.channels import open_public_channel
from services.common.keys import as_metadata
from services.local.identities import authority_of
from services.local.run_folder import RunFolder, default_folder

DEFAULT_ADDRESS = "127.0.0.1:8001"
# The widths of the fields of SamplingParameters.
MAX_UINT32, MAX_UINT64 = 2**32 - 1, 2**64 - 1

Result = TypeVar("Result")

Address = Annotated[
    str | None,
    typer.Option(
        envvar="PENSTOCK_ADDRESS",
        help=f"host:port of a mesh. Default: the local one, else {DEFAULT_ADDRESS}.",
    ),
]
Authorities = Annotated[
    Path | None,
    typer.Option(
        envvar="PENSTOCK_CA",
        help="PEM file of authorities, for a mesh with TLS. Default: that of the local mesh.",
    ),
]
ModelName = Annotated[
    str, typer.Option("--model", help="Name of the model, where the mesh serves several.")
]
Prompt = Annotated[str, typer.Argument(help="The question, or with --raw the text to continue.")]


def generate(
    prompt: Prompt,
    *,
    raw: Annotated[
        bool,
        typer.Option(
            "--raw", envvar="PENSTOCK_RAW", help="Continues the text as it is: no chat template."
        ),
    ] = False,
    system: Annotated[str | None, typer.Option(help="System message of the chat.")] = None,
    max_tokens: Annotated[
        int | None,
        typer.Option(
            envvar="PENSTOCK_MAX_TOKENS", min=0, max=MAX_UINT32, help="Most tokens to generate."
        ),
    ] = None,
    temperature: Annotated[
        float,
        typer.Option(
            envvar="PENSTOCK_TEMPERATURE",
            help="0 is greedy: always the likeliest token. Above 0 tokens are drawn, and top-k, "
            "top-p, min-p and seed count. (A request through the API that says nothing has 1.)",
        ),
    ] = 0.0,
    top_k: Annotated[
        int | None,
        typer.Option(
            envvar="PENSTOCK_TOP_K", min=0, max=MAX_UINT32, help="Keeps the k likeliest tokens."
        ),
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(envvar="PENSTOCK_TOP_P", help="Keeps the likeliest tokens that sum to this."),
    ] = None,
    min_p: Annotated[
        float | None,
        typer.Option(
            envvar="PENSTOCK_MIN_P", help="Keeps tokens this likely, relative to the likeliest."
        ),
    ] = None,
    repetition_penalty: Annotated[
        float | None, typer.Option(help="Makes tokens of prompt and answer less likely.")
    ] = None,
    presence_penalty: Annotated[
        float | None, typer.Option(help="Subtracted once from tokens already generated.")
    ] = None,
    frequency_penalty: Annotated[
        float | None, typer.Option(help="Subtracted for each time a token was generated.")
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(
            envvar="PENSTOCK_SEED", min=0, max=MAX_UINT64, help="Equal seeds give equal answers."
        ),
    ] = None,
    stop: Annotated[
        list[str] | None, typer.Option(help="Ends before this string; may be given again.")
    ] = None,
    stop_token_id: Annotated[
        list[int] | None,
        typer.Option(min=0, max=MAX_UINT32, help="Ends at this token; may be given again."),
    ] = None,
    ignore_eos: Annotated[
        bool, typer.Option("--ignore-eos", help="Goes on past the end-of-sequence token.")
    ] = False,
    timeout: Annotated[
        float | None, typer.Option(help="Seconds until the mesh must have answered.")
    ] = None,
    model: ModelName = "",
    address: Address = None,
    ca: Authorities = None,
    key: Key = None,
    usage: Annotated[
        bool,
        typer.Option(
            "--usage", envvar="PENSTOCK_USAGE", help="Prints finish reason and usage to stderr."
        ),
    ] = False,
) -> None:
    """Streams an answer of a running mesh to stdout."""
    if not prompt:
        raise InvalidInput("prompt", prompt, 'some text, such as PROMPT="Name three rivers."')
    sampling = pb.SamplingParameters(
        max_tokens=max_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
        seed=seed,
        stop=stop or [],
        stop_token_ids=stop_token_id or [],
        ignore_eos=ignore_eos or None,
    )

    async def ask(channel: grpc.aio.Channel) -> pb.GenerateResponse:
        request = await make_request(
            channel, prompt, model=model, system=system, raw=raw, sampling=sampling, key=key or None
        )
        return await stream_answer(
            channel, request, write=write_answer, key=key or None, timeout_s=timeout
        )

    last = with_channel(address, ask, ca=ca)
    console.say()
    if usage:
        console.say(describe_usage(last), to=console.err)


def tokenize(
    text: Prompt,
    *,
    model: ModelName = "",
    address: Address = None,
    ca: Authorities = None,
    key: Key = None,
) -> None:
    """Prints the token ids of a text, as the mesh sees them."""

    async def ask(channel: grpc.aio.Channel) -> pb.TokenizeResponse:
        request = pb.TokenizeRequest(model=model, prompt=text)
        stub = GenerationServiceStub(channel)
        return await stub.Tokenize(
            request, timeout=CONNECT_TIMEOUT_S, metadata=as_metadata(key or None)
        )

    console.say(" ".join(map(str, with_channel(address, ask, ca=ca).token_ids)))


def write_answer(text: str) -> None:
    """Writes a piece of text at once, unchanged."""
    console.out.file.write(text)
    console.out.file.flush()


def with_channel(
    address: str | None,
    ask: Callable[[grpc.aio.Channel], Awaitable[Result]],
    *,
    ca: Path | None = None,
) -> Result:
    """Runs `ask` with a channel to the mesh; Ctrl-C cancels what it waits for.

    Raises Unavailable where no address was given and this machine has no mesh.
    """
    record = RunFolder(default_folder()).running()
    found = address or (record.gateway if record is not None else None)
    if ca is None and record is not None and found == record.gateway:
        ca = authority_of(record.certs)

    async def run() -> Result:
        channel = open_public_channel(found or DEFAULT_ADDRESS, ca=ca)
        try:
            return await ask(channel)
        except grpc.aio.AioRpcError as error:
            if found is None and error.code() is grpc.StatusCode.UNAVAILABLE:
                raise Unavailable(
                    f"no mesh runs here, and none answers at {DEFAULT_ADDRESS}: start one with "
                    "`make mesh`"
                ) from error
            raise
        finally:
            await channel.close()

    return asyncio.run(run())
