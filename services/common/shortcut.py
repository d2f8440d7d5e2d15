"""A shortcut beside a gRPC stream: its messages over a Unix-domain socket, within one host.

A message over gRPC wakes four threads on its way in and copies itself through HTTP/2; over a
socket that the event loop itself reads it wakes one, and any thread may send. The stream stays:
it opens and ends the conversation, tells errors, and finds peers that have gone. Whoever serves
the stream offers a door in a folder that only its own user can enter; the peer tries it, and
where it finds nothing (another host, another system) all goes over the stream.

The socket has no certificates, and needs none: it never leaves the kernel of one host, each end
makes sure that the other is a process of its own user, and whoever enters must first say a random
token that only the stream has carried. So it is the peer that the stream's certificate (where there
are such) has shown who is let in, and no other process of the user, another stage of the mesh say.

Each message stands behind its length, four bytes, little endian.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import shutil
import socket
import struct
import tempfile
import threading
from collections import deque
from collections.abc import Callable
from hmac import compare_digest
from pathlib import Path
from typing import TypeVar

from google.protobuf.message import DecodeError, Message

from core.errors import MalformedMessage, Unavailable
from services.common.channels import MAX_MESSAGE_BYTES

_LENGTH = struct.Struct("<I")
_CREDENTIALS = struct.Struct("3i")  # pid, uid, gid
_READ_BYTES = 256 * 1024
# What may wait for a peer that does not read: far more than frames in credit, or schedules ahead.
MAX_UNSENT_BYTES = 256 * 1024 * 1024
PATIENCE_S = 1.0
_TOKEN_BYTES = 32
# Strangers that stand at a door and say nothing.
_MAX_AT_DOOR = 4
Parsed = TypeVar("Parsed", bound=Message)


class Shortcut:
    """One end. `send` is for any thread; all else belongs to the event loop's.

    Messages arrive at `on_message` in order. When the conversation is over `on_end` hears of it
    once: at once with what `on_message` raised; after PATIENCE_S when the peer is gone, since the
    stream beside it says more. After `close` it hears nothing.
    """

    def __init__(
        self,
        connection: socket.socket,
        *,
        on_message: Callable[[bytes], None],
        on_end: Callable[[Exception], None],
    ) -> None:
        connection.setblocking(False)
        self._connection = connection
        self._on_message = on_message
        self._on_end = on_end
        self._loop = asyncio.get_running_loop()
        self._incoming = bytearray()
        self._ending: asyncio.TimerHandle | None = None
        self._lock = threading.Lock()  # over what follows
        self._unsent: deque[memoryview] = deque()
        self._unsent_bytes = 0
        self._is_closed = False
        self._loop.add_reader(connection, self._read)

    def send(self, message: bytes) -> None:
        """Sends a message after those before it; never waits.

        Raises Unavailable when the peer has not read for too long. When it is gone the message
        is dropped, and `on_end` says why.
        """
        with self._lock:
            if self._is_closed:
                return
            if self._unsent_bytes > MAX_UNSENT_BYTES:
                raise Unavailable(f"the peer left {self._unsent_bytes} bytes unread")
            parts = (_LENGTH.pack(len(message)), message)
            num_sent = 0 if self._unsent else self._try_to_send(parts)
            if num_sent < len(message) + _LENGTH.size:
                self._keep(memoryview(b"".join(parts))[num_sent:])

    def take_arrived(self) -> None:
        """Takes what the peer has sent before it ended the stream."""
        if not self._is_closed:
            self._read()

    def close(self) -> None:
        """Ends the conversation; the peer's `on_end` is called."""
        if self._ending is not None:
            self._ending.cancel()
        self._disconnect()

    def _disconnect(self) -> None:
        with self._lock:
            if self._is_closed:
                return
            self._is_closed = True
            self._unsent.clear()
        self._loop.remove_reader(self._connection)
        self._loop.remove_writer(self._connection)
        self._connection.close()

    def _try_to_send(self, parts: tuple[bytes | memoryview, ...]) -> int:
        try:
            return self._connection.sendmsg(parts)
        except BlockingIOError:
            return 0
        except OSError:  # the peer is gone: reading finds out, and says so
            return sum(map(len, parts))

    def _keep(self, rest: memoryview) -> None:
        if not self._unsent:
            self._loop.call_soon_threadsafe(self._await_room)
        self._unsent.append(rest)
        self._unsent_bytes += len(rest)

    def _await_room(self) -> None:
        if not self._is_closed:
            self._loop.add_writer(self._connection, self._send_rest)

    def _send_rest(self) -> None:
        with self._lock:
            while self._unsent:
                rest = self._unsent.popleft()
                num_sent = self._try_to_send((rest,))
                self._unsent_bytes -= num_sent
                if num_sent < len(rest):
                    self._unsent.appendleft(rest[num_sent:])
                    return
            self._loop.remove_writer(self._connection)

    def _read(self) -> None:
        try:
            data = self._connection.recv(_READ_BYTES)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._disconnect()
            gone = Unavailable("the peer ended the shortcut, and not the stream beside it")
            self._ending = self._loop.call_later(PATIENCE_S, self._on_end, gone)
            return
        try:
            self._take(data)
        except Exception as error:  # the boundary of the conversation: it ends with the error
            if not self._is_closed:
                self.close()
                self._on_end(error)

    def _take(self, data: bytes) -> None:
        incoming = self._incoming
        incoming += data
        while len(incoming) >= _LENGTH.size and not self._is_closed:
            end = _LENGTH.size + _LENGTH.unpack_from(incoming)[0]
            if end > _LENGTH.size + MAX_MESSAGE_BYTES:
                raise MalformedMessage(f"a message of {end} bytes; at most {MAX_MESSAGE_BYTES}")
            if len(incoming) < end:
                break
            message = bytes(memoryview(incoming)[_LENGTH.size : end])
            del incoming[:end]
            self._on_message(message)


