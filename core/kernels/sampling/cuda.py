"""Sampling on CUDA: the same tokens as `reference`, to the bit.

The likeliest token of a row is found by several blocks, which is all that greedy sampling
needs; a token is drawn by one block a row. All decisions of a draw are made by one primitive,
`_descend`: it finds, digit by digit (a radix select), where the sum of integer values, taken
from the greatest code down, reaches a bound. The codes are ranks with counts for top-k and
with weights for top-p, and ids with weights for the draw. Integer sums are exact, so the order
of atomic additions is of no matter.

Log probabilities are not made here. Letters: S rows, V vocabulary (below 2^24), M known tokens.
"""

# mypy: allow-untyped-defs, allow-untyped-calls, disable-error-code="attr-defined"

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from numba import cuda

from core.kernels.cuda_launch import Launch
from core.kernels.sampling.constants import (
    EXP2_COEFFICIENTS,
    LARGEST_FLOAT,
    LOWEST_EXPONENT,
    ONE,
    PHILOX_MULTIPLIER_0,
    PHILOX_MULTIPLIER_1,
    PHILOX_ROUNDS,
    PHILOX_WEYL_0,
    PHILOX_WEYL_1,
    exponent_scale,
)

THREADS = 512
LIKELIEST_THREADS = 256
ELEMENTS_PER_BLOCK = 4096
DIGIT_BITS = 8
NUM_DIGITS = 1 << DIGIT_BITS
ID_BITS = 24
LAST_ID = (1 << ID_BITS) - 1
RANK_BITS = 32 + ID_BITS

COUNT, MASS, DRAW = 0, 1, 2

_C0, _C1, _C2, _C3, _C4, _C5 = (np.float32(value) for value in EXP2_COEFFICIENTS)
_FIXED_POINT, _UNIT = np.float32(ONE), np.float32(1.0)
_LOWEST, _LARGEST = np.float32(LOWEST_EXPONENT), np.float32(LARGEST_FLOAT)
_WORD, _32 = np.uint64(0xFFFFFFFF), np.uint64(32)
_M0, _M1 = np.uint64(PHILOX_MULTIPLIER_0), np.uint64(PHILOX_MULTIPLIER_1)
_W0, _W1 = np.uint64(PHILOX_WEYL_0), np.uint64(PHILOX_WEYL_1)
CODE_OF_MINUS_INFINITY = 0x007FFFFF


class RowParameters(NamedTuple):
    """Parameters of every row, ready for the kernel; host arrays until moved to the device.

    All of eight bytes, so that they can travel as one array.
    """

    scales_S: Any  # float64 that float32 holds exactly; 0 where greedy
    top_ks_S: Any  # int64; 0 keeps all
    top_ps_S: Any  # float64
    least_weights_S: Any  # int64
    seeds_S: Any  # the bits of a uint64 as int64
    positions_S: Any  # int64


def row_parameters(
    *,
    temperatures_S: Any,
    top_ks_S: Any,
    top_ps_S: Any,
    min_ps_S: Any,
    seeds_S: Any,
    positions_S: Any,
) -> RowParameters:
    """Turns sampling parameters into what the kernel computes with."""
    scales = [0.0 if value == 0.0 else exponent_scale(value) for value in temperatures_S]
    return RowParameters(
        np.array(scales, np.float32).astype(np.float64),
        np.array(top_ks_S, np.int64),
        np.array(top_ps_S, np.float64),
        np.array([max(1, int(min_p * ONE)) for min_p in min_ps_S], np.int64),
        np.array(seeds_S, np.uint64).view(np.int64),
        np.array(positions_S, np.int64),
    )


def penalise(
    logits_SV: Any,
    *,
    ids_SM: Any,
    counts_SM: Any,
    lengths_S: Any,
    penalties_S3: Any,
    launch: Launch,
) -> None:
    """Penalises the known tokens of every row in place.

    The first `lengths_S[s]` of a row's ids are known and distinct; counts say how often each
    was generated; penalties are repetition, presence, frequency, in float32.
    """
    penalise_kernel[logits_SV.shape[0], launch.threads(THREADS), launch.stream](
        logits_SV, ids_SM, counts_SM, lengths_S, penalties_S3
    )


