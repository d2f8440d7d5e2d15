"""Two gateways behind one address: when one dies, new requests go on through the other."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Sequence
from contextlib import AsyncExitStack
from pathlib import Path

import grpc
from penstock.v1 import generation_pb2 as pb

from services.common.channels import open_channel
from tests.chaos.mesh import ChaosMesh, Shape
from tests.chaos.streams import Outcome, follow
from tests.support.envoy import envoy_before

REQUEST = pb.GenerateRequest(
    token_ids=[1, 2, 3],
    sampling=pb.SamplingParameters(max_tokens=400, temperature=0, ignore_eos=True),
)


async def test_when_a_gateway_dies_its_clients_learn_it_and_new_requests_go_on(
    tiny_model: Path, tmp_path: Path
) -> None:
    shape = Shape(models=(tiny_model,), num_gateways=2)
    async with ChaosMesh(shape, folder=tmp_path) as mesh, AsyncExitStack() as stack:
        gateways = [mesh.parts[name].command.address for name in mesh.gateway_names]
        address = await stack.enter_async_context(envoy_before(gateways))
        clients = [await stack.enter_async_context(open_channel(address)) for _ in range(8)]
        usual = await follow(clients[0], REQUEST)
        outcomes = await follow_until_a_gateway_dies(mesh, clients)
        after = await asyncio.gather(*(follow(client, REQUEST) for client in clients))
    assert usual.error is None
    assert {outcome.error for outcome in outcomes} == {None, grpc.StatusCode.UNAVAILABLE}
    assert [outcome.error for outcome in after] == [None] * len(clients)
    assert all(outcome.agrees_with(usual) for outcome in [*outcomes, *after])


async def follow_until_a_gateway_dies(
    mesh: ChaosMesh, clients: Sequence[grpc.aio.Channel]
) -> list[Outcome]:
    """A stream of each client, all of which have begun when a gateway is killed."""
    begun = [asyncio.Event() for _ in clients]
    following = [
        asyncio.create_task(follow(client, REQUEST, on_tokens=lambda _, event=event: event.set()))
        for client, event in zip(clients, begun, strict=True)
    ]
    for event in begun:
        await event.wait()
    mesh.parts["gateway-0"].signal(signal.SIGKILL)
    return await asyncio.gather(*following)
