"""Choosing a token from logits, in the order that Hugging Face's processors have:

1. log probabilities, where asked for, from the raw logits
2. repetition, then frequency, then presence penalty
3. greedy: the largest logit; the lowest id among equals. Otherwise:
4. temperature
5. top-k, 6. top-p among what top-k left, 7. min-p relative to the likeliest token
8. one uniform number of Philox(seed, position); the first token, in order of ids, at which
   the running sum of the kept tokens' weights exceeds it

(vLLM applies min-p before top-k and top-p; there a nucleus is a share of what min-p left.)

Tokens are ranked by logit, equals by id, so top-k keeps exactly k tokens and top-p the
smallest set. -0.0 ranks below +0.0, and a NaN below everything: it is never chosen unless
all logits are NaN, where the answer is token 0. Weights are integers (see `constants`):
every version of this kernel returns the same token, to the bit.

Letters: V vocabulary, M tokens of a sequence so far.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

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

FloatArray = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int32]
WeightArray = npt.NDArray[np.int64]
MaskArray = npt.NDArray[np.bool_]

WORD = 0xFFFFFFFF


class Logprobs(NamedTuple):
    """Natural logarithms of probabilities at temperature 1."""

    chosen: float
    top_token_ids: list[int]
    top_logprobs: list[float]


def philox_4x32(counter: tuple[int, ...], key: tuple[int, int]) -> tuple[int, ...]:
    """Four random 32-bit words for a counter of four words and a key of two."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(PHILOX_ROUNDS):
        product_0, product_1 = PHILOX_MULTIPLIER_0 * c0, PHILOX_MULTIPLIER_1 * c2
        c0, c1, c2, c3 = (
            (product_1 >> 32) ^ c1 ^ k0,
            product_1 & WORD,
            (product_0 >> 32) ^ c3 ^ k1,
            product_0 & WORD,
        )
        k0, k1 = (k0 + PHILOX_WEYL_0) & WORD, (k1 + PHILOX_WEYL_1) & WORD
    return c0, c1, c2, c3


def random_bits(seed: int, position: int) -> int:
    """The 64 random bits of the token at `position`; the seed has 64 bits."""
    words = philox_4x32((position, 0, 0, 0), (seed & WORD, seed >> 32))
    return words[0] << 32 | words[1]


def rank_keys(logits_V: FloatArray) -> IntArray:
    """Integers in the order of the logits; NaN is the least."""
    bits_V = logits_V.view(np.int32)
    keys_V = bits_V ^ ((bits_V >> 31) & 0x7FFFFFFF)
    return np.where(np.isnan(logits_V), np.iinfo(np.int32).min, keys_V).astype(np.int32)


def penalise(
    logits_V: FloatArray,
    token_ids_M: IntArray,
    *,
    num_prompt_tokens: int,
    repetition_penalty: float,
    presence_penalty: float,
    frequency_penalty: float,
) -> FloatArray:
    """Logits after penalties: repetition looks at prompt and output, the others at output."""
    vocab_size = len(logits_V)
    present_V = np.bincount(token_ids_M, minlength=vocab_size) > 0
    counts_V = np.bincount(token_ids_M[num_prompt_tokens:], minlength=vocab_size)
    factor = np.float32(repetition_penalty)
    repeated_V = np.where(logits_V > 0, logits_V / factor, logits_V * factor)
    result_V = np.where(present_V, repeated_V, logits_V)
    result_V = result_V - np.float32(frequency_penalty) * counts_V.astype(np.float32)
    return result_V - np.float32(presence_penalty) * (counts_V > 0).astype(np.float32)


def fixed_point_weights(logits_V: FloatArray, temperature: float) -> WeightArray:
    """exp((logit - largest) / temperature) with FRACTION_BITS fractional bits, rounded down."""
    finite_V = np.minimum(logits_V, np.float32(LARGEST_FLOAT))
    numbers = finite_V[~np.isnan(finite_V)]
    largest = numbers.max() if numbers.size else np.float32(0)
    largest = max(largest, np.float32(-LARGEST_FLOAT))
    with np.errstate(over="ignore"):
        exponents_V = (finite_V - largest) * np.float32(exponent_scale(temperature))
    lowest = np.float32(LOWEST_EXPONENT)
    exponents_V = np.where(exponents_V > lowest, exponents_V, lowest)
    floors_V = np.floor(exponents_V)
    fractions_V = exponents_V - floors_V
    powers_V = np.full_like(fractions_V, np.float32(EXP2_COEFFICIENTS[-1]))
    for coefficient in (*EXP2_COEFFICIENTS[-2::-1], 1.0):
        powers_V = powers_V * fractions_V + np.float32(coefficient)
    scaled_V = (powers_V * np.float32(ONE)).astype(np.int64)
    return scaled_V >> (-floors_V).astype(np.int64)


def kept_tokens(
    keys_V: IntArray, weights_V: WeightArray, *, top_k: int, top_p: float, min_p: float
) -> MaskArray:
    """Which tokens the filters leave; the likeliest always stays."""
    ranked = np.argsort(-keys_V.astype(np.int64), kind="stable")
    if top_k > 0:
        ranked = ranked[:top_k]
    if top_p < 1.0:
        sums = np.cumsum(weights_V[ranked])
        needed = int(top_p * float(sums[-1]))
        ranked = ranked[: int(np.searchsorted(sums, needed)) + 1]
    ranked = np.concatenate([ranked[:1], ranked[1:][weights_V[ranked[1:]] >= int(min_p * ONE)]])
    kept_V = np.zeros(len(keys_V), np.bool_)
    kept_V[ranked] = True
    return kept_V


def draw(weights_V: WeightArray, kept_V: MaskArray, bits: int) -> int:
    """Inverse of the cumulative distribution at bits / 2^64, in order of ids."""
    sums_V = np.cumsum(np.where(kept_V, weights_V, 0))
    threshold = (int(sums_V[-1]) * bits) >> 64
    return int(np.searchsorted(sums_V, threshold, side="right"))


def sample(
    logits_V: FloatArray,
    *,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    seed: int,
    position: int,
) -> int:
    """The token of one row of logits, penalties already applied."""
    keys_V = rank_keys(logits_V)
    weights_V = fixed_point_weights(logits_V, temperature or 1.0)
    if temperature == 0.0 or not weights_V.any():
        return int(np.argmax(keys_V))
    kept_V = kept_tokens(keys_V, weights_V, top_k=top_k, top_p=top_p, min_p=min_p)
    return draw(weights_V, kept_V, random_bits(seed, position))


def log_probabilities(logits_V: FloatArray, token_id: int, num_top: int) -> Logprobs:
    """Log probabilities of the chosen token and of the `num_top` likeliest, likeliest first."""
    weight = fixed_point_weights(logits_V, 1.0).sum() / ONE
    logprobs_V = logits_V.astype(np.float64) - logits_V.max() - np.log(weight)
    top = np.argsort(-rank_keys(logits_V).astype(np.int64), kind="stable")[:num_top]
    return Logprobs(
        float(logprobs_V[token_id]), top.tolist(), [float(value) for value in logprobs_V[top]]
    )
