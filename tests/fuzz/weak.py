"""Targets with a known weakness each, behind a first byte that has to be found."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from random import Random

from core.errors import MalformedMessage
from tests.fuzz.target import MIB, FuzzTarget


def _raises() -> None:
    {}["not there"]


def _allocates() -> None:
    bytearray(64 * MIB)


def _exhausts() -> None:
    bytearray(1 << 40)


def _hangs() -> None:
    while True:
        pass


def _dies() -> None:
    os.abort()


def _refuses() -> None:
    raise MalformedMessage("as it should be")


_WEAKNESSES: dict[str, Callable[[], None]] = {
    "raises": _raises,
    "allocates": _allocates,
    "exhausts": _exhausts,
    "hangs": _hangs,
    "dies": _dies,
    "refuses": _refuses,
}


def make_target() -> FuzzTarget:
    # The name that the child was started with: `weak-NAME`.
    weakness = _WEAKNESSES[sys.argv[1].removeprefix("weak-")]

    def try_input(data: bytes) -> None:
        if data[:1] == b"!":
            weakness()

    return FuzzTarget(
        try_input=try_input,
        refusals=(MalformedMessage,),
        seeds=[b"harmless"],
        mutate=_mutate,
        timeout_s=1 if weakness is _hangs else 60,
    )


def _mutate(data: bytes, random: Random) -> bytes:
    return random.choice((b"!", b"?")) + data[1:]
