"""Several files as one input: each behind its length, four bytes, little endian."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random

from tests.fuzz.damage import any_damage

Damage = Callable[[bytes, Random], bytes]


def join(sections: Sequence[bytes]) -> bytes:
    return b"".join(len(section).to_bytes(4, "little") + section for section in sections)


def split(data: bytes, count: int) -> list[bytes]:
    """The first `count` sections; those that are not there are empty."""
    sections = []
    for _ in range(count):
        end = 4 + int.from_bytes(data[:4], "little")
        sections.append(data[4:end])
        data = data[end:]
    return sections


def damage_one(data: bytes, random: Random, damages: Sequence[Damage]) -> bytes:
    """Damages one section as befits it; rarely the whole."""
    if random.random() < 0.02:
        return any_damage(data, random)
    sections = split(data, len(damages))
    index = random.randrange(len(damages))
    sections[index] = damages[index](sections[index], random)
    return join(sections)
