"""A model's own chat template, rendered within bounds of time, memory and output."""

from __future__ import annotations

import json
import select
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from threading import Lock
from typing import Any

from core.errors import InvalidInput

ROLES = ("system", "user", "assistant", "tool")
_CHILD = Path(__file__).with_name("chat_template_child.py")
_READ_BYTES = 1 << 16


@dataclass(frozen=True)
class ChatMessage:
    """One message of a conversation; `role` is one of ROLES."""

    role: str
    content: str


@dataclass(frozen=True, kw_only=True)
class ChatTemplateLimits:
    """Bounds of one rendering. A real template takes about a millisecond."""

    timeout_s: float = 5.0
    # The template may write this much, and the messages twice over.
    max_own_chars: int = 1 << 20


class ChatTemplate:
    """Renders conversations in a child process (see chat_template_child), one at a time.

    The child is started when first needed, stays, and is replaced when it was too slow
    or died. Thread-safe; calls block, so an event loop calls from a worker thread.
    """

    def __init__(
        self,
        template: str,
        named_tokens: Mapping[str, str],
        *,
        limits: ChatTemplateLimits | None = None,
    ) -> None:
        first_line = {"template": template, "named_tokens": dict(named_tokens)}
        self._first_line = _line(first_line)
        self._limits = limits or ChatTemplateLimits()
        self._child: subprocess.Popen[bytes] | None = None
        self._lock = Lock()

    def render(self, messages: Sequence[ChatMessage], *, now: datetime) -> str:
        """Renders up to where the assistant's answer begins.

        `now` is what strftime_now formats. Raises InvalidInput when the template refuses the
        messages, fails, or exceeds the limits.
        """
        content_chars = sum(len(message.content) for message in messages)
        request = {
            "messages": [vars(message) for message in messages],
            "now": now.isoformat(),
            "max_chars": self._limits.max_own_chars + 2 * content_chars,
        }
        with self._lock:
            answer = self._ask(_line(request))
        if "text" in answer:
            return answer["text"]
        if "refused" in answer:
            raise InvalidInput(
                "messages", _shown(messages), f"what the template allows: {answer['refused']}"
            )
        raise InvalidInput(
            "messages",
            _shown(messages),
            f"none: the model's chat template failed ({answer['failed']})",
        )

    def start(self) -> None:
        """Starts the child process, if there is none. It compiles the template meanwhile."""
        with self._lock, suppress(OSError):  # a child that cannot start is `render`'s to report
            self._started_child()

    def close(self) -> None:
        """Ends the child process, if there is one. A later call of `render` starts another."""
        with self._lock:
            self._end_child()

    def _ask(self, request: bytes) -> dict[str, str]:
        deadline_s = time.monotonic() + self._limits.timeout_s
        try:
            child = self._started_child()
            assert child.stdin is not None
            child.stdin.write(request)
            child.stdin.flush()
            return json.loads(self._read_line(child, deadline_s))
        except TimeoutError:
            self._end_child()
            return {"failed": f"no result within {self._limits.timeout_s:g} s"}
        except (OSError, EOFError, ValueError):
            self._end_child()
            return {"failed": "its process ended"}

    def _started_child(self) -> subprocess.Popen[bytes]:
        if self._child is None:
            # Isolated mode and an empty environment: nothing of ours is within its reach.
            self._child = subprocess.Popen(
                [sys.executable, "-I", str(_CHILD)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env={},
                start_new_session=True,  # a terminal's Ctrl-C is for the parent
            )
            assert self._child.stdin is not None
            self._child.stdin.write(self._first_line)
            self._child.stdin.flush()
        return self._child

    def _read_line(self, child: subprocess.Popen[bytes], deadline_s: float) -> bytes:
        assert child.stdout is not None
        pieces = []
        while True:
            left_s = deadline_s - time.monotonic()
            if left_s <= 0 or not select.select([child.stdout], [], [], left_s)[0]:
                raise TimeoutError
            piece = child.stdout.read1(_READ_BYTES)  # type: ignore[attr-defined]
            if not piece:
                raise EOFError
            pieces.append(piece)
            if piece.endswith(b"\n"):
                return b"".join(pieces)

    def _end_child(self) -> None:
        child, self._child = self._child, None
        if child is None:
            return
        child.kill()
        child.wait()
        for stream in (child.stdin, child.stdout):
            assert stream is not None
            with suppress(OSError):  # what was still buffered cannot be written any more
                stream.close()


def _line(content: dict[str, Any]) -> bytes:
    return json.dumps(content).encode() + b"\n"


def _shown(messages: Sequence[ChatMessage]) -> list[str]:
    return [message.role for message in messages]
