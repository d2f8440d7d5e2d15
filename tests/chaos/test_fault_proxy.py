"""The proxy that makes wires bad: each fault does what it says, and can be taken back."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import pytest

from tests.support.fault_proxy import FaultProxy, Faults

DEADLINE_S = 20.0
TEXT = bytes(range(256)) * 40


@dataclass
class Echo:
    """A connection through a proxy to a server that sends back what it gets."""

    proxy: FaultProxy
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    async def send(self, data: bytes) -> bytes:
        """What comes back for it."""
        self.writer.write(data)
        return await asyncio.wait_for(self.reader.readexactly(len(data)), DEADLINE_S)


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while data := await reader.read(1000):
            writer.write(data)
        writer.close()
    except ConnectionError:
        writer.transport.abort()


@asynccontextmanager
async def echo_behind_a_proxy(*, seed: int = 0) -> AsyncIterator[Echo]:
    server = await asyncio.start_server(echo, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    try:
        async with FaultProxy(f"127.0.0.1:{port}", seed=seed) as proxy:
            reader, writer = await connect(proxy)
            try:
                yield Echo(proxy, reader, writer)
            finally:
                writer.transport.abort()
    finally:
        server.close()  # with one left open, uvloop does not come to an end


async def connect(proxy: FaultProxy) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    host, port = proxy.address.split(":")
    return await asyncio.open_connection(host, int(port))


async def test_a_good_wire_changes_nothing() -> None:
    async with echo_behind_a_proxy() as wire:
        assert await wire.send(TEXT) == TEXT
        wire.writer.write_eof()
        assert await asyncio.wait_for(wire.reader.read(), DEADLINE_S) == b""


async def test_a_delay_holds_every_byte_up_in_both_directions() -> None:
    async with echo_behind_a_proxy() as wire:
        wire.proxy.faults = Faults(delay_s=0.1)
        began_s = time.monotonic()
        assert await wire.send(TEXT) == TEXT
        assert time.monotonic() - began_s >= 0.2


async def test_little_bandwidth_takes_time() -> None:
    async with echo_behind_a_proxy() as wire:
        wire.proxy.faults = Faults(bytes_per_s=10 * len(TEXT))
        began_s = time.monotonic()
        assert await wire.send(TEXT) == TEXT
        assert time.monotonic() - began_s >= 0.1


async def test_a_stalled_wire_takes_connections_and_gives_nothing_until_it_flows_again() -> None:
    async with echo_behind_a_proxy() as wire:
        wire.proxy.faults = Faults(stalls=True)
        waiting = [asyncio.create_task(wire.send(TEXT))]
        reader, writer = await connect(wire.proxy)
        waiting.append(asyncio.create_task(Echo(wire.proxy, reader, writer).send(b"hello")))
        done, _ = await asyncio.wait(waiting, timeout=0.2)
        assert not done
        wire.proxy.faults = Faults()
        assert await asyncio.gather(*waiting) == [TEXT, b"hello"]
        writer.transport.abort()


@pytest.mark.parametrize("stalls", [False, True])
async def test_a_cut_resets_both_ends(stalls: bool) -> None:
    async with echo_behind_a_proxy() as wire:
        await wire.send(b"hello")
        wire.proxy.faults = Faults(stalls=stalls)
        wire.proxy.cut()
        with pytest.raises(ConnectionResetError):
            await asyncio.wait_for(wire.reader.read(), DEADLINE_S)


async def test_a_partition_refuses_new_connections_until_it_heals() -> None:
    async with echo_behind_a_proxy() as wire:
        wire.proxy.faults = Faults(refuses=True)
        reader, _ = await connect(wire.proxy)
        with pytest.raises(ConnectionResetError):
            await asyncio.wait_for(reader.read(), DEADLINE_S)
        wire.proxy.faults = Faults()
        reader, writer = await connect(wire.proxy)
        assert await Echo(wire.proxy, reader, writer).send(b"hello") == b"hello"
        writer.transport.abort()


async def corrupted(*, seed: int, chunk_bytes: int) -> list[int]:
    """Positions of the bytes that come back wrong."""
    came = b""
    async with echo_behind_a_proxy(seed=seed) as wire:
        wire.proxy.faults = Faults(corrupts_every_bytes=2000.0)
        for begin in range(0, len(TEXT), chunk_bytes):
            came += await wire.send(TEXT[begin : begin + chunk_bytes])
    return [index for index, byte in enumerate(came) if byte != TEXT[index]]


async def test_corruption_depends_on_the_seed_and_not_on_the_packets() -> None:
    found = await corrupted(seed=1, chunk_bytes=100)
    assert found
    assert found == await corrupted(seed=1, chunk_bytes=3000)
    assert found != await corrupted(seed=2, chunk_bytes=100)


async def test_lost_packets_hold_up_what_is_behind_them_and_come_at_last() -> None:
    async with echo_behind_a_proxy() as wire:
        wire.proxy.faults = Faults(loses_every_bytes=len(TEXT) / 20, resend_s=0.1)
        began_s = time.monotonic()
        assert await wire.send(TEXT) == TEXT
        assert time.monotonic() - began_s >= 0.1


async def test_where_nobody_listens_connections_are_reset() -> None:
    async with FaultProxy("127.0.0.1:1") as proxy:
        reader, _ = await connect(proxy)
        with pytest.raises(ConnectionResetError):
            await asyncio.wait_for(reader.read(), DEADLINE_S)


async def test_corruption_can_be_of_certain_calls_alone() -> None:
    async with echo_behind_a_proxy() as wire:
        wire.proxy.faults = Faults(corrupts_every_bytes=2.0, corrupts_calls=b"/Activate")
        assert await wire.send(b"a call of /Control") == b"a call of /Control"
        reader, writer = await connect(wire.proxy)
        other = Echo(wire.proxy, reader, writer)
        assert await other.send(b"a call of /Activate and more") != b"a call of /Activate and more"
        writer.transport.abort()


async def test_a_stall_can_be_of_certain_calls_alone() -> None:
    async with echo_behind_a_proxy() as wire:
        assert await wire.send(b"a call of /Control") == b"a call of /Control"
        reader, writer = await connect(wire.proxy)
        other = Echo(wire.proxy, reader, writer)
        assert await other.send(b"a call of /Activate") == b"a call of /Activate"
        wire.proxy.faults = Faults(stalls=True, stalls_calls=b"/Activate")
        waiting = asyncio.create_task(other.send(b"more"))
        assert await wire.send(TEXT) == TEXT
        assert not waiting.done()
        wire.proxy.faults = Faults()
        assert await waiting == b"more"
        writer.transport.abort()
