"""Sampling on the CPU: the same tokens as `reference`, to the bit, without sorting the vocabulary.

A row is read in chunks of CHUNK logits, of which the largest rank key is kept. The k chunks
whose maxima rank highest hold the k likeliest tokens (each of those chunks has a token that
ranks above all the others' tokens), so ranking a few candidates decides top-k. A nucleus is
sought, without ranking it, among the few thousand tokens that may belong to it. Wider ones are
cut with a histogram over the logits.

A cut is one integer: the tokens whose `order_of` is at least the cut are kept.

Letters: S rows, N slots, V vocabulary, C chunks, K candidates, M tokens
known of a sequence (distinct ones), L most log probabilities.
"""

# mypy: allow-untyped-defs, allow-untyped-calls

from __future__ import annotations

import numpy as np

from core.kernels.compile import inlined, kernel
from core.kernels.sampling.constants import LOG2_E, ONE
from core.kernels.sampling.cpu_arithmetic import (
    CHUNK,
    KEEP_ALL,
    KEY_OF_MINUS_INFINITY,
    LARGEST,
    LEAST_KEY,
    exponent_of,
    float_of,
    float_weight,
    id_of,
    order_of,
    pair,
    random_bits,
    rank_key,
    scale_of,
    threshold_of,
    weight_of,
)
from core.kernels.sampling.cpu_histogram import cut_by_histogram
from core.kernels.sampling.cpu_nucleus import ROOM, cut_nucleus

_LOG2_E = np.float32(LOG2_E)


@kernel
def sample_rows(
    logits_SV,
    slots_S,
    positions_S,
    temperatures_N,
    top_ks_N,
    top_ps_N,
    min_ps_N,
    seeds_N,
    penalties_N3,
    history_ids_NM,
    history_counts_NM,
    history_lengths_N,
    token_ids_S,
):
    """Chooses a token for every row and counts it in its slot's history, where one is kept.

    `penalties_N3` is repetition, presence, frequency. `history_lengths_N` is -1 where no
    penalties apply; else history has the distinct tokens known and how often each was
    generated, with room for one more. Logits are float32 and end as they began.
    """
    num_chunks = (logits_SV.shape[1] + CHUNK - 1) // CHUNK
    maxima_C = np.empty(num_chunks, np.int32)
    sums_C = np.empty(num_chunks, np.int64)
    powers_V = np.empty(logits_SV.shape[1], np.float32)
    room_K = np.empty(ROOM, np.int64)
    saved_M = np.empty(history_ids_NM.shape[1], np.float32)
    for s in range(len(slots_S)):
        slot = slots_S[s]
        row_V = logits_SV[s]
        num_known = history_lengths_N[slot]
        if num_known > 0:
            ids_M, counts_M = history_ids_NM[slot, :num_known], history_counts_NM[slot, :num_known]
            _penalise(row_V, ids_M, counts_M, penalties_N3[slot], saved_M)
        token_id = _sample_row(
            row_V,
            temperatures_N[slot],
            top_ks_N[slot],
            top_ps_N[slot],
            min_ps_N[slot],
            random_bits(seeds_N[slot], positions_S[s]),
            maxima_C,
            sums_C,
            powers_V,
            room_K,
        )
        if num_known > 0:
            for i in range(num_known):
                row_V[history_ids_NM[slot, i]] = saved_M[i]
        if num_known >= 0:
            _count(token_id, history_ids_NM[slot], history_counts_NM[slot], history_lengths_N, slot)
        token_ids_S[s] = token_id


@kernel
def log_probabilities(logits_V, token_id, num_top, top_ids_L, top_logprobs_L):
    """Returns the log probability of `token_id`; fills in the `num_top` likeliest ones."""
    num_chunks = (len(logits_V) + CHUNK - 1) // CHUNK
    maxima_C, sums_C = np.empty(num_chunks, np.int32), np.empty(num_chunks, np.int64)
    num_top = min(num_top, len(logits_V))
    largest_key = _chunk_maxima(logits_V.view(np.int32), maxima_C)
    largest = float_of(largest_key)
    powers_V = np.empty(len(logits_V), np.float32)
    _fill_powers(logits_V, largest, _LOG2_E, powers_V)
    total = _chunk_sums(logits_V, powers_V, np.int64(0), KEEP_ALL, sums_C)
    log_total = np.log(np.float64(total) / np.float64(ONE))
    if num_top > 0:
        orders_K = _candidates(logits_V.view(np.int32), maxima_C, num_top)
        orders_K.sort()
        for rank in range(num_top):
            top_id = id_of(orders_K[len(orders_K) - 1 - rank])
            top_ids_L[rank] = top_id
            logit = np.float64(logits_V[top_id])
            top_logprobs_L[rank] = logit - np.float64(largest) - log_total
    return np.float64(logits_V[token_id]) - np.float64(largest) - log_total


