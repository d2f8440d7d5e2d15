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
_SOURCES = ("kernels/**/*.py", "models/*/model.py")


@functools.cache
def kernel_cache_key() -> str:
    """Hash (16 hex digits) of all kernel sources, the CPU and its features, and the versions
    of numba, LLVM and numpy.

    Names the folder of compiled kernels. Equal keys and equal arithmetic mean bit-equal
    results, so it is a part of a stage's numerics fingerprint too.
    """
    digest = hashlib.sha256()
    for source in sorted({path for pattern in _SOURCES for path in CORE.glob(pattern)}):
        digest.update(f"{source.relative_to(CORE)}\0".encode())
        digest.update(source.read_bytes())
    features = sorted(name for name, present in llvm.get_host_cpu_features().items() if present)
    versions = (numba.__version__, llvmlite.__version__, llvm.llvm_version_info, np.__version__)
    digest.update(repr((llvm.get_host_cpu_name(), features, versions)).encode())
    return digest.hexdigest()[:16]
