"""Rotary position embedding (Su et al. 2021, "RoFormer") and the KV write that follows it.

Heads are rotated by halves: element i pairs with element i + D/2 (the Hugging Face
convention). Scaling of the frequencies beyond the trained context:

- linear: Chen et al. 2023, "Extending Context Window ... via Positional Interpolation"
- llama3: "The Llama 3 Herd of Models" (2024) and its reference code
- yarn: Peng et al. 2023, "YaRN: Efficient Context Window Extension", sections 3.2 to 3.4,
  with its defaults alpha = 1 and beta = 32 turns

Letters: T rows, N heads, K KV heads, D elements in a head, F = D/2 frequencies,
L positions in a table, B blocks of the cache, P positions in a block.
"""

from __future__ import annotations

import math
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float32]
WideArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int32]

YARN_FEWEST_TURNS = 1.0
YARN_MOST_TURNS = 32.0


class Scaling(Protocol):
    """How frequencies are stretched; the fields of a model's rope scaling."""

    @property
    def kind(self) -> str: ...
    @property
    def factor(self) -> float: ...
    @property
    def low_freq_factor(self) -> float: ...
    @property
    def high_freq_factor(self) -> float: ...
    @property
    def original_context_length(self) -> int: ...
    @property
    def factors(self) -> tuple[float, ...] | None: ...


class RotaryTables(NamedTuple):
    """Cosine and sine of every position and frequency, float32, C order."""

    cos_LF: FloatArray
    sin_LF: FloatArray


def rotary_frequencies(*, head_dim: int, theta: float, scaling: Scaling | None) -> WideArray:
    """Radians per position of each pair, F of them, after scaling."""
    frequencies_F = theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    if scaling is None:
        return frequencies_F
    if scaling.factors is not None:
        return frequencies_F / np.asarray(scaling.factors, np.float64)
    if scaling.kind == "linear":
        return frequencies_F / scaling.factor
    if scaling.kind == "llama3":
        return _blend(frequencies_F, scaling.factor, _llama3_kept_share(frequencies_F, scaling))
    if scaling.kind == "yarn":
        kept_F = _yarn_kept_share(head_dim, theta, scaling.original_context_length)
        return _blend(frequencies_F, scaling.factor, kept_F)
    raise ValueError(f"rope scaling {scaling.kind!r} is none of linear, llama3, yarn")


def rotary_tables(
    *, head_dim: int, theta: float, scaling: Scaling | None, num_positions: int
) -> RotaryTables:
    """Tables for positions 0 to `num_positions` - 1. YaRN's attention temperature is folded in."""
    frequencies_F = rotary_frequencies(head_dim=head_dim, theta=theta, scaling=scaling)
    angles_LF = np.outer(np.arange(num_positions, dtype=np.float64), frequencies_F)
    magnitude = _magnitude(scaling)
    return RotaryTables(
        (magnitude * np.cos(angles_LF)).astype(np.float32),
        (magnitude * np.sin(angles_LF)).astype(np.float32),
    )


def rotate(x_TND: FloatArray, positions_T: IntArray, tables: RotaryTables) -> FloatArray:
    """Rotates every head of every row by the angles of the row's position."""
    half = x_TND.shape[-1] // 2
    first_TNF, second_TNF = x_TND[..., :half], x_TND[..., half:]
    cos_T1F = tables.cos_LF[positions_T][:, None, :]
    sin_T1F = tables.sin_LF[positions_T][:, None, :]
    rotated = (
        first_TNF * cos_T1F - second_TNF * sin_T1F,
        second_TNF * cos_T1F + first_TNF * sin_T1F,
    )
    return np.concatenate(rotated, axis=-1).astype(np.float32)


def rotate_and_write(
    q_TND: FloatArray,
    k_TKD: FloatArray,
    v_TKD: FloatArray,
    *,
    positions_T: IntArray,
    block_ids_T: IntArray,
    tables: RotaryTables,
    keys_BPKD: FloatArray,
    values_BPKD: FloatArray,
) -> FloatArray:
    """Rotates q and k, writes k and v into the cache in place, and returns the rotated q.

    `block_ids_T[t]` is the block that holds row t's position; within it the row goes to
    position % P. Every other element of the cache is left alone.
    """
    offsets_T = positions_T % keys_BPKD.shape[1]
    keys_BPKD[block_ids_T, offsets_T] = rotate(k_TKD, positions_T, tables)
    values_BPKD[block_ids_T, offsets_T] = v_TKD
    return rotate(q_TND, positions_T, tables)


def _blend(frequencies_F: WideArray, factor: float, kept_share_F: WideArray) -> WideArray:
    """Between untouched (share 1) and interpolated (share 0) frequencies."""
    return frequencies_F * kept_share_F + frequencies_F / factor * (1.0 - kept_share_F)


def _llama3_kept_share(frequencies_F: WideArray, scaling: Scaling) -> WideArray:
    turns_F = scaling.original_context_length * frequencies_F / (2.0 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    return np.clip((turns_F - low) / (high - low), 0.0, 1.0)


def _yarn_kept_share(head_dim: int, theta: float, context_length: int) -> WideArray:
    def index_of(turns: float) -> float:
        """The pair that turns this often over the original context."""
        return (
            head_dim * math.log(context_length / (turns * 2.0 * math.pi)) / (2.0 * math.log(theta))
        )

    first = max(math.floor(index_of(YARN_MOST_TURNS)), 0)
    last = min(math.ceil(index_of(YARN_FEWEST_TURNS)), head_dim - 1)
    # A ramp of no width would divide by zero.
    width = max(last - first, 0.001)
    return 1.0 - np.clip((np.arange(head_dim // 2) - first) / width, 0.0, 1.0)


def _magnitude(scaling: Scaling | None) -> float:
    if scaling is None or scaling.kind != "yarn" or scaling.factor <= 1.0:
        return 1.0
    return 0.1 * math.log(scaling.factor) + 1.0