@kernel
def _sample_row(row_V, temperature, top_k, top_p, min_p, bits, maxima_C, sums_C, powers_V, room_K):
    bits_V = row_V.view(np.int32)
    largest_key = _chunk_maxima(bits_V, maxima_C)
    if temperature == 0.0 or largest_key <= KEY_OF_MINUS_INFINITY:
        return _first_of_key(bits_V, maxima_C, largest_key)
    largest = min(float_of(largest_key), LARGEST)
    scale = np.float32(scale_of(temperature))
    # A weight of zero cannot be drawn, so 1 is as good a bound as 0.
    least_weight = max(np.int64(min_p * np.float64(ONE)), np.int64(1))
    limits_count = 0 < top_k < len(row_V)
    if limits_count and top_k <= len(maxima_C):
        orders_K = _candidates(bits_V, maxima_C, top_k)
        cut = _cut_candidates(row_V, orders_K, top_k, top_p, largest, scale)
        return _draw_candidate(row_V, orders_K, cut, largest, scale, least_weight, bits)
    _fill_powers(row_V, largest, scale, powers_V)
    if not limits_count and top_p >= 1.0:
        _chunk_sums(row_V, powers_V, least_weight, KEEP_ALL, sums_C)
        return _draw(row_V, largest, scale, least_weight, KEEP_ALL, sums_C, bits)
    if not limits_count:
        total = _chunk_sums(row_V, powers_V, np.int64(0), KEEP_ALL, sums_C)
        orders_K, cut = cut_nucleus(row_V, powers_V, top_p, total, largest, scale, room_K)
        if len(orders_K) > 0:
            return _draw_candidate(row_V, orders_K, cut, largest, scale, least_weight, bits)
    cut = cut_by_histogram(row_V, powers_V, top_k, top_p, largest, scale)
    _chunk_sums(row_V, powers_V, least_weight, cut, sums_C)
    return _draw(row_V, largest, scale, least_weight, cut, sums_C, bits)


@kernel
def _chunk_maxima(bits_V, maxima_C):
    """Fills in the largest rank key of every chunk and returns the largest of all."""
    for c in range(len(maxima_C)):
        chunk = bits_V[c * CHUNK : (c + 1) * CHUNK]
        largest = LEAST_KEY
        for i in range(len(chunk)):
            largest = np.int32(max(largest, rank_key(chunk[i])))
        maxima_C[c] = largest
    return maxima_C.max()


@kernel
def _first_of_key(bits_V, maxima_C, key):
    chunk = 0
    while maxima_C[chunk] != key:
        chunk += 1
    token_id = chunk * CHUNK
    while rank_key(bits_V[token_id]) != key:
        token_id += 1
    return token_id


@kernel
def _fill_powers(row_V, largest, scale, powers_V):
    """Fills in every weight, not yet rounded to an integer."""
    for token_id in range(len(row_V)):
        powers_V[token_id] = float_weight(exponent_of(row_V[token_id], largest, scale))


@kernel
def _chunk_sums(row_V, powers_V, least_weight, cut, sums_C):
    """Fills in every chunk's sum of kept weights and returns the sum of all."""
    kept = np.empty(CHUNK, np.float32)
    total = np.int64(0)
    for c in range(len(sums_C)):
        chunk = powers_V[c * CHUNK : (c + 1) * CHUNK]
        if cut != KEEP_ALL:
            bits = row_V[c * CHUNK : (c + 1) * CHUNK].view(np.int32)
            _drop_below(cut, bits, c * CHUNK, chunk, kept)
            chunk = kept[: len(bits)]
        chunk_sum = np.int64(0)
        for i in range(len(chunk)):
            weight = np.int64(chunk[i])
            chunk_sum += weight if weight >= least_weight else np.int64(0)
        sums_C[c] = chunk_sum
        total += chunk_sum
    return total


@inlined
def _drop_below(cut, bits, first_id, powers, kept):
    """Copies a chunk's weights, those of tokens whose order is below the cut as zero."""
    key, last = np.int32(cut >> np.int64(32)), np.int32(id_of(cut) - first_id)
    for i in range(len(bits)):
        above = np.int32(rank_key(bits[i]) > key)
        level = np.int32(np.int32(rank_key(bits[i]) == key) & np.int32(np.int32(i) <= last))
        kept[i] = powers[i] * np.float32(np.int32(above | level))


