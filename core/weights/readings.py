"""What has been read of a weight file: how much, and which bytes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy.typing as npt
import xxhash


class Readings:
    """Counts the bytes of tensors as they are read, and digests each tensor.

    A digest is an identity, not a proof against forgery; it takes memory's own speed.
    """

    def __init__(self) -> None:
        self.num_bytes = 0
        self._hashes: dict[str, xxhash.xxh3_128] = {}  # of each tensor's latest reading

    def digest_of(self, names: Iterable[str]) -> str:
        """XXH3-128 (hex) of what was read last of some tensors, whatever else has been read; raises
        KeyError where one has not been."""
        return xxhash.xxh3_128_hexdigest(b"".join(self._hashes[name].digest() for name in names))

    def add(self, name: str, raw: npt.NDArray[Any], *, first_byte: int = 0) -> None:
        """Notes bytes of a tensor that have been read; the first ones begin a reading anew, which
        the next ones go on with."""
        if first_byte == 0 or name not in self._hashes:
            self._hashes[name] = xxhash.xxh3_128()
        self._hashes[name].update(raw.data)
        self.num_bytes += raw.nbytes
