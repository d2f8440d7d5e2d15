"""Threads that compute one micro-batch together: each its share, and meetings between the steps.

All members run the same kernel. What a member computes it computes as one thread alone would, to
the bit: members share panels, rows and heads among them, never a sum.
"""

# numba infers the types of kernels and intrinsics.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import Any, NamedTuple

import llvmlite.binding as llvm
from llvmlite import ir
from numba import types

from core.kernels.compile import intrinsic, kernel
from core.kernels.vectors import I32, I64, emit_call

# Some ten microseconds, more than most members are late; then others may need the core.
SPINS_BEFORE_YIELDING = 300
# How far apart the barrier's numbers are, in bytes: each has a cache line of its own.
LINE = 64
BARRIER_WORDS = 2 * LINE // 8
_HAS_PAUSE = bool(llvm.get_host_cpu_features().get("sse2"))


class Team(NamedTuple):
    """What a member knows of the team."""

    member: int  # from 0, the leader
    size: int
    barrier: int  # address of BARRIER_WORDS int64, zero before the first meeting


class Share(NamedTuple):
    """What a member does: from `first` on, before `end`."""

    first: int
    end: int


@kernel
def share(team, count):
    """The member's part of `count` things of equal cost."""
    return Share(count * team.member // team.size, count * (team.member + 1) // team.size)


@kernel
def meet(team):
    """Waits for all members. What they wrote before it, all of them read behind it.

    The last to come resets the count and opens the next turn, for which the others wait: they
    cannot be overtaken, since it takes all of them to open another.

    Who waits spins SPINS_BEFORE_YIELDING times, then yields its core between any two looks: where
    there are fewer cores than members, those who have not come get them. It never sleeps, since
    most waits are shorter than waking up takes; nor does it give up.
    """
    if team.size == 1:
        return
    count, turn = team.barrier, team.barrier + LINE
    this_turn = load_shared(turn)
    if add_shared(count, 1) == team.size - 1:
        store_shared(count, 0)
        store_shared(turn, this_turn + 1)
        return
    spins = 0
    while load_shared(turn) == this_turn:
        spins += 1
        if spins < SPINS_BEFORE_YIELDING:
            rest()
        else:
            yield_core()


@kernel
def is_called(call, room):
    """Waits, asleep, for a byte at the file descriptor `call`; False once its other end is closed.

    `room` is the address of a byte.
    """
    count = read_byte(call, room)
    while count < 0:  # a signal came in between
        count = read_byte(call, room)
    return count == 1


@intrinsic
def load_shared(typing_context, where):
    """The int64 at an address, with all that was written before it was."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> ir.Value:
        return builder.load_atomic(_pointer(builder, args[0]), "acquire", 8, typ=I64)

    return types.int64(types.intp), codegen


@intrinsic
def store_shared(typing_context, where, value):
    """Writes an int64 to an address, after all that was written before."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> ir.Value:
        # llvmlite's own store_atomic asks a pointer for its type, which it has no longer.
        builder.atomic_rmw("xchg", _pointer(builder, args[0]), args[1], "release")
        return context.get_dummy_value()

    return types.void(types.intp, types.int64), codegen


@intrinsic
def add_shared(typing_context, where, value):
    """Adds to the int64 at an address; returns what it was."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> ir.Value:
        return builder.atomic_rmw("add", _pointer(builder, args[0]), args[1], "acq_rel")

    return types.int64(types.intp, types.int64), codegen


@intrinsic
def rest(typing_context):
    """Tells the core that it spins, where there is an instruction for that."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> ir.Value:
        if _HAS_PAUSE:
            emit_call(builder, "llvm.x86.sse2.pause", ir.VoidType(), [])
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def yield_core(typing_context):
    """Lets other threads have the core (sched_yield of the C library)."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> ir.Value:
        emit_call(builder, "sched_yield", I32, [])
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def read_byte(typing_context, file, where):
    """Reads a byte of a file descriptor (read of the C library): 1, 0 at its end, or negative."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> ir.Value:
        arguments = [builder.trunc(args[0], I32), _pointer(builder, args[1]), ir.Constant(I64, 1)]
        return emit_call(builder, "read", I64, arguments)

    return types.int64(types.int64, types.intp), codegen


def _pointer(builder: Any, address: Any) -> ir.Value:
    return builder.inttoptr(address, ir.PointerType())