@kernel
def _candidates(bits_V, maxima_C, num_chunks):
    """Orders, by ascending id, of the tokens that may be among the `num_chunks` likeliest."""
    pairs_C = np.empty(len(maxima_C), np.int64)
    for c in range(len(maxima_C)):
        pairs_C[c] = pair(maxima_C[c], c)
    least_pair, least_key = KEEP_ALL, LEAST_KEY
    if num_chunks <= len(maxima_C):
        least_pair = _largest_but(num_chunks - 1, pairs_C.copy())
        least_key = np.int32(least_pair >> np.int64(32))
    orders_K = np.empty(num_chunks * CHUNK, np.int64)
    count = 0
    for c in range(len(maxima_C)):
        if pairs_C[c] >= least_pair:
            for token_id in range(c * CHUNK, min((c + 1) * CHUNK, len(bits_V))):
                if rank_key(bits_V[token_id]) >= least_key:
                    orders_K[count] = order_of(bits_V[token_id], token_id)
                    count += 1
    return orders_K[:count]


@kernel
def _largest_but(rank, values):
    """The value that `rank` others exceed, by quickselect (Hoare 1961); reorders the values."""
    # numba's own np.partition does the same and takes seconds to compile.
    low, high = 0, len(values) - 1
    while low < high:
        pivot = values[(low + high) // 2]
        i, j = low, high
        while i <= j:
            while values[i] > pivot:
                i += 1
            while values[j] < pivot:
                j -= 1
            if i <= j:
                values[i], values[j] = values[j], values[i]
                i += 1
                j -= 1
        if rank <= j:
            high = j
        elif rank >= i:
            low = i
        else:
            break
    return values[rank]


@kernel
def _cut_candidates(row_V, orders_K, top_k, top_p, largest, scale):
    """The cut of top-k and top-p."""
    ranked_K = np.sort(orders_K)[::-1]
    top_k = min(top_k, len(ranked_K))
    if top_p >= 1.0:
        return ranked_K[top_k - 1]
    total = np.int64(0)
    for rank in range(top_k):
        total += weight_of(row_V[id_of(ranked_K[rank])], largest, scale)
    needed = np.int64(top_p * np.float64(total))
    rank = 0
    mass = weight_of(row_V[id_of(ranked_K[0])], largest, scale)
    while mass < needed:
        rank += 1
        mass += weight_of(row_V[id_of(ranked_K[rank])], largest, scale)
    return ranked_K[rank]


@kernel
def _draw(row_V, largest, scale, least_weight, cut, sums_C, bits):
    """The first token, by id, at which the running sum of kept weights exceeds the threshold."""
    rest = threshold_of(sums_C.sum(), bits)
    chunk = 0
    while rest >= sums_C[chunk]:
        rest -= sums_C[chunk]
        chunk += 1
    bits_V = row_V.view(np.int32)
    for token_id in range(chunk * CHUNK, len(row_V)):
        weight = weight_of(row_V[token_id], largest, scale)
        if weight >= least_weight and order_of(bits_V[token_id], token_id) >= cut:
            if rest < weight:
                return token_id
            rest -= weight
    return len(row_V) - 1


@kernel
def _draw_candidate(row_V, orders_K, cut, largest, scale, least_weight, bits):
    """The same draw where all kept tokens are among the candidates."""
    weights_K = np.zeros(len(orders_K), np.int64)
    for k in range(len(orders_K)):
        weight = weight_of(row_V[id_of(orders_K[k])], largest, scale)
        if orders_K[k] >= cut and weight >= least_weight:
            weights_K[k] = weight
    rest = threshold_of(weights_K.sum(), bits)
    chosen = 0
    while rest >= weights_K[chosen]:
        rest -= weights_K[chosen]
        chosen += 1
    return id_of(orders_K[chosen])


@kernel
def _penalise(row_V, ids_M, counts_M, penalties_3, saved_M):
    """Penalises the known tokens in place and saves their logits."""
    repetition, presence, frequency = penalties_3
    for i in range(len(ids_M)):
        logit = row_V[ids_M[i]]
        saved_M[i] = logit
        logit = logit / repetition if logit > 0 else logit * repetition
        logit -= frequency * np.float32(counts_M[i])
        row_V[ids_M[i]] = logit - presence if counts_M[i] > 0 else logit


@kernel
def _count(token_id, ids_M, counts_M, history_lengths_N, slot):
    """Counts a generated token."""
    length = history_lengths_N[slot]
    for i in range(length):
        if ids_M[i] == token_id:
            counts_M[i] += 1
            return
    ids_M[length] = token_id
    counts_M[length] = 1
    history_lengths_N[slot] = length + 1
