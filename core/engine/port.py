"""Where activations enter and leave a stage, in the wire's codec.

Letters: T rows, H hidden size, G = H rounded up to a multiple of 64, W elements of a row on the
wire.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from core.errors import ProtocolViolation
from core.kernels.arithmetic import Arithmetic
from core.kernels.blocks.cpu import decode_rows, encode_rows
from core.kernels.memory import aligned_zeros
from core.kernels.packing.cpu import narrow_rows, widen_rows
from core.wire.codecs import codec_named

FloatArray = npt.NDArray[np.float32]


class ActivationPort:
    """Rows of the residual stream, as others see them: here the stream itself, in float32."""

    def __init__(self, rows_TG: npt.NDArray[Any], *, width: int) -> None:
        """`rows_TG`: where rows come and go, each of them `width` elements and then zeros."""
        self._rows_TG = rows_TG
        self._width = width

    def take(self, rows_TW: npt.NDArray[Any] | None, *, num_rows: int) -> None:
        """Takes activations in. Raises ProtocolViolation where shape or dtype differ."""
        shape, dtype = (num_rows, self._width), self._rows_TG.dtype
        if rows_TW is None or rows_TW.shape != shape or rows_TW.dtype != dtype:
            seen = None if rows_TW is None else (rows_TW.shape, str(rows_TW.dtype))
            raise ProtocolViolation(f"activations are {seen}, expected {(shape, str(dtype))}")
        self._rows_TG[:num_rows, : self._width] = rows_TW
        self._decode(num_rows)

    def give(self, num_rows: int) -> npt.NDArray[Any]:
        """Returns activations [T, W], C order, valid until the next call of the stage."""
        self._encode(num_rows)
        return np.ascontiguousarray(self._rows_TG[:num_rows, : self._width])

    def _decode(self, num_rows: int) -> None:
        """Turns what came into the residual stream."""

    def _encode(self, num_rows: int) -> None:
        """Turns the residual stream into what goes."""


class NarrowPort(ActivationPort):
    """Bit patterns of bfloat16. The kernels round the stream after every layer, so that widening
    and narrowing here change nothing."""

    def __init__(self, hidden_TG: FloatArray, arithmetic: Arithmetic, *, width: int) -> None:
        super().__init__(aligned_zeros(hidden_TG.shape, np.uint16), width=width)
        self._hidden_TG = hidden_TG
        self._arithmetic = arithmetic

    def _decode(self, num_rows: int) -> None:
        widen_rows(self._arithmetic, self._rows_TG, num_rows, self._hidden_TG)

    def _encode(self, num_rows: int) -> None:
        narrow_rows(self._arithmetic, self._hidden_TG, num_rows, self._rows_TG)


class BlockPort(ActivationPort):
    """Blocks of int8: the stream is rounded here, and nowhere else."""

    def __init__(self, hidden_TG: FloatArray, *, hidden_size: int) -> None:
        codec = codec_named("int8")
        width = codec.width(hidden_size)
        super().__init__(aligned_zeros((len(hidden_TG), width), codec.dtype), width=width)
        self._hidden_TG = hidden_TG
        self._hidden_size = hidden_size

    def _decode(self, num_rows: int) -> None:
        decode_rows(self._rows_TG, num_rows, self._hidden_size, self._hidden_TG)

    def _encode(self, num_rows: int) -> None:
        encode_rows(self._hidden_TG, num_rows, self._hidden_size, self._rows_TG)


def make_port(
    wire: str, arithmetic: Arithmetic, *, hidden_TG: FloatArray, hidden_size: int
) -> ActivationPort:
    """The port to a residual stream [T, G]; compiles, or loads, what it needs."""
    if wire == "int8":
        return _warm(BlockPort(hidden_TG, hidden_size=hidden_size))
    if wire == "bf16":
        return _warm(NarrowPort(hidden_TG, arithmetic, width=hidden_size))
    return ActivationPort(hidden_TG, width=hidden_size)


def host_port(wire: str, hidden_TH: npt.NDArray[Any]) -> ActivationPort:
    """The port to a copy of a device's stream: float32, or bfloat16 where the wire is that."""
    width = hidden_TH.shape[1]
    if wire == "int8":
        return _warm(BlockPort(hidden_TH, hidden_size=width))
    return ActivationPort(hidden_TH, width=width)


def _warm(port: ActivationPort) -> ActivationPort:
    """Runs no rows, so that no request waits for a compiler."""
    port.take(port.give(0), num_rows=0)
    return port