def rank_likeliest(logits_SV: Any, ranks_S: Any, *, launch: Launch) -> None:
    """Writes the rank of every row's likeliest token over `ranks_S`, int64, zero before."""
    num_rows, vocab_size = logits_SV.shape
    grid = (-(-vocab_size // ELEMENTS_PER_BLOCK), num_rows)
    threads = launch.threads(LIKELIEST_THREADS)
    likeliest_kernel[grid, threads, launch.stream](logits_SV, ranks_S)


def sample_rows(
    logits_SV: Any, ranks_S: Any, parameters: RowParameters, token_ids_S: Any, *, launch: Launch
) -> None:
    """Chooses a token for every row of float32 logits, whose likeliest have been ranked."""
    sample_kernel[logits_SV.shape[0], launch.threads(THREADS), launch.stream](
        logits_SV, ranks_S, *parameters, token_ids_S
    )


def token_ids_of(ranks_S: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """The tokens that have these ranks."""
    return LAST_ID - (ranks_S & LAST_ID)


@cuda.jit
def penalise_kernel(logits_SV, ids_SM, counts_SM, lengths_S, penalties_S3):
    row = cuda.blockIdx.x
    repetition = penalties_S3[row, 0]
    presence, frequency = penalties_S3[row, 1], penalties_S3[row, 2]
    for i in range(cuda.threadIdx.x, lengths_S[row], cuda.blockDim.x):
        token_id, count = ids_SM[row, i], counts_SM[row, i]
        logit = logits_SV[row, token_id]
        logit = logit / repetition if logit > 0 else _rounded(logit * repetition)
        logit -= _rounded(frequency * np.float32(count))
        logits_SV[row, token_id] = logit - presence if count > 0 else logit


@cuda.jit
def likeliest_kernel(logits_SV, ranks_S):
    largest = cuda.shared.array(1, np.int64)
    row, thread = cuda.blockIdx.y, cuda.threadIdx.x
    first = cuda.blockIdx.x * ELEMENTS_PER_BLOCK
    end = min(first + ELEMENTS_PER_BLOCK, logits_SV.shape[1])
    rank = np.int64(0)
    for token_id in range(first + thread, end, cuda.blockDim.x):
        rank = max(rank, _rank(logits_SV[row, token_id], token_id))
    if thread == 0:
        largest[0] = 0
    cuda.syncthreads()
    cuda.atomic.max(largest, 0, rank)
    cuda.syncthreads()
    if thread == 0:
        cuda.atomic.max(ranks_S, row, largest[0])


@cuda.jit
def sample_kernel(
    logits_SV,
    ranks_S,
    scales_S,
    top_ks_S,
    top_ps_S,
    least_weights_S,
    seeds_S,
    positions_S,
    token_ids_S,
):
    sums = cuda.shared.array(NUM_DIGITS, np.int64)
    state = cuda.shared.array(2, np.int64)
    row = cuda.blockIdx.x
    logits_V, scale = logits_SV[row], np.float32(scales_S[row])
    likeliest = ranks_S[row]
    token_id = LAST_ID - (likeliest & LAST_ID)
    if scale > 0 and (likeliest >> ID_BITS) > CODE_OF_MINUS_INFINITY:
        largest = _finite(logits_V[token_id])
        cut, one = np.int64(0), np.int64(1)
        top_k, top_p = top_ks_S[row], top_ps_S[row]
        if 0 < top_k < logits_V.shape[0]:
            cut = _descend(logits_V, COUNT, cut, one, top_k, largest, scale, sums, state)
        if top_p < 1.0:
            total = _total(logits_V, cut, one, largest, scale, state)
            needed = max(np.int64(top_p * np.float64(total)), one)
            cut = _descend(logits_V, MASS, cut, one, needed, largest, scale, sums, state)
        least = least_weights_S[row]
        total = _total(logits_V, cut, least, largest, scale, state)
        needed = (
            _threshold(np.uint64(total), _random_bits(np.uint64(seeds_S[row]), positions_S[row]))
            + one
        )
        drawn = _descend(logits_V, DRAW, cut, least, needed, largest, scale, sums, state)
        token_id = LAST_ID - drawn
    if cuda.threadIdx.x == 0:
        token_ids_S[row] = token_id


@cuda.jit(device=True)
def _total(logits_V, cut, least_weight, largest, scale, state):
    """The sum of the kept weights."""
    total = np.int64(0)
    for token_id in range(cuda.threadIdx.x, logits_V.shape[0], cuda.blockDim.x):
        if _rank(logits_V[token_id], token_id) >= cut:
            weight = _weight(logits_V[token_id], largest, scale)
            if weight >= least_weight:
                total += weight
    cuda.syncthreads()
    if cuda.threadIdx.x == 0:
        state[0] = 0
    cuda.syncthreads()
    cuda.atomic.add(state, 0, total)
    cuda.syncthreads()
    return state[0]


@cuda.jit(device=True)
def _descend(logits_V, mode, cut, least_weight, needed, largest, scale, sums, state):
    """The greatest code such that the values of the codes from it upwards sum to `needed`.

    COUNT and MASS: codes are ranks of tokens at or above the cut, values 1 or their weights.
    DRAW: codes are LAST_ID - id, values the kept weights. The sum of all is at least `needed`.
    """
    thread, threads = cuda.threadIdx.x, cuda.blockDim.x
    prefix = np.int64(0)
    shift = (ID_BITS if mode == DRAW else RANK_BITS) - DIGIT_BITS
    while shift >= 0:
        cuda.syncthreads()
        for digit in range(thread, NUM_DIGITS, threads):
            sums[digit] = 0
        cuda.syncthreads()
        for token_id in range(thread, logits_V.shape[0], threads):
            rank = _rank(logits_V[token_id], token_id)
            code = np.int64(LAST_ID - token_id) if mode == DRAW else rank
            if rank >= cut and code >> (shift + DIGIT_BITS) == prefix:
                value = np.int64(1)
                if mode != COUNT:
                    value = _weight(logits_V[token_id], largest, scale)
                if value >= least_weight:
                    cuda.atomic.add(sums, (code >> shift) & (NUM_DIGITS - 1), value)
        cuda.syncthreads()
        if thread == 0:
            digit = NUM_DIGITS - 1
            while digit > 0 and sums[digit] < needed:
                needed -= sums[digit]
                digit -= 1
            state[0], state[1] = digit, needed
        cuda.syncthreads()
        prefix, needed = (prefix << DIGIT_BITS) | state[0], state[1]
        shift -= DIGIT_BITS
    return prefix


@cuda.jit(device=True)
def _rank(logit, token_id):
    """Greater is likelier, and among equals the lower id; NaN ranks last."""
    bits = np.int64(logit.view(np.int32))
    code = bits + (1 << 31) if bits >= 0 else (bits ^ 0x7FFFFFFF) + (1 << 31)
    if logit != logit:
        code = np.int64(0)
    return (code << ID_BITS) | np.int64(LAST_ID - token_id)


@cuda.jit(device=True)
def _finite(logit):
    return _LARGEST if logit > _LARGEST else logit


@cuda.jit(device=True)
def _rounded(product):
    """The product itself. The maximum keeps the compiler from contracting it with a sum into
    a fused multiply-add, which would round once and not twice as everywhere else."""
    return max(product, -_LARGEST)


@cuda.jit(device=True)
def _weight(logit, largest, scale):
    """2 ** exponent in fixed point, rounded down."""
    exponent = (_finite(logit) - largest) * scale
    # Written so that NaN becomes the lowest, too.
    exponent = exponent if exponent > _LOWEST else _LOWEST
    floor = math.floor(exponent)
    f = exponent - np.float32(floor)
    power = _rounded(_C5 * f) + _C4
    power = _rounded(power * f) + _C3
    power = _rounded(power * f) + _C2
    power = _rounded(power * f) + _C1
    power = _rounded(power * f) + _C0
    power = _rounded(power * f) + _UNIT
    return np.int64(power * _FIXED_POINT) >> np.int64(-floor)


@cuda.jit(device=True)
def _random_bits(seed, position):
    """64 bits of Philox4x32-10 with counter (position, 0, 0, 0) and the seed as key."""
    c0, c1, c2, c3 = np.uint64(position), np.uint64(0), np.uint64(0), np.uint64(0)
    k0, k1 = seed & _WORD, seed >> _32
    for _ in range(PHILOX_ROUNDS):
        product_0, product_1 = _M0 * c0, _M1 * c2
        c0 = (product_1 >> _32) ^ c1 ^ k0
        c2 = (product_0 >> _32) ^ c3 ^ k1
        c1, c3 = product_1 & _WORD, product_0 & _WORD
        k0, k1 = (k0 + _W0) & _WORD, (k1 + _W1) & _WORD
    return (c0 << _32) | c1


@cuda.jit(device=True)
def _threshold(total, bits):
    """total * bits / 2^64, rounded down."""
    low = (total & _WORD) * (bits & _WORD)
    middle_0 = (total >> _32) * (bits & _WORD) + (low >> _32)
    middle_1 = (total & _WORD) * (bits >> _32) + (middle_0 & _WORD)
    return np.int64((total >> _32) * (bits >> _32) + (middle_0 >> _32) + (middle_1 >> _32))
