"""The number formats of activations on the wire."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from penstock.v1 import tensor_pb2

from core.errors import InvalidInput


@dataclass(frozen=True, kw_only=True)
class WireCodec:
    """A codec: its name in settings, its number in tensor.proto, its elements in memory.

    bfloat16 travels as its bit patterns, since numpy has no such type.
    """

    name: str
    number: tensor_pb2.Codec
    dtype: npt.DTypeLike

    @property
    def element_size_bytes(self) -> int:
        return np.dtype(self.dtype).itemsize


_CODECS = {
    codec.name: codec
    for codec in (
        WireCodec(name="f32", number=tensor_pb2.CODEC_F32, dtype="<f4"),
        WireCodec(name="bf16", number=tensor_pb2.CODEC_BF16, dtype="<u2"),
    )
}

# Activations [T, H] in a codec's dtype: float32, or uint16 bit patterns of bfloat16.
Activations = npt.NDArray[Any]


def codec_named(name: str) -> WireCodec:
    """Returns the codec called `name` ("f32" or "bf16"); raises InvalidInput for others."""
    if name not in _CODECS:
        raise InvalidInput("codec", name, " or ".join(_CODECS))
    return _CODECS[name]
