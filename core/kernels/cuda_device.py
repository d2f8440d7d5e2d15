"""A CUDA device as a stage uses it: its memory, its stream, products and graphs.

torch holds the memory and computes products; numba's kernels see the same memory, without
copies, and run on the same stream.

Letters: T rows, K inputs, N outputs.
"""

# mypy: allow-untyped-calls, disable-error-code="attr-defined"

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from numba import cuda

from core.kernels.cuda_launch import Launch

# numpy and numba have no bfloat16: kernels see its bit patterns.
_SEEN_AS = {torch.bfloat16: torch.uint16}


class Device(Protocol):
    """What a stage needs of a device. Used by one thread at a time."""

    @property
    def name(self) -> str:
        """What computes, and with which libraries: equal names compute equal bits."""

    def scope(self) -> AbstractContextManager[Any]:
        """Inside, everything goes to the device's own stream."""

    def launch(self) -> Launch:
        """How to launch kernels now, in a scope or in a capture."""

    def zeros(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Memory of the device. Raises torch.OutOfMemoryError."""

    def pinned(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Zeros of the host, which copies to and from the device need not stage."""

    def view(self, tensor: torch.Tensor) -> Any:
        """The same memory as kernels take it; C order only. bfloat16 becomes uint16."""

    def multiply(
        self, inputs_TK: torch.Tensor, weight_NK: torch.Tensor, out_TN: torch.Tensor
    ) -> None:
        """inputs @ weight.T, summed and written as float32."""

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        """Returns a call that does what `work` does, at the cost of one launch.

        `work` touches no memory but what exists before, and nothing of the host.
        """

    def synchronize(self) -> None:
        """Waits, without the GIL, until everything is done."""


class CudaDevice:
    """A GPU."""

    def __init__(self, index: int = 0) -> None:
        torch.cuda.set_device(index)
        cuda.select_device(index)
        # Partial sums of a product are added as float32, not as bfloat16.
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
        torch.backends.cuda.matmul.allow_tf32 = False
        self._device = torch.device("cuda", index)
        self._stream = torch.cuda.Stream(self._device)
        self._pool: Any = None

    @property
    def name(self) -> str:
        device = torch.cuda.get_device_name(self._device).replace(" ", "-")
        return f"{device}-torch-{torch.__version__}-cuda-{torch.version.cuda}"

    def scope(self) -> AbstractContextManager[Any]:
        return torch.cuda.stream(self._stream)

    def launch(self) -> Launch:
        return Launch(stream=cuda.external_stream(torch.cuda.current_stream().cuda_stream))

    def zeros(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype, device=self._device)

    def pinned(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype, pin_memory=True)

    def view(self, tensor: torch.Tensor) -> Any:
        assert tensor.is_contiguous()
        return cuda.as_cuda_array(as_seen(tensor), sync=False)

    def multiply(
        self, inputs_TK: torch.Tensor, weight_NK: torch.Tensor, out_TN: torch.Tensor
    ) -> None:
        if inputs_TK.dtype == torch.float32:
            torch.mm(inputs_TK, weight_NK.t(), out=out_TN)
        else:
            torch.mm(inputs_TK, weight_NK.t(), out_dtype=torch.float32, out=out_TN)

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        # Once outside: kernels are compiled and loaded, which a capture forbids.
        with self.scope():
            work()
        self.synchronize()
        graph = torch.cuda.CUDAGraph()
        # Other threads of the process, such as that of another engine, may go on meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            work()
        self._pool = graph.pool()  # graphs never run side by side: they share their scratch
        return graph.replay

    def synchronize(self) -> None:
        self._stream.synchronize()


def as_seen(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor under a type that numpy and numba have, too."""
    return tensor.view(_SEEN_AS.get(tensor.dtype, tensor.dtype))
