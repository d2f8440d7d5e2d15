"""The arithmetics that this host can run, the portable ones always among them."""

from __future__ import annotations

from dataclasses import replace

import llvmlite.binding as llvm
import numpy as np
import numpy.typing as npt

from core.kernels.arithmetic import GROUP, NIBBLE_GROUP, Arithmetic
from core.kernels.host_arithmetic import host_arithmetic
from core.kernels.host_cpu import has_vnni
from core.kernels.linear.reference import quantise, spread
from tests.support.models import bf16_bits

FloatArray = npt.NDArray[np.float32]
FLOAT_FORMATS = ("fp32", "bf16")


def host_arithmetics() -> list[Arithmetic]:
    """Both formats of floats, in every kind of instructions."""
    features = llvm.get_host_cpu_features()
    found = [Arithmetic(number_format, "portable") for number_format in FLOAT_FORMATS]
    if features.get("avx512f"):
        found += [Arithmetic(number_format, "avx512") for number_format in FLOAT_FORMATS]
    if features.get("avx512bf16"):
        found.append(Arithmetic("bf16", "avx512bf16"))
    assert all(host_arithmetic(number_format) in found for number_format in FLOAT_FORMATS)
    return found


def cache_arithmetics() -> list[Arithmetic]:
    """All that attention and the KV cache may have."""
    return [*host_arithmetics(), *integer_arithmetics()]


def integer_arithmetics(*, largest_input: int = 127) -> list[Arithmetic]:
    """int8 in every kind of instructions; with bf16 as beside the host's, whose engines have been
    compiled."""
    kinds = ["portable"]
    if llvm.get_host_cpu_features().get("avx2"):
        kinds.append("avx2")
    if has_vnni():
        kinds.append("avx512vnni")
    beside = host_arithmetic("bf16").instructions
    return [Arithmetic("int8", kind, beside, largest_input=largest_input) for kind in kinds]


def nibble_arithmetics() -> list[Arithmetic]:
    """int4 in every kind of instructions."""
    return [replace(kind, number_format="int4") for kind in integer_arithmetics()]


def rounded(values: FloatArray, number_format: str) -> FloatArray:
    """The nearest values that a format of floats holds, ties to even; int8 depends on the group."""
    if number_format != "bf16":
        return values
    return (bf16_bits(values).astype(np.uint32) << 16).view(np.float32)


def to_inputs(arithmetic: Arithmetic, rows: FloatArray) -> npt.NDArray[np.uint32]:
    """Rows, padded to whole groups, as a product's inputs, in words."""
    if arithmetic.is_integer:
        return quantised_words(arithmetic, rows)
    return (bf16_bits(rows) if arithmetic.dots_pairs else rows).view(np.uint32)


def quantised_words(arithmetic: Arithmetic, rows: FloatArray) -> npt.NDArray[np.uint32]:
    """Every group as `core.kernels.inputs` says: 64 integers, its scale, and what follows from the
    sums of the integers; those of int8 are spread before."""
    if not arithmetic.has_nibbles:
        rows = spread(rows, group=GROUP)
    quantised = quantise(rows, group=GROUP, largest=arithmetic.largest_input)
    integers_TGE = quantised.integers_TK.reshape(len(rows), -1, GROUP)
    stored_TGE = integers_TGE
    if arithmetic.widens_integers:
        pairs = integers_TGE.reshape(*integers_TGE.shape[:2], -1, 4)[..., [0, 2, 1, 3]]
        stored_TGE = np.ascontiguousarray(pairs.reshape(integers_TGE.shape).astype(np.int16))
    scales_TG1 = quantised.scales_TG[:, :, None]
    parts = [stored_TGE.view(np.uint32), scales_TG1.view(np.uint32)]
    if arithmetic.has_nibbles:
        halves_TG2E = integers_TGE.reshape(*integers_TGE.shape[:2], -1, NIBBLE_GROUP)
        sums_TG2 = halves_TG2E.sum(axis=3, dtype=np.int32)
        parts.append((sums_TG2 * scales_TG1).astype(np.float32).view(np.uint32))
    else:
        sums_TG1 = integers_TGE.sum(axis=2, dtype=np.int32, keepdims=True)
        parts.append((-128 * sums_TG1).view(np.uint32))
    return np.concatenate(parts, axis=2).reshape(len(rows), -1)


def inputs_to_floats(arithmetic: Arithmetic, words: npt.NDArray[np.uint32]) -> FloatArray:
    """What a kernel stored as inputs of a product; groups of int8 one behind the other."""
    if arithmetic.is_integer:
        groups = words.reshape(-1, arithmetic.input_group_bytes // 4)
        num_ends = 3 if arithmetic.has_nibbles else 2
        integers = np.ascontiguousarray(groups[:, :-num_ends]).view(np.int8)
        if arithmetic.widens_integers:
            pairs = np.ascontiguousarray(groups[:, :-2]).view(np.int16).reshape(-1, 4)
            integers = pairs[:, [0, 2, 1, 3]].reshape(-1, GROUP)
        scales = np.ascontiguousarray(groups[:, [-num_ends]]).view(np.float32)
        if arithmetic.has_nibbles:
            sums = integers.reshape(-1, 2, NIBBLE_GROUP).sum(axis=2, dtype=np.int32)
            scaled = np.ascontiguousarray(groups[:, -2:]).view(np.float32)
            np.testing.assert_array_equal(scaled, (sums * scales).astype(np.float32))
            return integers * scales
        corrections = np.ascontiguousarray(groups[:, -1]).view(np.int32)
        sums = integers.sum(axis=1, dtype=np.int32)
        np.testing.assert_array_equal(corrections, -128 * sums)
        return spread(integers * scales, group=GROUP) * np.float32(0.25)
    if arithmetic.dots_pairs:
        return (words.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return words.view(np.float32)
