"""The cut of top-k and top-p by a histogram of weights over logits: for filters that keep more
tokens than it pays to rank.

Letters: V vocabulary, B histogram buckets, K tokens of one bucket.
"""

# mypy: allow-untyped-defs, allow-untyped-calls

from __future__ import annotations

import numpy as np

from core.kernels.compile import kernel
from core.kernels.sampling.constants import LOWEST_EXPONENT
from core.kernels.sampling.cpu_arithmetic import (
    CHUNK,
    KEEP_ALL,
    exponent_of,
    id_of,
    order_of,
    weight_of,
)

NUM_BUCKETS = 2048
_BUCKET_SCALE = np.float32((NUM_BUCKETS - 1) / -LOWEST_EXPONENT)


@kernel
def cut_by_histogram(row_V, powers_V, top_k, top_p, largest, scale):
    """The cut of top-k and top-p, whatever the width of what they keep."""
    counts_B, masses_B = np.zeros(NUM_BUCKETS, np.int64), np.zeros(NUM_BUCKETS, np.int64)
    # Bucket 0 has the likeliest; the last has only weights of zero.
    buckets_V = np.empty(len(row_V), np.int32)
    _fill_histogram(row_V, powers_V, largest, scale, counts_B, masses_B, buckets_V)
    cut, total = KEEP_ALL, masses_B.sum()
    if 0 < top_k < len(row_V):
        bucket = 0
        above, mass = np.int64(0), np.int64(0)
        while above + counts_B[bucket] < top_k:
            above += counts_B[bucket]
            mass += masses_B[bucket]
            bucket += 1
        ranked_K = _rank_bucket(row_V, buckets_V, bucket, counts_B[bucket])
        cut, total = ranked_K[top_k - above - 1], mass
        for rank in range(top_k - above):
            total += weight_of(row_V[id_of(ranked_K[rank])], largest, scale)
    if top_p >= 1.0:
        return cut
    needed = np.int64(top_p * np.float64(total))
    bucket = 0
    mass = np.int64(0)
    while mass + masses_B[bucket] < needed:
        mass += masses_B[bucket]
        bucket += 1
    ranked_K = _rank_bucket(row_V, buckets_V, bucket, counts_B[bucket])
    rank = 0
    mass += weight_of(row_V[id_of(ranked_K[0])], largest, scale)
    while mass < needed:
        rank += 1
        mass += weight_of(row_V[id_of(ranked_K[rank])], largest, scale)
    return max(cut, ranked_K[rank])


@kernel
def _fill_histogram(row_V, powers_V, largest, scale, counts_B, masses_B, buckets_V):
    """Counts and weighs every bucket, and notes the bucket of every token."""
    weights = np.empty(CHUNK, np.int64)
    for first in range(0, len(row_V), CHUNK):
        chunk, buckets = row_V[first : first + CHUNK], buckets_V[first : first + CHUNK]
        powers = powers_V[first : first + CHUNK]
        for i in range(len(chunk)):
            buckets[i] = np.int32(-exponent_of(chunk[i], largest, scale) * _BUCKET_SCALE)
        for i in range(len(chunk)):
            weights[i] = np.int64(powers[i])
        for i in range(len(chunk)):
            # Unsigned, so that numba compiles no test for an index from the end.
            bucket = np.uint64(buckets[i])
            counts_B[bucket] += 1
            masses_B[bucket] += weights[i]


@kernel
def _rank_bucket(row_V, buckets_V, bucket, count):
    """Orders of the tokens of one bucket, likeliest first."""
    bits_V = row_V.view(np.int32)
    orders_K = np.empty(count, np.int64)
    filled = 0
    for first in range(0, len(row_V), CHUNK):
        buckets = buckets_V[first : first + CHUNK]
        found = np.int32(0)
        for i in range(len(buckets)):
            found = np.int32(found | np.int32(buckets[i] == bucket))
        if found:
            for i in range(len(buckets)):
                if buckets[i] == bucket:
                    orders_K[filled] = order_of(bits_V[first + i], first + i)
                    filled += 1
    orders_K.sort()
    return orders_K[::-1]
