"""What has been read of a weight file: how much, and which bytes."""

from __future__ import annotations

from typing import Any

import numpy.typing as npt
import xxhash


class Readings:
    """Counts and digests the bytes of tensors in the order in which they are read.

    Whoever reads the same tensors in the same order has an equal digest, whatever else the files
    hold. It is an identity, not a proof against forgery; it takes memory's own speed.
    """

    def __init__(self) -> None:
        self.num_bytes = 0
        self._hash = xxhash.xxh3_128()

    @property
    def digest(self) -> str:
        """XXH3-128 (hex) of all so far."""
        return self._hash.hexdigest()

    def add(self, raw: npt.NDArray[Any]) -> None:
        """Notes bytes that have been read."""
        self._hash.update(raw.data)
        self.num_bytes += raw.nbytes
