"""The arithmetics that this host can run, the portable ones always among them."""

from __future__ import annotations

import llvmlite.binding as llvm
import numpy as np
import numpy.typing as npt

from core.kernels.arithmetic import NUMBER_FORMATS, Arithmetic, host_arithmetic
from tests.support.models import bf16_bits

FloatArray = npt.NDArray[np.float32]


def host_arithmetics() -> list[Arithmetic]:
    """Both formats, in every kind of instructions."""
    features = llvm.get_host_cpu_features()
    found = [Arithmetic(number_format, "portable") for number_format in NUMBER_FORMATS]
    if features.get("avx512f"):
        found += [Arithmetic(number_format, "avx512") for number_format in NUMBER_FORMATS]
    if features.get("avx512bf16"):
        found.append(Arithmetic("bf16", "avx512bf16"))
    assert all(host_arithmetic(number_format) in found for number_format in NUMBER_FORMATS)
    return found


def rounded(values: FloatArray, number_format: str) -> FloatArray:
    """The nearest values that the number format holds; ties to even."""
    if number_format == "fp32":
        return values
    return (bf16_bits(values).astype(np.uint32) << 16).view(np.float32)


def to_inputs(arithmetic: Arithmetic, rows: FloatArray) -> npt.NDArray[np.uint32]:
    """Rows as a product's inputs, in words."""
    return (bf16_bits(rows) if arithmetic.dots_pairs else rows).view(np.uint32)


def inputs_to_floats(arithmetic: Arithmetic, words: npt.NDArray[np.uint32]) -> FloatArray:
    """What a kernel stored as inputs of a product."""
    if arithmetic.dots_pairs:
        return (words.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return words.view(np.float32)
