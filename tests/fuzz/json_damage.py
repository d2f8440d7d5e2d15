"""Ways to damage JSON so that it stays JSON, and what the reader expects no longer is."""

from __future__ import annotations

import json
from collections.abc import Iterator
from random import Random
from typing import Any

from tests.fuzz.damage import any_damage, odd_number

Place = tuple[Any, Any]  # an object or a list, and a key or an index in it


def damage_json(text: bytes, random: Random, *, keys: tuple[str, ...] = ()) -> bytes:
    """Changes one value somewhere, or the text itself. `keys` may be added to objects."""
    if random.random() < 0.15:
        return any_damage(text, random)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return any_damage(text, random)
    places = list(_places(value))
    if not places:
        return json.dumps(_odd_value(random)).encode()
    holder, key = random.choice(places)
    kind = random.randrange(8)
    if kind == 0:
        del holder[key]
    elif kind == 1 and keys and isinstance(holder, dict):
        holder[random.choice(keys)] = _odd_value(random)
    elif kind == 2:
        holder[key] = random.choice(places)[0]  # something from elsewhere in the document
    else:
        holder[key] = _near(holder[key], random)
    return _dump(value)


def _places(value: Any) -> Iterator[Place]:
    items = value.items() if isinstance(value, dict) else ()
    if isinstance(value, list):
        items = enumerate(value)
    for key, inner in items:
        yield value, key
        yield from _places(inner)


def _near(value: Any, random: Random) -> Any:
    if random.random() < 0.5:
        return _odd_value(random)
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return random.choice((-1, 1)) * odd_number(random, near=abs(value))
    if isinstance(value, str):
        return value * random.randint(0, 3) + random.choice(("", " ", "\0", "\ud800", "▁", "ﷺ"))
    if isinstance(value, list):
        return value * random.randint(0, 3)
    return value


def _odd_value(random: Random) -> Any:
    return random.choice(
        (
            None,
            True,
            -1,
            odd_number(random),
            0.5,
            1e308,
            float("nan"),
            float("-inf"),
            10**400,
            "",
            "x" * random.choice((1, 300)),
            [],
            [[]],
            {},
            {"": None},
            [odd_number(random)] * 9,
        )
    )


def _dump(value: Any) -> bytes:
    try:
        return json.dumps(value).encode()
    except (ValueError, RecursionError):  # a place was put inside itself, or the depth is too great
        return b"[" * 5000
