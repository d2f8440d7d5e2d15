"""Root-mean-square norm on CUDA, with the sum before it: one block a row.

A thread reads all its elements before it writes one, so that it waits for memory once: at one
row that is what the time goes into.

Letters: T rows, H elements in a row. The residual stream, what is added to it and norm
weights are float32; normed rows are in the number format, ready for a product.
"""

# mypy: allow-untyped-defs, allow-untyped-calls, disable-error-code="attr-defined"

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
from numba import cuda

from core.kernels.cuda_launch import Launch, ceil_div
from core.kernels.cuda_numbers import block_sum, number_format_of, rounded_to_bf16

THREADS = 512  # a power of two: block_sum halves it


def rms_norm(
    residual_TH: Any,
    weight_H: Any,
    out_TH: Any,
    *,
    eps: float,
    number_format: str,
    launch: Launch,
) -> None:
    """Norms every row into `out_TH`."""
    threads = launch.threads(THREADS)
    kernel = rms_norm_kernel(number_format, threads, residual_TH.shape[1])
    kernel[residual_TH.shape[0], threads, launch.stream](
        residual_TH, weight_H, np.float32(eps), out_TH
    )


def add_rms_norm(
    residual_TH: Any,
    added_TH: Any,
    bias_H: Any,
    weight_H: Any,
    out_TH: Any,
    *,
    eps: float,
    number_format: str,
    rounds: bool,
    launch: Launch,
) -> None:
    """Adds rows and a bias to the residual stream in place, and norms the sum.

    With `rounds` the sum is rounded to what bfloat16 holds.
    """
    threads = launch.threads(THREADS)
    kernel = add_rms_norm_kernel(number_format, threads, residual_TH.shape[1], rounds)
    kernel[residual_TH.shape[0], threads, launch.stream](
        residual_TH, added_TH, bias_H, weight_H, np.float32(eps), out_TH
    )


def add(residual_TH: Any, added_TH: Any, bias_H: Any, *, rounds: bool, launch: Launch) -> None:
    """Adds rows and a bias to the residual stream in place."""
    threads = launch.threads(THREADS)
    add_kernel(rounds)[residual_TH.shape[0], threads, launch.stream](residual_TH, added_TH, bias_H)


@functools.cache
def rms_norm_kernel(number_format: str, threads: int, width: int) -> Any:
    store = number_format_of(number_format).store
    turns = ceil_div(width, threads)

    @cuda.jit
    def kernel(residual_TH, weight_H, eps, out_TH):
        partials = cuda.shared.array(threads, np.float32)
        values = cuda.local.array(turns, np.float32)
        weights = cuda.local.array(turns, np.float32)
        row, total = cuda.blockIdx.x, np.float32(0.0)
        for turn in range(turns):
            h = cuda.threadIdx.x + turn * threads
            if h < width:
                values[turn] = residual_TH[row, h]
                weights[turn] = weight_H[h]
                total += values[turn] * values[turn]
        mean = block_sum(total, partials) / np.float32(width)
        scale = np.float32(1.0) / math.sqrt(mean + eps)
        for turn in range(turns):
            h = cuda.threadIdx.x + turn * threads
            if h < width:
                out_TH[row, h] = store(values[turn] * scale * weights[turn])

    return kernel


@functools.cache
def add_rms_norm_kernel(number_format: str, threads: int, width: int, rounds: bool) -> Any:
    store = number_format_of(number_format).store
    sum_of = _sum_of(rounds)
    turns = ceil_div(width, threads)

    @cuda.jit
    def kernel(residual_TH, added_TH, bias_H, weight_H, eps, out_TH):
        partials = cuda.shared.array(threads, np.float32)
        values = cuda.local.array(turns, np.float32)
        weights = cuda.local.array(turns, np.float32)
        row, total = cuda.blockIdx.x, np.float32(0.0)
        for turn in range(turns):
            h = cuda.threadIdx.x + turn * threads
            if h < width:
                values[turn] = sum_of(residual_TH[row, h], added_TH[row, h], bias_H[h])
                weights[turn] = weight_H[h]
                total += values[turn] * values[turn]
        mean = block_sum(total, partials) / np.float32(width)
        scale = np.float32(1.0) / math.sqrt(mean + eps)
        for turn in range(turns):
            h = cuda.threadIdx.x + turn * threads
            if h < width:
                residual_TH[row, h] = values[turn]
                out_TH[row, h] = store(values[turn] * scale * weights[turn])

    return kernel


@functools.cache
def add_kernel(rounds: bool) -> Any:
    sum_of = _sum_of(rounds)

    @cuda.jit
    def kernel(residual_TH, added_TH, bias_H):
        row = cuda.blockIdx.x
        for h in range(cuda.threadIdx.x, residual_TH.shape[1], cuda.blockDim.x):
            residual_TH[row, h] = sum_of(residual_TH[row, h], added_TH[row, h], bias_H[h])

    return kernel


@cuda.jit(device=True)
def _plain_sum(residual, added, bias):
    return residual + (added + bias)


@cuda.jit(device=True)
def _rounded_sum(residual, added, bias):
    return rounded_to_bf16(residual + (added + bias))


def _sum_of(rounds: bool) -> Any:
    return _rounded_sum if rounds else _plain_sum
