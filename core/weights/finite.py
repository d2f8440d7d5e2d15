"""Weights that are no numbers: what damaged bytes of a weight file become."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import numpy.typing as npt

from core.errors import CorruptWeights


def require_finite(values: npt.NDArray[np.float32], *, path: Path, name: str) -> None:
    """Raises CorruptWeights where a value of the tensor `name` is NaN or infinite.

    One such value makes the sum one; the sum, which is cheap, can overflow without.
    """
    with np.errstate(invalid="ignore", over="ignore"):
        total = float(values.sum())
    if math.isfinite(total) or np.isfinite(values).all():
        return
    num_bad = int(values.size - np.count_nonzero(np.isfinite(values)))
    raise CorruptWeights(
        f"{path}: {num_bad} of the {values.size} values of {name!r} are NaN or infinite; "
        "is the file damaged?"
    )
