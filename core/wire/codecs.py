"""The number formats of activations on the wire.

Letters: T rows, W elements of a row as it travels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from penstock.v1 import tensor_pb2

from core.errors import InvalidInput, MalformedMessage, PlanImpossible
from core.kernels.blocks.layout import INFINITY_BITS, num_elements, row_bytes, scale_bits

# Activations [T, W] in a codec's dtype: float32, uint16 bit patterns of bfloat16, or bytes of
# blocks with their scales (`core.kernels.blocks`).
Activations = npt.NDArray[Any]


@dataclass(frozen=True, kw_only=True)
class WireCodec:
    """A codec: its name in settings, its number in tensor.proto, its elements in memory.

    bfloat16 travels as its bit patterns, since numpy has no such type.
    """

    name: str
    number: tensor_pb2.Codec
    dtype: npt.DTypeLike
    has_blocks: bool = False  # of integers, with scales behind them: see `core.kernels.blocks`

    def width(self, hidden_size: int) -> int:
        """Elements of `dtype` that a row takes."""
        return row_bytes(hidden_size) if self.has_blocks else hidden_size

    def hidden_size(self, width: int) -> int:
        """What a row of this width holds."""
        return num_elements(width) if self.has_blocks else width

    def row_bytes(self, hidden_size: int) -> int:
        """Bytes that a row takes."""
        return self.width(hidden_size) * np.dtype(self.dtype).itemsize

    def refuse_other_cuts(self) -> None:
        """Raises PlanImpossible where rows are rounded as they are sent and nowhere else: then the
        place of a cut is part of what is computed."""
        if self.has_blocks:
            raise PlanImpossible(
                f"activations are rounded to {self.name} where the model is cut, so another cut "
                "would change the answers; start a mesh with the cut that is wanted"
            )

    def check(self, rows_TW: Activations, *, hidden_size: int) -> None:
        """Raises MalformedMessage where a scale is not finite, or has a sign."""
        if self.has_blocks and scale_bits(rows_TW, size=hidden_size).max() >= INFINITY_BITS:
            raise MalformedMessage("a scale is negative or not finite")


_CODECS = {
    codec.name: codec
    for codec in (
        WireCodec(name="f32", number=tensor_pb2.CODEC_F32, dtype="<f4"),
        WireCodec(name="bf16", number=tensor_pb2.CODEC_BF16, dtype="<u2"),
        WireCodec(name="int8", number=tensor_pb2.CODEC_INT8, dtype="u1", has_blocks=True),
    )
}


def codec_named(name: str) -> WireCodec:
    """Returns the codec of this name; raises InvalidInput for others."""
    if name not in _CODECS:
        raise InvalidInput("wire", name, " or ".join(_CODECS))
    return _CODECS[name]


def codec_numbered(number: int) -> WireCodec:
    """Returns the codec of this number in tensor.proto; raises InvalidInput for others."""
    for codec in _CODECS.values():
        if codec.number == number:
            return codec
    raise InvalidInput("codec", number, " or ".join(_CODECS))


def check_wire(name: str, *, number_format: str) -> None:
    """Raises InvalidInput for what is no codec, and for bf16 beside fp32, since all layers would
    round to it."""
    codec_named(name)
    if (name, number_format) == ("bf16", "fp32"):
        raise InvalidInput("wire", name, "f32 or int8 beside weights in fp32")
