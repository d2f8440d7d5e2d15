"""Which device a stage computes on: a CPU, or a GPU where there is one."""

from __future__ import annotations

import ctypes
import importlib.util

from core.engine.backend import MakeBackend
from core.engine.cpu_backend import CpuBackend
from core.errors import InvalidInput

# "auto" is a GPU where one can be used, and the CPU elsewhere.
DEVICES = ("auto", "cpu", "cuda")
GPU_NUMBER_FORMATS = ("bf16", "fp32")


def choose_backend(device: str, *, number_format: str) -> MakeBackend:
    """The backend for one of DEVICES. Raises InvalidInput where that device cannot be used."""
    if device == "cpu":
        return CpuBackend
    problem = why_no_gpu(number_format)
    if problem is not None:
        if device == "cuda":
            raise InvalidInput("device", device, f"cpu: {problem}")
        return CpuBackend
    from core.engine.cuda_backend import CudaBackend

    return CudaBackend


def why_no_gpu(number_format: str) -> str | None:
    """What keeps a stage from computing on a GPU, in words; None where nothing does.

    torch is imported only where there is a driver: its import takes seconds.
    """
    if number_format not in GPU_NUMBER_FORMATS:
        formats = " and ".join(GPU_NUMBER_FORMATS)
        return f"stages on a GPU compute in {formats}, not in {number_format}"
    if not has_driver():
        return "there is no NVIDIA driver here"
    if importlib.util.find_spec("numba_cuda") is None:
        return "numba-cuda is not installed; `pip install 'penstock[gpu]'` does"
    import torch

    if not torch.cuda.is_available():
        return f"torch {torch.__version__} sees no GPU"
    return None


def has_driver() -> bool:
    """Whether NVIDIA's driver library can be loaded."""
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True
