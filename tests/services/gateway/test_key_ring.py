"""Keys are read through from the store, and are never older than a moment."""

from __future__ import annotations

import asyncio

import pytest

from core.errors import Unavailable
from services.common.keys import ApiKey
from services.gateway.key_ring import MAX_AGE_S, KeyRing


class Source:
    """A store in memory that counts what it is asked."""

    def __init__(self) -> None:
        self.ids: list[str] = []
        self.num_asked = self.num_read = 0
        self.is_down = False

    def revision(self) -> int:
        self.num_asked += 1
        if self.is_down:
            raise Unavailable("/secret/place is gone")
        return len(self.ids)

    def all_keys(self) -> list[ApiKey]:
        self.num_read += 1
        return [
            ApiKey(key_id=key_id, tenant="t", secret_hash=bytes(32), created_at_s=0.0)
            for key_id in self.ids
        ]


class Clock:
    """Stands still until it is moved."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


async def test_a_change_is_seen_after_the_age_that_is_allowed_and_that_is_below_a_second() -> None:
    source, clock = Source(), Clock()
    ring = KeyRing(source, clock=clock)
    assert not await ring.current()
    source.ids.append("a")
    clock.now += MAX_AGE_S
    assert list(await ring.current()) == ["a"]
    assert MAX_AGE_S < 1


async def test_the_store_is_asked_once_a_while_and_read_only_when_it_has_changed() -> None:
    source, clock = Source(), Clock()
    ring = KeyRing(source, clock=clock)
    for _ in range(100):
        await ring.current()
    assert (source.num_asked, source.num_read) == (1, 1)
    clock.now += MAX_AGE_S
    await asyncio.gather(*(ring.current() for _ in range(100)))
    assert (source.num_asked, source.num_read) == (2, 1)


async def test_keys_that_cannot_be_read_anew_do_not_count_any_more() -> None:
    source, clock = Source(), Clock()
    ring = KeyRing(source, clock=clock)
    await ring.current()
    source.is_down = True
    clock.now += MAX_AGE_S
    with pytest.raises(Unavailable, match="cannot be checked") as caught:
        await ring.current()
    assert "/secret/place" not in str(caught.value)
    source.is_down = False
    assert await ring.current() is not None
