"""What can go wrong with a mesh, one thing at a time."""

from __future__ import annotations

import asyncio
import random
import signal
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from math import inf

from tests.chaos.mesh import ChaosMesh
from tests.chaos.moving import layers_moving, move_layers
from tests.chaos.updates import update
from tests.support.fault_proxy import Faults

# How long a fault lasts that does not end by itself: longer than anyone waits for a pulse.
HOLD_S = 3.0
ACTIVATE = b"/penstock.v1.StageService/Activate"

# Does it to a part of the mesh; returns when it is over.
Deed = Callable[[ChaosMesh, str], Awaitable[None]]


@dataclass(frozen=True, kw_only=True)
class Fault:
    """`room`: kind of the parts that it can befall. Streams outlive it, unless `ends_streams`; with
    `repeats_streams` they are sent again and again until the deed, which takes long, is done."""

    name: str
    room: str
    deed: Deed
    ends_streams: bool = False
    repeats_streams: bool = False

    def choose_part(self, mesh: ChaosMesh, rng: random.Random) -> str:
        """Of several coordinators the one that serves; a spare less often than what serves."""
        if self.room == "coordinator":
            return mesh.serving
        names = [name for name in mesh.parts if name.startswith(self.room)]
        return rng.choice(names + [name for name in names if name not in mesh.waiting] * 3)


async def kill(mesh: ChaosMesh, part: str) -> None:
    mesh.parts[part].signal(signal.SIGKILL)


async def freeze(mesh: ChaosMesh, part: str) -> None:
    """Stands still, and then goes on as if nothing had been."""
    mesh.parts[part].signal(signal.SIGSTOP)
    await asyncio.sleep(HOLD_S)
    mesh.parts[part].signal(signal.SIGCONT)


async def freeze_and_kill(mesh: ChaosMesh, part: str) -> None:
    mesh.parts[part].signal(signal.SIGSTOP)
    await asyncio.sleep(HOLD_S)
    mesh.parts[part].signal(signal.SIGKILL)


async def hang(mesh: ChaosMesh, part: str) -> None:
    """Its compute thread never comes back from a step; all else goes on."""
    await _compute_at(mesh, part, inf)


async def slow(mesh: ChaosMesh, part: str) -> None:
    await _compute_at(mesh, part, 10.0)


async def _compute_at(mesh: ChaosMesh, part: str, factor: float) -> None:
    file = mesh.pace_file(part)
    file.write_text(str(factor))
    await asyncio.sleep(HOLD_S)
    file.unlink()


async def give_other_weights(mesh: ChaosMesh, part: str) -> None:
    await update(mesh, stage_index=int(part.split("-")[1]))


async def recut(mesh: ChaosMesh, part: str) -> None:
    await move_layers(mesh, moves=False)


async def recut_at_once(mesh: ChaosMesh, part: str) -> None:
    await move_layers(mesh, moves=True)


async def recut_and_kill_old(mesh: ChaosMesh, part: str) -> None:
    """One that is to end once its sequences have ended dies before that."""
    async with layers_moving(mesh, moves=False):
        for one in mesh.leaving[:1]:
            await kill(mesh, one.name)


async def recut_and_kill_new(mesh: ChaosMesh, part: str) -> None:
    """One dies that sequences have begun to move to."""
    async with layers_moving(mesh, moves=True):
        await kill(mesh, [one.name for one in mesh.replicas if not one.is_spare][-1])


async def cut(mesh: ChaosMesh, part: str) -> None:
    mesh.wires[part].cut()


async def partition(mesh: ChaosMesh, part: str) -> None:
    wire = mesh.wires[part]
    wire.faults = Faults(refuses=True)
    wire.cut()
    await asyncio.sleep(HOLD_S)
    wire.faults = Faults()


def bad_wire(faults: Faults) -> Deed:
    """A wire that is bad for a while."""

    async def deed(mesh: ChaosMesh, part: str) -> None:
        mesh.wires[part].faults = faults
        await asyncio.sleep(HOLD_S)
        mesh.wires[part].faults = Faults()

    return deed


STALL = bad_wire(Faults(stalls=True))
STALL_BETWEEN_STAGES = bad_wire(Faults(stalls=True, stalls_calls=ACTIVATE))
DELAY = bad_wire(Faults(delay_s=0.05))
LOSS = bad_wire(Faults(loses_every_bytes=200_000, resend_s=0.2))
CORRUPTION = bad_wire(Faults(corrupts_every_bytes=50_000, corrupts_calls=ACTIVATE))

FAULTS = (
    Fault(name="stage killed", room="stage", deed=kill),
    Fault(name="stage frozen", room="stage", deed=freeze),
    Fault(name="stage frozen, then killed", room="stage", deed=freeze_and_kill),
    Fault(name="stage stops computing", room="stage", deed=hang),
    Fault(name="stage 10 times slower", room="stage", deed=slow),
    Fault(name="stage updated", room="stage", deed=give_other_weights, repeats_streams=True),
    Fault(name="layers moved", room="stage", deed=recut, repeats_streams=True),
    Fault(name="layers moved at once", room="stage", deed=recut_at_once, repeats_streams=True),
    Fault(
        name="layers moved, old process killed",
        room="stage",
        deed=recut_and_kill_old,
        repeats_streams=True,
    ),
    Fault(
        name="layers moved, new process killed",
        room="stage",
        deed=recut_and_kill_new,
        repeats_streams=True,
    ),
    Fault(name="stage's links cut", room="stage", deed=cut),
    Fault(name="stage's links stall", room="stage", deed=STALL),
    Fault(name="link between stages stalls", room="stage-1", deed=STALL_BETWEEN_STAGES),
    Fault(name="stage cut off", room="stage", deed=partition),
    Fault(name="stage's links lose packets", room="stage", deed=LOSS),
    Fault(name="stage 50 ms away", room="stage", deed=DELAY),
    Fault(name="activations corrupted", room="stage-1", deed=CORRUPTION),
    Fault(name="coordinator killed", room="coordinator", deed=kill),
    Fault(name="coordinator frozen", room="coordinator", deed=freeze),
    Fault(name="gateway's link cut", room="coordinator", deed=cut),
    Fault(name="gateway's link stalls", room="coordinator", deed=STALL),
    Fault(name="gateway cut off", room="coordinator", deed=partition),
    Fault(name="coordinator 50 ms away", room="coordinator", deed=DELAY),
    Fault(name="gateway killed", room="gateway", deed=kill, ends_streams=True),
)


def find_faults(names: str) -> tuple[Fault, ...]:
    """Those whose names contain one of `names` (with commas); all when it is empty."""
    wanted = [name.strip() for name in names.split(",")]
    return tuple(fault for fault in FAULTS if any(name in fault.name for name in wanted))