class Door:
    """Where one peer on this host may enter, who knows `token`. Belongs to the event loop's thread.

    `address` is empty where there can be none: the system has no such sockets, or temporary files
    have no room or too long a path. The door is gone once the peer has come in, and stays as long
    as only strangers come.
    """

    def __init__(self, on_entered: Callable[[socket.socket], None]) -> None:
        self.address = ""
        self.token = b""
        self._at_door: dict[socket.socket, bytearray] = {}  # and what they have said
        self._on_entered = on_entered
        self._socket: socket.socket | None = None
        self._folder: Path | None = None
        if not _is_possible():
            return
        try:
            self._folder = Path(tempfile.mkdtemp(prefix="penstock-"))  # for this user alone
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            self._socket.bind(str(self._folder / "door"))
        except OSError:
            self.close()
            return
        self._socket.listen(_MAX_AT_DOOR)
        self._socket.setblocking(False)
        self.address = str(self._folder / "door")
        self.token = secrets.token_bytes(_TOKEN_BYTES)
        asyncio.get_running_loop().add_reader(self._socket, self._accept)

    def close(self) -> None:
        """Lets nobody in any more."""
        if self._socket is not None:
            asyncio.get_running_loop().remove_reader(self._socket)
            self._socket.close()
            self._socket = None
        for connection in list(self._at_door):
            self._turn_away(connection)
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None

    def _accept(self) -> None:
        assert self._socket is not None
        try:
            connection, _ = self._socket.accept()
        except OSError:  # it has left again
            return
        if len(self._at_door) == _MAX_AT_DOOR or not _is_own_users(connection):
            connection.close()
            return
        connection.setblocking(False)
        self._at_door[connection] = bytearray()
        asyncio.get_running_loop().add_reader(connection, self._listen_to, connection)

    def _listen_to(self, connection: socket.socket) -> None:
        said = self._at_door[connection]
        try:
            data = connection.recv(_TOKEN_BYTES - len(said))
        except BlockingIOError:
            return
        except OSError:
            data = b""
        said += data
        if not data or (len(said) == _TOKEN_BYTES and not compare_digest(said, self.token)):
            self._turn_away(connection)
        elif len(said) == _TOKEN_BYTES:
            asyncio.get_running_loop().remove_reader(connection)
            del self._at_door[connection]
            self.close()
            self._on_entered(connection)

    def _turn_away(self, connection: socket.socket) -> None:
        asyncio.get_running_loop().remove_reader(connection)
        del self._at_door[connection]
        connection.close()


def parse(kind: type[Parsed], message: bytes) -> Parsed:
    """Returns the message of that kind; raises MalformedMessage when it is none."""
    try:
        return kind.FromString(message)
    except DecodeError as error:
        raise MalformedMessage(f"{len(message)} bytes are no {kind.__name__}") from error


def enter(address: str, token: bytes) -> socket.socket | None:
    """Enters a peer's door; None where there is none on this host, or it is another user's."""
    if not address or not _is_possible():
        return None
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.setblocking(False)  # where many stand at the door already, there is none for us
    try:
        connection.connect(address)
        if _is_own_users(connection):
            connection.sendall(token)
            return connection
    except OSError:
        pass
    connection.close()
    return None


def _is_own_users(connection: socket.socket) -> bool:
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    return bool(_CREDENTIALS.unpack(credentials)[1] == os.getuid())


def _is_possible() -> bool:
    return hasattr(socket, "AF_UNIX") and hasattr(socket, "SO_PEERCRED")
