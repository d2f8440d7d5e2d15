"""Running CUDA kernels in tests: on a device, or under numba's simulator.

The simulator is chosen by NUMBA_ENABLE_CUDASIM=1 before numba is imported; it infers no
types, so `compile_to_ptx` compiles the same kernels as a device would.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from numba import config, cuda

from core.kernels.cuda_launch import Launch


def _share_arrays_safely() -> None:
    """Makes threads of a simulated block agree on their shared arrays.

    numba-cuda 0.30 looks an array up and makes it when it is missing, without a lock: two threads
    that come at once get one each (`FakeCUDAShared.array`).
    """
    from numba.cuda.simulator.kernelapi import FakeCUDAShared

    lock = threading.Lock()

    def array(self: Any, shape: Any, dtype: Any) -> npt.NDArray[Any]:
        caller = sys._getframe(1)
        line = (caller.f_code.co_filename, caller.f_lineno)
        with lock:
            if line not in self._allocations:
                self._allocations[line] = np.empty(shape, dtype)
            return self._allocations[line]

    FakeCUDAShared.array = array


SIMULATED = bool(config.ENABLE_CUDASIM)
if SIMULATED:
    # The simulator's main thread looks all the time whether the others have ended, and would keep
    # them waiting for the GIL for the default 5 ms, twice a block.
    sys.setswitchinterval(1e-5)
    _share_arrays_safely()
# tests/allowed_skips.txt has this reason.
NO_DEVICE = "no CUDA device"

needs_cuda = pytest.mark.skipif(not (SIMULATED or cuda.is_available()), reason=NO_DEVICE)

# The simulator starts a Python thread for every CUDA thread.
LAUNCH = Launch(most_threads=8) if SIMULATED else Launch()
# Largest difference from the reference, whose sums are float64, on values of about 1.
TOLERANCES = {"fp32": 2e-6, "bf16": 2e-2}


def on_device(array: npt.NDArray[Any]) -> Any:
    return cuda.to_device(np.ascontiguousarray(array))


def nans_on_device(shape: tuple[int, ...], number_format: str = "fp32") -> Any:
    """An output as every test starts it: all NaN."""
    return on_device(to_format(np.full(shape, np.nan, np.float32), number_format))


def to_format(array: npt.NDArray[np.float32], number_format: str) -> npt.NDArray[Any]:
    """Float32, or bfloat16 bit patterns rounded to the nearest, ties to even."""
    if number_format == "fp32":
        return array
    bits = array.view(np.uint32).astype(np.uint64)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(array), 0x7FC0, rounded).astype(np.uint16)


def to_floats(array: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    """The float32 values of an array in a number format."""
    if array.dtype == np.float32:
        return array
    return (array.astype(np.uint32) << 16).view(np.float32)


def random_in_format(
    random: np.random.Generator, shape: tuple[int, ...], number_format: str
) -> npt.NDArray[Any]:
    return to_format(random.standard_normal(shape).astype(np.float32), number_format)


def compile_to_ptx(kernel: Any, signature: Any, compute_capability: tuple[int, int]) -> str:
    """PTX of a kernel for explicit argument types; needs no device."""
    with _pretend_device(compute_capability):
        ptx, _ = cuda.compile_ptx(kernel.py_func, signature, cc=compute_capability, device=False)
    return ptx


@contextmanager
def _pretend_device(compute_capability: tuple[int, int]) -> Iterator[None]:
    """numba compiles device functions for the current device and offers no way to name another
    (numba-cuda 0.30, `CUDADispatcher.compile_device`); here there is none at all."""
    from numba.cuda import dispatcher

    device = SimpleNamespace(compute_capability=compute_capability)
    original = dispatcher.get_current_device
    dispatcher.get_current_device = lambda: device
    try:
        yield
    finally:
        dispatcher.get_current_device = original
