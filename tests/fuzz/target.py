"""What a fuzz target says about itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random

MIB = 1 << 20


@dataclass(frozen=True, kw_only=True)
class FuzzTarget:
    """One thing that takes bytes from outside.

    `try_input` gives it one input. Whatever it raises outside of `refusals` is a finding, and so
    are a death of the process, an input that takes longer than `timeout_s`, and one that allocates
    more than `max_allocation_bytes(size of the input)`. It must leave nothing behind: the same
    input has the same effect whenever it is tried.
    """

    try_input: Callable[[bytes], None]
    refusals: tuple[type[Exception], ...]
    # Inputs to begin with: at least one that is accepted.
    seeds: Sequence[bytes]
    # Damages an input as one who knows its structure would. Half of all mutations are made by
    # this, the others by libFuzzer, which knows bytes only.
    mutate: Callable[[bytes, Random], bytes]
    max_allocation_bytes: Callable[[int], int] = lambda size: 4 * MIB + 64 * size
    timeout_s: int = 20  # by the clock on the wall, on machines that have other work as well
    max_input_bytes: int = 64 * 1024
