"""Numbers that every version of the sampling kernel shares, so that all agree to the bit."""

from __future__ import annotations

# A token's weight is exp((logit - largest logit) / temperature) as an integer with this many
# fractional bits: sums of integers are exact, so neither the order of a sum nor the width of
# a vector can change a result. 2^18 tokens of weight 1 still fit into 63 bits by far.
FRACTION_BITS = 40
ONE = 1 << FRACTION_BITS

# 2^f = 1 + f * (C0 + C1 f + ...) on [0, 1): a least-maximum fit, relative error below 1e-7 in
# float32 arithmetic. Exactly 1 at f = 0, so that the likeliest token weighs exactly ONE.
EXP2_COEFFICIENTS = (
    0.6931470632553101,
    0.2402293086051941,
    0.055485282093286514,
    0.009675451554358006,
    0.0012467845808714628,
    0.00021612914861179888,
)
# Below 2^-45 a weight is zero in any case; bounds the shift.
LOWEST_EXPONENT = -45.0
LARGEST_FLOAT = 3.4028234663852886e38
LOG2_E = 1.4426950408889634

# Philox4x32-10 (Salmon et al. 2011, "Parallel Random Numbers: As Easy as 1, 2, 3").
PHILOX_ROUNDS = 10
PHILOX_MULTIPLIER_0 = 0xD2511F53
PHILOX_MULTIPLIER_1 = 0xCD9E8D57
PHILOX_WEYL_0 = 0x9E3779B9
PHILOX_WEYL_1 = 0xBB67AE85


def exponent_scale(temperature: float) -> float:
    """What a logit difference is multiplied by to become a power of two.

    Bounded, so that 0 times it is 0 at the smallest temperatures.
    """
    return LOG2_E / max(temperature, 1e-30)
