"""Number formats inside CUDA kernels: arrays are float32, or bfloat16 as uint16 bit patterns.

Arithmetic is float32 in either case. Kernels are made for one format (`functools.cache`d
factories): what a format needs is known when a kernel is compiled.
"""

# mypy: allow-untyped-defs, allow-untyped-calls, disable-error-code="attr-defined"

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba import cuda
from numba.cuda import config

# A step of one row has small grids, knowingly.
config.CUDA_LOW_OCCUPANCY_WARNINGS = 0


class NumberFormat(NamedTuple):
    """Device functions between an array's element and a float32.

    `unpack(word, i)` is the float32 of the i-th of `per_word` elements in an int64: reading
    words takes fewer and wider loads.
    """

    load: Any
    store: Any
    unpack: Any
    per_word: int


@cuda.jit(device=True)
def _load_fp32(element):
    return element


@cuda.jit(device=True)
def _store_fp32(value):
    return np.float32(value)


@cuda.jit(device=True)
def _load_bf16(element):
    return np.uint32(np.uint32(element) << np.uint32(16)).view(np.float32)


@cuda.jit(device=True)
def _store_bf16(value):
    """Rounds to the nearest, ties to even; NaN stays NaN."""
    bits = np.uint64(np.float32(value).view(np.uint32))
    if value != value:
        return np.uint16((bits >> np.uint64(16)) | np.uint64(0x40))
    odd = (bits >> np.uint64(16)) & np.uint64(1)
    return np.uint16((bits + np.uint64(0x7FFF) + odd) >> np.uint64(16))


@cuda.jit(device=True)
def _unpack_fp32(word, i):
    return np.uint32((np.uint64(word) >> np.uint64(32 * i)) & np.uint64(0xFFFFFFFF)).view(
        np.float32
    )


@cuda.jit(device=True)
def _unpack_bf16(word, i):
    half = np.uint32((np.uint64(word) >> np.uint64(i // 2 * 32)) & np.uint64(0xFFFFFFFF))
    if i % 2:
        return np.uint32(half & np.uint32(0xFFFF0000)).view(np.float32)
    return np.uint32(half << np.uint32(16)).view(np.float32)


_FORMATS = {
    "fp32": NumberFormat(_load_fp32, _store_fp32, _unpack_fp32, 2),
    "bf16": NumberFormat(_load_bf16, _store_bf16, _unpack_bf16, 4),
}


def number_format_of(name: str) -> NumberFormat:
    """The format called "fp32" or "bf16"."""
    return _FORMATS[name]


@cuda.jit(device=True)
def rounded_to_bf16(value):
    """The float32 that bfloat16 holds in its place."""
    return _load_bf16(_store_bf16(value))


@cuda.jit(device=True)
def block_sum(value, partials):
    """The sum of every thread's value, in an order that only the number of threads decides.

    The number of threads is a power of two; `partials` is shared memory, an element a thread,
    and may be used again after the next syncthreads.
    """
    thread = cuda.threadIdx.x
    partials[thread] = value
    cuda.syncthreads()
    step = cuda.blockDim.x // 2
    while step > 0:
        if thread < step:
            partials[thread] += partials[thread + step]
        cuda.syncthreads()
        step //= 2
    return partials[0]
