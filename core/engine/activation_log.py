"""What a stage has sent, kept beside the keys and values: a plane of the paged cache.

When the next stage loses what it computed, these rows are sent again. They share the fate of
their KV block: whoever shares the block shares its rows, and the next owner overwrites them.

Letters: T rows, W elements of a row on the wire, P places (positions of all KV blocks).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from core.kernels.memory import aligned_zeros
from core.wire.codecs import codec_named


class ActivationLog:
    """The rows that were sent for each place of the cache, as the wire carried them.

    In memory of the host, which is taken as places are first written.
    """

    def __init__(self, *, num_places: int, hidden_size: int, wire: str) -> None:
        codec = codec_named(wire)
        self._rows_PW = aligned_zeros((num_places, codec.width(hidden_size)), codec.dtype)

    def write(self, places_T: npt.NDArray[np.int64], rows_TW: npt.NDArray[Any]) -> None:
        """Keeps a row for each place."""
        self._rows_PW[places_T] = rows_TW

    def read(self, places_T: npt.NDArray[np.int64]) -> npt.NDArray[Any]:
        """Returns the rows of these places [T, W], C order; zeros where none was written."""
        return self._rows_PW[places_T]
