"""Every CUDA kernel compiles to PTX, types inferred, for Ampere and Hopper; needs no device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from numba import types

from core.kernels.activation import cuda as activation
from core.kernels.attention import cuda as attention
from core.kernels.norm import cuda as norm
from core.kernels.packing import cuda as packing
from core.kernels.rotary import cuda as rotary
from core.kernels.sampling import cuda as sampling
from tests.support.cuda import compile_to_ptx

FLOAT, DOUBLE, INT, LONG = types.float32, types.float64, types.int32, types.int64
ELEMENTS = {"fp32": types.float32, "bf16": types.uint16}


def array(element: Any, num_axes: int) -> Any:
    return types.Array(element, num_axes, "C")


def norm_kernels(name: str, element: Any) -> list[tuple[Any, Any]]:
    rows, weight = array(element, 2), array(FLOAT, 1)
    return [
        (norm.rms_norm_kernel(name, norm.THREADS), (rows, weight, FLOAT, rows)),
        (norm.add_rms_norm_kernel(name, norm.THREADS), (rows, rows, weight, FLOAT, rows)),
    ]


def activation_kernels(name: str, element: Any) -> list[tuple[Any, Any]]:
    return [(activation.silu_multiply_kernel(name), (array(element, 2),) * 3)]


def rotary_kernels(name: str, element: Any) -> list[tuple[Any, Any]]:
    heads, cache = array(element, 3), array(element, 4)
    index, table = array(INT, 1), array(FLOAT, 2)
    signature = (heads, heads, heads, index, index, table, table, cache, cache, heads)
    return [(rotary.rotate_and_write_kernel(name), signature)]


def attention_kernels(name: str, element: Any) -> list[tuple[Any, Any]]:
    heads, cache, index = array(element, 3), array(element, 4), array(INT, 1)
    partials = (array(FLOAT, 4), array(FLOAT, 3), array(FLOAT, 3))
    attend = attention.attend_kernel(
        name,
        head_dim=64,
        group_size=3,
        block_size=16,
        threads=attention.THREADS,
        split=attention.SPLIT,
    )
    return [
        (attend, (heads, cache, cache, array(INT, 2), index, index, INT, *partials)),
        (attention.merge_kernel(name), (*partials, heads)),
    ]


def packing_kernels(name: str, element: Any) -> list[tuple[Any, Any]]:
    signature = (array(element, 2), array(INT, 1), array(element, 2))
    return [(packing.gather_rows_kernel, signature), (packing.scatter_rows_kernel, signature)]


@pytest.mark.parametrize("compute_capability", [(8, 0), (9, 0)], ids=["sm_80", "sm_90"])
@pytest.mark.parametrize("name", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "kernels_of",
    [norm_kernels, activation_kernels, rotary_kernels, attention_kernels, packing_kernels],
    ids=lambda kernels_of: kernels_of.__name__,
)
def test_kernels_compile_to_ptx(
    kernels_of: Callable[[str, Any], list[tuple[Any, Any]]],
    name: str,
    compute_capability: tuple[int, int],
) -> None:
    for kernel, signature in kernels_of(name, ELEMENTS[name]):
        ptx = compile_to_ptx(kernel, types.void(*signature), compute_capability)
        assert ".target sm_{}{}".format(*compute_capability) in ptx
        assert ".visible .entry" in ptx


@pytest.mark.parametrize("compute_capability", [(8, 0), (9, 0)], ids=["sm_80", "sm_90"])
def test_sampling_compiles_to_ptx_without_contracted_products(
    compute_capability: tuple[int, int],
) -> None:
    """A fused multiply-add rounds once where numpy and the CPU round twice."""
    logits, floats, longs = array(FLOAT, 2), array(FLOAT, 1), array(LONG, 1)
    sample = (logits, floats, longs, array(DOUBLE, 1), longs, array(types.uint64, 1), longs)
    penalise = (logits, array(INT, 2), array(INT, 2), array(INT, 1), array(FLOAT, 2))
    for kernel, signature in [
        (sampling.sample_kernel, (*sample, array(INT, 1))),
        (sampling.penalise_kernel, penalise),
    ]:
        ptx = compile_to_ptx(kernel, types.void(*signature), compute_capability)
        assert ".target sm_{}{}".format(*compute_capability) in ptx
        assert ".visible .entry" in ptx
        assert "mul.f32" in ptx or "mul.rn.f32" in ptx
        assert "fma.rn.f32" not in ptx


def test_the_sums_of_attention_stay_in_registers() -> None:
    (attend, signature), _ = attention_kernels("bf16", ELEMENTS["bf16"])
    ptx = compile_to_ptx(attend, types.void(*signature), (9, 0))
    assert "ld.local" not in ptx
