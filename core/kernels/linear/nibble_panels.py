"""Packs matrices of 4 bits into panels as `core.kernels.linear.nibble_tiles` reads them.

Letters: N rows of the matrix, which are columns of the product, K inputs, G groups of 32 inputs,
P panels.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from core.kernels.arithmetic import NIBBLE_GROUP, PANEL_COLUMNS
from core.kernels.linear.nibble_tiles import GROUP_ROWS, NIBBLE_ROWS, SCALE_COLUMNS


def pack_nibble_panels(
    integers_NK: npt.NDArray[np.uint8],
    scales_NG: npt.NDArray[np.float16],
    minima_NG: npt.NDArray[np.float16],
    num_inputs: int,
    panels: npt.NDArray[np.uint32],
    *,
    first: int,
    step: int,
) -> None:
    """Packs weights `scale x integer + minimum` into `panels` (flat), zero before.

    The matrix' panels of 64 columns are placed from the panel `first` on, every `step` panels.
    `num_inputs` is the padded inner dimension.
    """
    num_groups = num_inputs // NIBBLE_GROUP
    places = panels.reshape(-1, num_groups, GROUP_ROWS, PANEL_COLUMNS)[first::step]
    num_panels = -(-len(integers_NK) // PANEL_COLUMNS)
    padding = num_panels * PANEL_COLUMNS - len(integers_NK)
    num_filled = scales_NG.shape[1]

    def by_panels(array: npt.NDArray[Any], *inner: int) -> npt.NDArray[Any]:
        padded = np.pad(array, ((0, padding), (0, 0)))
        return padded.reshape(num_panels, PANEL_COLUMNS, num_filled, *inner)

    words = np.ascontiguousarray(integers_NK).view(np.uint32)  # of four inputs
    pairs = by_panels(words, NIBBLE_ROWS, 2)
    nibbles = pairs[..., 0] | (pairs[..., 1] << np.uint32(4))
    filled = places[:num_panels, :num_filled]
    filled[:, :, :NIBBLE_ROWS] = nibbles.transpose(0, 2, 3, 1)
    both = np.stack([by_panels(scales_NG), by_panels(minima_NG)])
    blocks = both.reshape(2, num_panels, -1, SCALE_COLUMNS, num_filled).transpose(1, 4, 2, 0, 3)
    halves = np.ascontiguousarray(blocks).reshape(num_panels, num_filled, -1)
    filled[:, :, NIBBLE_ROWS] = halves.view(np.uint32)
