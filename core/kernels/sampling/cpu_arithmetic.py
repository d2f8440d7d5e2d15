"""The arithmetic of sampling on the CPU: ranks, weights and random numbers, to the bit those
of `reference`. What loops call is inlined by LLVM, so that the loops vectorise.
"""

# mypy: allow-untyped-defs, allow-untyped-calls

from __future__ import annotations

import numpy as np

from core.kernels.compile import inlined, kernel
from core.kernels.sampling.constants import (
    EXP2_COEFFICIENTS,
    FRACTION_BITS,
    LARGEST_FLOAT,
    LOWEST_EXPONENT,
    PHILOX_MULTIPLIER_0,
    PHILOX_MULTIPLIER_1,
    PHILOX_ROUNDS,
    PHILOX_WEYL_0,
    PHILOX_WEYL_1,
    exponent_scale,
)

# Logits that are read together; a multiple of every vector's width.
CHUNK = 128
# A cut below every token's order.
KEEP_ALL = np.int64(-(2**63))
LARGEST = np.float32(LARGEST_FLOAT)
LEAST_KEY = np.int32(-(2**31))
KEY_OF_MINUS_INFINITY = np.int32(-0x7F800001)

_C0, _C1, _C2, _C3, _C4, _C5 = (np.float32(value) for value in EXP2_COEFFICIENTS)
_ONE = np.float32(1.0)
_EXPONENT_OFFSET = np.int32(FRACTION_BITS + 127)
_LOWEST = np.float32(LOWEST_EXPONENT)
_MAGNITUDE = np.int32(0x7FFFFFFF)
_INFINITY = np.int32(0x7F800000)
_WORD, _32 = np.uint64(0xFFFFFFFF), np.uint64(32)
_M0, _M1 = np.uint64(PHILOX_MULTIPLIER_0), np.uint64(PHILOX_MULTIPLIER_1)
_W0, _W1 = np.uint64(PHILOX_WEYL_0), np.uint64(PHILOX_WEYL_1)

scale_of = kernel(exponent_scale)


@kernel
def random_bits(seed, position):
    """64 bits of Philox4x32-10 with counter (position, 0, 0, 0) and the seed as key."""
    c0, c1, c2, c3 = np.uint64(position), np.uint64(0), np.uint64(0), np.uint64(0)
    k0, k1 = np.uint64(seed) & _WORD, np.uint64(seed) >> _32
    for _ in range(PHILOX_ROUNDS):
        product_0, product_1 = _M0 * c0, _M1 * c2
        c0 = (product_1 >> _32) ^ c1 ^ k0
        c2 = (product_0 >> _32) ^ c3 ^ k1
        c1, c3 = product_1 & _WORD, product_0 & _WORD
        k0, k1 = (k0 + _W0) & _WORD, (k1 + _W1) & _WORD
    return (c0 << _32) | c1


@kernel
def threshold_of(total, bits):
    """total * bits / 2^64, rounded down; both below 2^64."""
    total = np.uint64(total)
    low = (total & _WORD) * (bits & _WORD)
    middle_0 = (total >> _32) * (bits & _WORD) + (low >> _32)
    middle_1 = (total & _WORD) * (bits >> _32) + (middle_0 & _WORD)
    return np.int64((total >> _32) * (bits >> _32) + (middle_0 >> _32) + (middle_1 >> _32))


@inlined
def rank_key(bits):
    """Integer in the order of the float with these bits; NaN is the least."""
    # Without the casts numba widens to 64 bits, and without branches the loop vectorises.
    flip = np.int32(np.int32(bits >> np.int32(31)) & _MAGNITUDE)
    key = np.int32(bits ^ flip)
    nan = np.int32(np.int32(_INFINITY - np.int32(bits & _MAGNITUDE)) >> np.int32(31))
    return np.int32(np.int32(key & ~nan) | np.int32(nan & LEAST_KEY))


@inlined
def float_of(key):
    """The float whose rank key this is."""
    return np.int32(key ^ np.int32(np.int32(key >> np.int32(31)) & _MAGNITUDE)).view(np.float32)


@inlined
def pair(key, index):
    """Both in one integer: greater is a greater key, and among equals a lower index."""
    return (np.int64(key) << np.int64(32)) | np.int64(_MAGNITUDE - np.int32(index))


@inlined
def order_of(bits, token_id):
    """Rank among all tokens: greater is likelier, and among equals the lower id."""
    return pair(rank_key(bits), token_id)


@inlined
def id_of(order):
    return np.int64(_MAGNITUDE) - (order & np.int64(_MAGNITUDE))


@inlined
def exponent_of(logit, largest, scale):
    """Binary logarithm of a weight, at least LOWEST_EXPONENT (also where the logit is NaN)."""
    return max(_LOWEST, (min(logit, LARGEST) - largest) * scale)


@inlined
def float_weight(exponent):
    """2 ** (exponent + FRACTION_BITS), not yet rounded to an integer."""
    floor = np.floor(exponent)
    f = exponent - floor
    power = ((((_C5 * f + _C4) * f + _C3) * f + _C2) * f + _C1) * f + _C0
    power = power * f + _ONE
    # The bits of the float 2 ** (floor + FRACTION_BITS); the product with it is exact.
    bits = np.int32(np.int32(np.int32(floor) + _EXPONENT_OFFSET) << np.int32(23))
    return power * bits.view(np.float32)


@inlined
def weight_of(logit, largest, scale):
    return np.int64(float_weight(exponent_of(logit, largest, scale)))
