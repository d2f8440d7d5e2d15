"""A device without a GPU: torch's memory and products on the CPU, kernels under numba's simulator.

To be imported only where NUMBA_ENABLE_CUDASIM is set.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from numba.cuda.simulator.cudadrv.devicearray import FakeCUDAArray

from core.kernels.cuda_device import as_seen
from core.kernels.cuda_launch import Launch

# A whole model needs thousands of blocks, and the simulator a Python thread for every thread of
# one. How threads work together, the tests of the kernels show.
MOST_THREADS = 2


class SimulatedDevice:
    """Keeps to what a real one asks for; a graph of it is the work itself."""

    name = "simulated"

    def scope(self) -> AbstractContextManager[Any]:
        return nullcontext()

    def launch(self) -> Launch:
        return Launch(most_threads=MOST_THREADS)

    def zeros(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype)

    def pinned(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype)

    def view(self, tensor: torch.Tensor) -> Any:
        assert tensor.is_contiguous()
        return FakeCUDAArray(as_seen(tensor).numpy())

    def multiply(
        self, inputs_TK: torch.Tensor, weight_NK: torch.Tensor, out_TN: torch.Tensor
    ) -> None:
        assert inputs_TK.dtype == weight_NK.dtype
        assert out_TN.dtype == torch.float32
        torch.mm(inputs_TK.float(), weight_NK.float().t(), out=out_TN)

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        return work

    def synchronize(self) -> None:
        return
