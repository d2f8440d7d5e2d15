"""The cut of top-p where the nucleus is small, without ranking the tokens that may belong to it.

Letters: V vocabulary, K tokens that may belong to the nucleus.
"""

# mypy: allow-untyped-defs, allow-untyped-calls

from __future__ import annotations

import numpy as np

from core.kernels.arithmetic import LANES
from core.kernels.compile import kernel
from core.kernels.sampling.constants import ONE
from core.kernels.sampling.cpu_arithmetic import KEEP_ALL, id_of, order_of
from core.kernels.vectors import address, lanes_at_least, load_floats, splat, trailing_zeros

# A nucleus is sought among the tokens that weigh at least so many times the share of each token
# in what it may leave out, if they are not too many. With 1, none that is lighter can belong to it.
GUESSES = (32.0, 8.0, 1.0)
MOST_CANDIDATES = 8192
ROOM = MOST_CANDIDATES + LANES  # a vector more: candidates are counted after each


@kernel
def cut_nucleus(row_V, powers_V, top_p, total, largest, scale, room_K):
    """Orders, by ascending id, of tokens among which the nucleus lies, and its cut.

    No orders where the nucleus is wide. `room_K` holds them.
    """
    needed = max(np.int64(top_p * np.float64(total)), np.int64(1))
    share = (1.0 - top_p) * np.float64(total) / np.float64(ONE) / len(row_V)
    for guess in GUESSES:
        # By logit: a weight's last bit may contradict the rank.
        floor = largest + np.float32(np.log2(guess * share) / scale)
        orders_K = _tokens_above(row_V, floor, room_K)
        if _mass(powers_V, orders_K) >= needed:
            return orders_K, _cut_by_mass(powers_V, orders_K.copy(), needed)
    return room_K[:0], KEEP_ALL


@kernel
def _tokens_above(row_V, floor, room_K):
    """Orders, by ascending id, of the tokens whose logits are at least `floor`.

    None where they are more than MOST_CANDIDATES. `room_K` holds them.
    """
    bits_V, where = row_V.view(np.int32), address(row_V)
    count, floors = 0, splat(floor)
    num_vectors = len(row_V) // LANES
    for vector in range(num_vectors):
        first = vector * LANES
        lanes = lanes_at_least(load_floats(where + first * 4), floors)
        while lanes != 0:
            token_id = first + trailing_zeros(lanes)
            room_K[count] = order_of(bits_V[token_id], token_id)
            count += 1
            lanes &= lanes - np.uint32(1)
        if count > MOST_CANDIDATES:
            return room_K[:0]
    for token_id in range(num_vectors * LANES, len(row_V)):
        if row_V[token_id] >= floor:
            room_K[count] = order_of(bits_V[token_id], token_id)
            count += 1
    return room_K[:count]


@kernel
def _mass(powers_V, orders_K):
    """What tokens weigh together."""
    mass = np.int64(0)
    for k in range(len(orders_K)):
        mass += np.int64(powers_V[id_of(orders_K[k])])
    return mass


@kernel
def _cut_by_mass(powers_V, orders_K, needed):
    """The greatest order from which on upwards tokens weigh what is needed; reorders the orders.

    A quickselect (Hoare 1961) that goes by mass instead of rank. All must weigh enough.
    """
    low, high, above = np.int64(0), np.int64(len(orders_K) - 1), np.int64(0)
    while low < high:
        middle = (low + high) // 2
        pivot = orders_K[middle]
        orders_K[middle] = orders_K[high]
        split, mass = low, above
        for k in range(low, high):
            # Without a branch, which could not be foretold.
            order = orders_K[k]
            orders_K[k] = orders_K[split]
            orders_K[split] = order
            is_above = np.int64(order > pivot)
            split += is_above
            mass += is_above * np.int64(powers_V[id_of(order)])
        orders_K[high] = orders_K[split]
        orders_K[split] = pivot
        if split > low and mass >= needed:
            high = split - 1
        else:
            above = mass + np.int64(powers_V[id_of(pivot)])
            if above >= needed:
                return pivot
            low = split + 1
    return orders_K[low]
