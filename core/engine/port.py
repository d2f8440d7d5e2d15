"""Where activations enter and leave a stage, in the wire's number format.

Letters: T rows, H hidden size, G = H rounded up to a multiple of 64.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from core.errors import ProtocolViolation
from core.kernels.arithmetic import Arithmetic
from core.kernels.memory import aligned_zeros
from core.kernels.packing.cpu import narrow_rows, widen_rows


class ActivationPort:
    """Rows of the residual stream, as others see them.

    "f32" rows are the residual stream itself. "bf16" rows are uint16 bit patterns: the kernels
    then round the stream after every layer, so that widening and narrowing here change nothing.
    """

    def __init__(
        self,
        wire: str,
        arithmetic: Arithmetic,
        *,
        hidden_TG: npt.NDArray[np.float32],
        hidden_size: int,
    ) -> None:
        """Compiles, or loads, what it needs."""
        self._arithmetic = arithmetic
        self._hidden_TG = hidden_TG
        self._hidden_size = hidden_size
        self._narrow_TG: npt.NDArray[np.uint16] | None = None
        if wire == "bf16":
            self._narrow_TG = aligned_zeros(hidden_TG.shape, np.uint16)
            widen_rows(arithmetic, self._narrow_TG, 0, hidden_TG)
            narrow_rows(arithmetic, hidden_TG, 0, self._narrow_TG)

    def take(self, rows_TH: npt.NDArray[Any] | None, *, num_rows: int) -> None:
        """Takes activations in. Raises ProtocolViolation where shape or dtype differ."""
        rows_TG = self._hidden_TG if self._narrow_TG is None else self._narrow_TG
        shape, dtype = (num_rows, self._hidden_size), rows_TG.dtype
        if rows_TH is None or rows_TH.shape != shape or rows_TH.dtype != dtype:
            seen = None if rows_TH is None else (rows_TH.shape, str(rows_TH.dtype))
            raise ProtocolViolation(f"activations are {seen}, expected {(shape, str(dtype))}")
        rows_TG[:num_rows, : self._hidden_size] = rows_TH
        if self._narrow_TG is not None:
            widen_rows(self._arithmetic, self._narrow_TG, num_rows, self._hidden_TG)

    def give(self, num_rows: int) -> npt.NDArray[Any]:
        """Returns activations [T, H], C order, valid until the next call of the stage."""
        if self._narrow_TG is None:
            return np.ascontiguousarray(self._hidden_TG[:num_rows, : self._hidden_size])
        narrow_rows(self._arithmetic, self._hidden_TG, num_rows, self._narrow_TG)
        return np.ascontiguousarray(self._narrow_TG[:num_rows, : self._hidden_size])
