"""The keys as a gateway sees them: read through from the store, and never older than a moment."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from typing import Protocol

from core.errors import PenstockError, Unavailable
from services.common.keys import ApiKey

_LOG = logging.getLogger(__name__)
# A key that was made or revoked is seen after this, at most.
MAX_AGE_S = 0.5


class KeySource(Protocol):
    """What the store is to a gateway; see there."""

    def revision(self) -> int: ...

    def all_keys(self) -> list[ApiKey]: ...


class KeyRing:
    """All keys of a store, by id.

    All at once, since an id that nobody has must cost no more than one that somebody has: else
    anybody could have the gateway ask the store as often as they like.
    """

    def __init__(self, source: KeySource, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._source = source
        self._clock = clock
        self._keys: dict[str, ApiKey] = {}
        self._revision = -1
        self._read_at = -MAX_AGE_S
        self._reading = asyncio.Lock()

    async def current(self) -> Mapping[str, ApiKey]:
        """The keys, as they were at most `MAX_AGE_S` ago; raises Unavailable."""
        if self._is_old:
            async with self._reading:
                if self._is_old:  # nobody has read them while this waited
                    await self._read()
        return self._keys

    @property
    def _is_old(self) -> bool:
        return self._clock() - self._read_at >= MAX_AGE_S

    async def _read(self) -> None:
        began_at = self._clock()
        try:
            await asyncio.to_thread(self._read_changes)
        except PenstockError as error:
            _LOG.error("API keys cannot be read", extra={"why": str(error)})
            raise Unavailable("API keys cannot be checked at the moment") from error
        self._read_at = began_at

    def _read_changes(self) -> None:
        # Asked for first: a change in between is then read once more, and not missed.
        revision = self._source.revision()
        if revision != self._revision:
            self._keys = {key.key_id: key for key in self._source.all_keys()}
            self._revision = revision
