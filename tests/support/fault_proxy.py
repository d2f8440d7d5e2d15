"""A TCP proxy whose wire can be made bad, at any time, and good again.

What goes wrong by chance is fixed by the seed, the number of the connection and the position in
its bytes, never by how the bytes were cut into packets.
"""

from __future__ import annotations

import asyncio
import random
import socket
import struct
import time
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import Any, NamedTuple

_CHUNK_BYTES = 64 * 1024
# A wire holds little: a writer feels it when its bytes do not arrive.
_CHUNKS_ON_THE_WIRE = 16
# Where the call that a connection is made for is named.
_BEGINNING_BYTES = 4096
# uvloop counts whole milliseconds, and rounds to them: it may wake that much too soon.
_COARSENESS_S = 0.002
_RESET_ON_CLOSE = struct.pack("ii", 1, 0)


@dataclass(frozen=True, kw_only=True)
class Faults:
    """What is wrong with the wire, in both directions; by default nothing."""

    delay_s: float = 0.0
    """What every byte takes longer."""
    bytes_per_s: float | None = None
    """Bandwidth of each direction of each connection."""
    stalls: bool = False
    """Half-open: connections are taken and stand, and nothing comes through, no end either ..."""
    stalls_calls: bytes = b""
    """... where not empty, only on connections that have sent this to the target."""
    refuses: bool = False
    """A partition: new connections are reset. `cut` ends those that stand."""
    corrupts_every_bytes: float | None = None
    """Mean distance of bytes whose bits are all turned ..."""
    corrupts_calls: bytes = b""
    """... where not empty, only in what a connection sends to the target after it sent this."""
    loses_every_bytes: float | None = None
    """Mean distance of packets that are sent again, which holds up all behind them ..."""
    resend_s: float = 0.2
    """... for so long."""


class FaultProxy:
    """Listens on the loopback interface and forwards to one address."""

    def __init__(self, target: str, *, seed: int = 0) -> None:
        """`target`: host:port."""
        host, _, port = target.rpartition(":")
        self._host, self._port = host, int(port)
        self._seed = seed
        self._faults = Faults()
        self._flows = asyncio.Event()
        self._flows.set()
        self._open: dict[asyncio.Task[None], list[asyncio.StreamWriter]] = {}
        self._num_connections = 0
        self._server: asyncio.Server | None = None
        self.address = ""  # host:port, once it has started

    @property
    def faults(self) -> Faults:
        """What is wrong now. What is set holds at once, for bytes under way too."""
        return self._faults

    @faults.setter
    def faults(self, faults: Faults) -> None:
        self._faults = faults
        if faults.stalls:
            self._flows.clear()
        else:
            self._flows.set()

    async def __aenter__(self) -> FaultProxy:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.address = f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *_: object) -> None:
        """Idempotent."""
        assert self._server is not None
        self._server.close()
        tasks = list(self._open)
        self.cut()
        await asyncio.gather(*tasks, return_exceptions=True)

    def cut(self) -> None:
        """Resets every connection that stands; both ends learn of it at once."""
        for task, writers in self._open.items():
            for writer in writers:
                _reset(writer)
            task.cancel()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._num_connections += 1
        number = self._num_connections
        self._open[task] = [writer]
        try:
            if self._faults.refuses:
                raise ConnectionRefusedError
            far_reader, far_writer = await asyncio.open_connection(self._host, self._port)
            self._open[task].append(far_writer)
            there = _Direction(f"{number} there", calls=bytearray())
            back = _Direction(f"{number} back", calls=there.calls, is_back=True)
            await _first_of(
                self._forward(reader, far_writer, there), self._forward(far_reader, writer, back)
            )
            far_writer.close()
            writer.close()
        except (OSError, asyncio.CancelledError):
            # Cancelled by `cut` alone; asyncio takes a cancelled handler for a failed one.
            for one in self._open[task]:
                _reset(one)
        finally:
            del self._open[task]

    async def _forward(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        direction: _Direction,
    ) -> None:
        """Ends with the stream; raises ConnectionError where that breaks."""
        wire: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(_CHUNKS_ON_THE_WIRE)
        sending = asyncio.create_task(self._send(wire, reader))
        try:
            await self._receive(wire, writer, direction)
        finally:
            sending.cancel()

    async def _send(
        self, wire: asyncio.Queue[tuple[float, bytes]], reader: asyncio.StreamReader
    ) -> None:
        data = b"more"
        while data:
            try:
                data = await reader.read(_CHUNK_BYTES)
            except ConnectionError:
                data = b""
            await wire.put((time.monotonic(), data))

    async def _receive(
        self,
        wire: asyncio.Queue[tuple[float, bytes]],
        writer: asyncio.StreamWriter,
        direction: _Direction,
    ) -> None:
        seed, calls = f"{self._seed} {direction.name}", direction.calls
        corrupted, lost = _Events(f"{seed} corrupted"), _Events(f"{seed} lost")
        while True:
            sent_s, data = await wire.get()
            faults = self._faults
            await _until(sent_s + faults.delay_s)
            if lost.within(len(data), every=faults.loses_every_bytes):
                await _until(time.monotonic() + faults.resend_s)
            if faults.bytes_per_s is not None:
                await _until(time.monotonic() + len(data) / faults.bytes_per_s)
            if not direction.is_back and len(calls) < _BEGINNING_BYTES:
                calls += data
            while self._faults.stalls and self._faults.stalls_calls in calls:
                await self._flows.wait()
            if not data:
                return
            every = faults.corrupts_every_bytes
            if faults.corrupts_calls and (direction.is_back or faults.corrupts_calls not in calls):
                every = None
            damaged = bytearray(data)
            for index in corrupted.within(len(data), every=every):
                damaged[index] ^= 0xFF
            if writer.is_closing():  # uvloop takes a write to it for a mistake of ours
                raise ConnectionResetError
            writer.write(damaged)
            await writer.drain()


async def _until(due_s: float) -> None:
    """Sleeps until `time.monotonic()` says so, and never wakes before."""
    left_s = due_s - time.monotonic()
    await asyncio.sleep(left_s + _COARSENESS_S if left_s > 0.0 else 0.0)


class _Direction(NamedTuple):
    """One way of a connection. `calls`: the beginning of what goes to the target."""

    name: str
    calls: bytearray
    is_back: bool = False


class _Events:
    """Positions in a stream of bytes where something happens, at random distances."""

    def __init__(self, seed: str) -> None:
        self._random = random.Random(seed)
        self._left: float | None = None

    def within(self, num_bytes: int, *, every: float | None) -> list[int]:
        """Those among the next bytes, counted from the first of these."""
        if every is None:
            return []
        if self._left is None:
            self._left = self._random.expovariate(1 / every)
        found = []
        while self._left < num_bytes:
            found.append(int(self._left))
            self._left += 1 + self._random.expovariate(1 / every)
        self._left -= num_bytes
        return found


async def _first_of(*works: Coroutine[Any, Any, None]) -> None:
    """Waits for the first to end and cancels the others; raises what it raised."""
    tasks = [asyncio.create_task(work) for work in works]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _reset(writer: asyncio.StreamWriter) -> None:
    """Closes a connection so that the peer gets RST instead of an orderly end."""
    connection = writer.get_extra_info("socket")
    if connection is not None and connection.fileno() >= 0:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
    writer.transport.abort()
