"""The arithmetic that this host computes a number format with."""

from __future__ import annotations

import llvmlite.binding as llvm

from core.errors import InvalidInput
from core.kernels.arithmetic import NUMBER_FORMATS, Arithmetic
from core.kernels.host_cpu import integer_instructions


def host_arithmetic(number_format: str) -> Arithmetic:
    """The fastest arithmetic of this host for a number format; raises InvalidInput for others.

    Equal CPUs get equal arithmetic: nothing is timed. Intel's cores need two cycles for a
    product of bfloat16 pairs and half a one for a float32 product (measured on Emerald Rapids:
    87 against 150 GFLOP/s with widened weights), AMD's do not.
    """
    if number_format not in NUMBER_FORMATS:
        raise InvalidInput("number_format", number_format, " or ".join(NUMBER_FORMATS))
    features = llvm.get_host_cpu_features()
    if number_format in ("int8", "int4"):
        beside = host_arithmetic("bf16").instructions
        return Arithmetic(number_format, integer_instructions(), beside)
    if not features.get("avx512f"):
        return Arithmetic(number_format, "portable")
    pairs_pay = llvm.get_host_cpu_name().startswith("znver")
    if number_format == "bf16" and features.get("avx512bf16") and pairs_pay:
        return Arithmetic(number_format, "avx512bf16")
    return Arithmetic(number_format, "avx512")
