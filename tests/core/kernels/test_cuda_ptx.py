"""Every CUDA kernel compiles to PTX, types inferred, for Ampere and Hopper; needs no device."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
from numba import types

from core.kernels.activation import cuda as activation
from core.kernels.attention import cuda as attention
from core.kernels.attention import cuda_shape
from core.kernels.norm import cuda as norm
from core.kernels.packing import cuda as packing
from core.kernels.rotary import cuda as rotary
from core.kernels.sampling import cuda as sampling
from tests.support.cuda import compile_to_ptx

FLOAT, DOUBLE, INT, LONG = types.float32, types.float64, types.int32, types.int64
# What every device gives a block without being asked.
SHARED_BYTES = 48 * 1024
ELEMENTS = {"fp32": types.float32, "bf16": types.uint16}


def array(element: Any, num_axes: int) -> Any:
    return types.Array(element, num_axes, "C")


def norm_kernels(name: str, element: Any) -> list[tuple[Any, Any]]:
    rows, vector, out = array(FLOAT, 2), array(FLOAT, 1), array(element, 2)
    added = (rows, rows, vector, vector, FLOAT, out)
    return [
        (norm.rms_norm_kernel(name, norm.THREADS, 1536), (rows, vector, FLOAT, out)),
        (norm.add_rms_norm_kernel(name, norm.THREADS, 1536, False), added),
        (norm.add_rms_norm_kernel(name, norm.THREADS, 1536, True), added),
        (norm.add_kernel(True), (rows, rows, vector)),
    ]


def activation_kernels(name: str, element: Any) -> list[tuple[Any, Any]]:
    signature = (array(FLOAT, 2), array(FLOAT, 1), array(element, 2))
    return [(activation.silu_multiply_kernel(name), signature)]


def rotary_kernels(name: str, element: Any) -> list[tuple[Any, Any]]:
    rows, vector, index, cache = array(FLOAT, 2), array(FLOAT, 1), array(INT, 1), array(element, 4)
    places = (index, index, array(INT, 2), rows, rows, cache, cache, array(FLOAT, 3))
    signature = (rows, vector, vector, vector, FLOAT, *places)
    return [
        (rotary.rotate_and_write_kernel(name, rotary.THREADS, norms_heads), signature)
        for norms_heads in (False, True)
    ]


def attention_kernels(
    name: str, element: Any, *, head_dim: int = 64, group_size: int = 3
) -> list[tuple[Any, Any]]:
    words, index = array(LONG, 1), array(INT, 1)
    partials = (array(FLOAT, 4), array(FLOAT, 3), array(FLOAT, 3))
    attend = attention.attend_kernel(
        name,
        head_dim=head_dim,
        num_words=head_dim // (8 // (element.bitwidth // 8)),
        group_size=group_size,
        block_size=16,
        num_threads=cuda_shape.THREADS,
        split=attention.SPLIT,
    )
    places = (words, words, array(INT, 2), index, index, INT)
    return [
        (attend, (array(FLOAT, 1), *places, array(FLOAT, 1), *partials[1:])),
        (attention.merge_kernel(name, attention.SPLIT), (index, *partials, array(element, 3))),
    ]


def packing_kernels(name: str, element: Any) -> list[tuple[Any, Any]]:
    signature = (array(element, 2), array(INT, 1), array(element, 2))
    widened = (array(element, 2), array(INT, 1), array(FLOAT, 2))
    return [
        (packing.gather_rows_kernel, signature),
        (packing.scatter_rows_kernel, signature),
        (packing.gather_widened_rows_kernel(name), widened),
    ]


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
    logits, longs = array(FLOAT, 2), array(LONG, 1)
    doubles = array(DOUBLE, 1)
    sample = (logits, longs, doubles, longs, doubles, longs, longs, longs)
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


def test_ranking_compiles_to_ptx() -> None:
    signature = types.void(array(FLOAT, 2), array(LONG, 1))
    assert "atom" in compile_to_ptx(sampling.likeliest_kernel, signature, (9, 0))


@pytest.mark.parametrize(("head_dim", "group_size"), [(64, 3), (128, 4), (128, 6)])
@pytest.mark.parametrize("name", ["fp32", "bf16"])
def test_the_sums_of_attention_stay_in_registers(name: str, head_dim: int, group_size: int) -> None:
    (attend, signature), _ = attention_kernels(
        name, ELEMENTS[name], head_dim=head_dim, group_size=group_size
    )
    ptx = compile_to_ptx(attend, types.void(*signature), (9, 0))
    assert "ld.local" not in ptx
    # Keys and values are read in words of eight bytes.
    assert re.search(r"ld\.global(\.nc)?\.[bu]64", ptx)


@pytest.mark.parametrize(("head_dim", "group_size"), [(128, 4), (128, 6), (256, 16)])
@pytest.mark.parametrize("name", ["fp32", "bf16"])
def test_attention_takes_no_more_shared_memory_than_a_block_has(
    name: str, head_dim: int, group_size: int
) -> None:
    (attend, signature), _ = attention_kernels(
        name, ELEMENTS[name], head_dim=head_dim, group_size=group_size
    )
    ptx = compile_to_ptx(attend, types.void(*signature), (8, 0))
    sizes = [int(size) for size in re.findall(r"\.shared .*\[(\d+)\];", ptx)]
    assert len(sizes) == 5
    assert sum(sizes) <= SHARED_BYTES
