"""The identity of the compiled kernels on this host."""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path

import llvmlite
import llvmlite.binding as llvm
import numba
import numpy as np

CORE = Path(__file__).parents[1]
# Kernels, and the functions of models that numba compiles around them.
_SOURCES = ("kernels/**/*.py", "models/*/model.py", "models/*/cuda_*.py")


@functools.cache
def kernel_cache_key() -> str:
    """Hash (16 hex digits) of all kernel sources for CPUs, the CPU and its features, and the
    versions of numba, LLVM and numpy.

    Names the folder of compiled kernels. Equal keys and equal arithmetic mean bit-equal
    results, so it is a part of a stage's numerics fingerprint too.
    """
    digest = hashlib.sha256()
    for source in _sources():
        if not source.name.startswith("cuda"):
            _add_source(digest, source)
    features = sorted(name for name, present in llvm.get_host_cpu_features().items() if present)
    versions = (numba.__version__, llvmlite.__version__, llvm.llvm_version_info, np.__version__)
    digest.update(repr((llvm.get_host_cpu_name(), features, versions)).encode())
    return digest.hexdigest()[:16]


@functools.cache
def cuda_kernel_key() -> str:
    """Likewise of the kernels for CUDA devices, and the version of numba: a part of the numerics
    fingerprint of stages on a GPU."""
    digest = hashlib.sha256(numba.__version__.encode())
    for source in _sources():
        if source.name.startswith("cuda"):
            _add_source(digest, source)
    return digest.hexdigest()[:16]


def _sources() -> list[Path]:
    return sorted({path for pattern in _SOURCES for path in CORE.glob(pattern)})


def _add_source(digest: hashlib._Hash, source: Path) -> None:
    digest.update(f"{source.relative_to(CORE)}\0".encode())
    digest.update(source.read_bytes())
