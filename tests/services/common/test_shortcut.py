"""Messages over a socket within one host: in order, whole, from any thread, until an end."""

from __future__ import annotations

import asyncio
import socket
import tempfile
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from core.errors import MalformedMessage, ProtocolViolation, Unavailable
from services.common.channels import MAX_MESSAGE_BYTES
from services.common.shortcut import MAX_UNSENT_BYTES, Door, Shortcut, enter

TIMEOUT_S = 30.0


@dataclass
class End:
    """One end of a shortcut, and what it heard."""

    messages: asyncio.Queue[bytes] = field(default_factory=asyncio.Queue)
    error: asyncio.Future[Exception] = field(
        default_factory=lambda: asyncio.get_running_loop().create_future()
    )
    shortcut: Shortcut = field(init=False)

    def take(self, connection: socket.socket) -> None:
        self.shortcut = Shortcut(
            connection, on_message=self.messages.put_nowait, on_end=self.error.set_result
        )

    async def next(self) -> bytes:
        async with asyncio.timeout(TIMEOUT_S):
            return await self.messages.get()


@asynccontextmanager
async def two_ends() -> AsyncIterator[tuple[End, End]]:
    ends = End(), End()
    for end, connection in zip(ends, socket.socketpair(), strict=True):
        end.take(connection)
    try:
        yield ends
    finally:
        for end in ends:
            end.shortcut.close()


async def test_messages_arrive_whole_and_in_order_whatever_their_size() -> None:
    messages = [b"", b"a", b"b" * 300_000, b"c" * MAX_MESSAGE_BYTES, b"d"] * 3
    async with two_ends() as (one, other):
        for message in messages:
            one.shortcut.send(message)
        assert [await other.next() for _ in messages] == messages
        other.shortcut.send(b"back")
        assert await one.next() == b"back"


async def test_several_threads_may_send_at_once() -> None:
    async with two_ends() as (one, other):
        threads = [
            threading.Thread(
                target=lambda text: [one.shortcut.send(text * 50_000) for _ in range(20)],
                args=(text,),
            )
            for text in (b"x", b"y", b"z")
        ]
        for thread in threads:
            thread.start()
        received = [await other.next() for _ in range(60)]
        for thread in threads:
            await asyncio.to_thread(thread.join)
    assert sorted(received) == [text * 50_000 for text in (b"x", b"y", b"z") for _ in range(20)]


async def test_an_end_hears_that_its_peer_is_gone() -> None:
    async with two_ends() as (one, other):
        one.shortcut.send(b"last")
        one.shortcut.close()
        assert await other.next() == b"last"
        async with asyncio.timeout(TIMEOUT_S):
            assert isinstance(await other.error, Unavailable)
        other.shortcut.send(b"dropped")
        assert not one.error.done()


async def test_what_a_message_raises_ends_the_conversation() -> None:
    heard: list[Exception] = []

    def refuse(message: bytes) -> None:
        raise ProtocolViolation(f"not {message!r}")

    left, right = socket.socketpair()
    shortcut = Shortcut(left, on_message=refuse, on_end=heard.append)
    other = End()
    other.take(right)
    other.shortcut.send(b"this")
    async with asyncio.timeout(TIMEOUT_S):
        await other.error
    other.shortcut.close()
    shortcut.close()
    assert [str(error) for error in heard] == ["not b'this'"]


async def test_a_length_beyond_the_limit_is_refused() -> None:
    left, right = socket.socketpair()
    end = End()
    end.take(left)
    with right:
        right.sendall((MAX_MESSAGE_BYTES + 1).to_bytes(4, "little"))
        async with asyncio.timeout(TIMEOUT_S):
            assert isinstance(await end.error, MalformedMessage)


async def test_a_peer_that_never_reads_is_unavailable() -> None:
    left, right = socket.socketpair()
    end = End()
    end.take(left)

    def send_far_too_much() -> None:
        for _ in range(2 * MAX_UNSENT_BYTES // MAX_MESSAGE_BYTES):
            end.shortcut.send(bytes(MAX_MESSAGE_BYTES))

    with right, pytest.raises(Unavailable, match="unread"):
        send_far_too_much()
    end.shortcut.close()


async def test_a_door_lets_one_peer_in_and_leaves_nothing_behind() -> None:
    entered: asyncio.Queue[socket.socket] = asyncio.Queue()
    door = Door(entered.put_nowait)
    assert Path(door.address).parent.stat().st_mode & 0o077 == 0
    connection = enter(door.address, door.token)
    assert connection is not None
    async with asyncio.timeout(TIMEOUT_S):
        inside = await entered.get()
    inside.close()
    connection.close()
    assert not Path(door.address).parent.exists()
    assert enter(door.address, door.token) is None


async def test_what_comes_behind_the_token_is_for_the_conversation() -> None:
    end = End()
    door = Door(end.take)
    connection = enter(door.address, door.token)
    assert connection is not None
    with connection:
        connection.sendall((5).to_bytes(4, "little") + b"hello")
        assert await end.next() == b"hello"
    end.shortcut.close()


async def test_who_does_not_know_the_token_is_turned_away_and_the_peer_still_enters() -> None:
    entered: asyncio.Queue[socket.socket] = asyncio.Queue()
    door = Door(entered.put_nowait)
    stranger, silent = enter(door.address, bytes(32)), enter(door.address, b"")
    assert stranger is not None
    assert silent is not None
    with stranger, silent:
        assert await _has_been_closed(stranger)
        assert entered.empty()
        peer = enter(door.address, door.token)
        assert peer is not None
        async with asyncio.timeout(TIMEOUT_S):
            inside = await entered.get()
        assert await _has_been_closed(silent)
        with peer, inside:
            inside.sendall(b"welcome")
            assert await asyncio.get_running_loop().sock_recv(peer, 7) == b"welcome"


async def test_strangers_who_wait_at_a_door_are_few() -> None:
    door = Door(lambda connection: connection.close())
    silent = [enter(door.address, b"") for _ in range(5)]
    others = [one for one in silent if one is not None]
    assert len(others) == 5
    assert await _has_been_closed(others[-1])
    door.close()
    for one in others:
        assert await _has_been_closed(one)
        one.close()


async def _has_been_closed(connection: socket.socket) -> bool:
    async with asyncio.timeout(TIMEOUT_S):
        return await asyncio.get_running_loop().sock_recv(connection, 1) == b""


async def test_without_a_usable_folder_there_is_no_door(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / ("long" * 30)
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    door = Door(lambda connection: connection.close())
    assert door.address == ""
    assert not list(folder.iterdir())
    door.close()


async def test_a_door_that_is_closed_lets_nobody_in() -> None:
    door = Door(lambda connection: connection.close())
    door.close()
    assert enter(door.address, door.token) is None
    assert enter("", b"") is None
