"""Ways to damage bytes that every format has in common."""

from __future__ import annotations

from random import Random

# Where counts, sizes and offsets go wrong: none, one, the edges of 8 to 64 bits, their signs.
_EDGES = (0, 1, 2, 3, 7, 8, 31, 32, 255, 256, 4095, 4096, 1 << 16, 1 << 24)
_POWERS = (31, 32, 53, 62, 63, 64)


def odd_number(random: Random, *, near: int = 0) -> int:
    """A number that parsers stumble over, or one close to `near`."""
    kind = random.randrange(4)
    if kind == 0:
        return random.choice(_EDGES)
    if kind == 1:
        return max(0, (1 << random.choice(_POWERS)) + random.randint(-2, 1))
    if kind == 2:
        return max(0, near + random.randint(-9, 9))
    return random.randrange(max(2, 4 * near))


def overwrite_number(data: bytes, random: Random) -> bytes:
    """Writes an odd little-endian number of 1 to 8 bytes somewhere, likely where one was."""
    size = random.choice((1, 2, 4, 4, 8, 8))
    if len(data) < size:
        return data
    first = _likely_number(data, size, random)
    number = odd_number(random, near=len(data)) % (1 << 8 * size)
    return data[:first] + number.to_bytes(size, "little") + data[first + size :]


def _likely_number(data: bytes, size: int, random: Random) -> int:
    """Where a small number with leading zeros stands, if a few tries near the beginning find one:
    mostly the lengths and counts of headers."""
    zeros = bytes(size - 1)
    for _ in range(20):
        first = random.randrange(min(len(data), 4096) - size + 1)
        if data[first] and data[first + 1 : first + size] == zeros:
            return first
    return random.randrange(len(data) - size + 1)


def cut(data: bytes, random: Random) -> bytes:
    return data[: random.randrange(len(data) + 1)]


def remove(data: bytes, random: Random) -> bytes:
    first = random.randrange(len(data) + 1)
    return data[:first] + data[first + random.randint(1, 64) :]


def repeat(data: bytes, random: Random) -> bytes:
    """Copies a piece to another place."""
    first, place = random.randrange(len(data) + 1), random.randrange(len(data) + 1)
    piece = data[first : first + random.randint(1, 64)]
    return data[:place] + piece + data[place:]


def any_damage(data: bytes, random: Random) -> bytes:
    """One of the above; numbers most often."""
    damage = random.choice(
        (overwrite_number, overwrite_number, overwrite_number, cut, remove, repeat)
    )
    return damage(data, random)
