"""What a stage has sent, kept beside the keys and values: a plane of the paged cache.

When the next stage loses what it computed, these rows are sent again. They share the fate of
their KV block: whoever shares the block shares its rows, and the next owner overwrites them.

Letters: T rows, H hidden size, P places (positions of all KV blocks).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from core.kernels.memory import aligned_zeros

_WIRE_TYPES = {"f32": np.float32, "bf16": np.uint16}


def log_row_bytes(hidden_size: int, wire: str) -> int:
    """Bytes that one position takes in the log."""
    return hidden_size * np.dtype(_WIRE_TYPES[wire]).itemsize


class ActivationLog:
    """The rows that were sent for each place of the cache, as the wire carried them.

    In memory of the host, which is taken as places are first written.
    """

    def __init__(self, *, num_places: int, hidden_size: int, wire: str) -> None:
        self._rows_PH = aligned_zeros((num_places, hidden_size), _WIRE_TYPES[wire])

    def write(self, places_T: npt.NDArray[np.int64], rows_TH: npt.NDArray[Any]) -> None:
        """Keeps a row for each place."""
        self._rows_PH[places_T] = rows_TH

    def read(self, places_T: npt.NDArray[np.int64]) -> npt.NDArray[Any]:
        """Returns the rows of these places [T, H], C order; zeros where none was written."""
        return self._rows_PH[places_T]
