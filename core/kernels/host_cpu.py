"""What this host's CPU can multiply integers with; importing this needs no compiler."""

from __future__ import annotations

import llvmlite.binding as llvm


def integer_instructions() -> str:
    """The fastest instructions of this host for products of integers, by their name in
    `core.kernels.arithmetic.Arithmetic`."""
    if has_vnni():
        return "avx512vnni"
    return "avx2" if llvm.get_host_cpu_features().get("avx2") else "portable"


def caches_bytes(instructions: str) -> bool:
    """Whether keys and values beside weights of integers have 8 bits: where products of integers
    are fast."""
    return instructions != "portable"


def has_vnni() -> bool:
    """Whether this host multiplies four pairs of bytes in each lane of 16."""
    features = llvm.get_host_cpu_features()
    return bool(features.get("avx512f") and features.get("avx512vnni"))
