"""Moves layers between the stages of a running mesh, while it serves.

The processes of the new cut that the old one has not load their layers, and answer a probe, to the
bit as the old cut does. Until then nothing has changed, and where anything fails all is as it was.
Then the new cut is that of the mesh: new sequences take it, and the old processes leave once theirs
have ended or moved. From there on what dies is started again, and the operation is completed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
from penstock.v1 import coordinator_pb2 as pb
from penstock.v1 import local_pb2

from core.errors import InvalidInput, PenstockError, Unavailable
from services.local.partition import plan_stages
from services.local.prepare import read_model
from services.local.run_folder import MeshRecord
from services.local.running_mesh import (
    CALL_TIMEOUT_S,
    RunningMesh,
    running_mesh,
    watch_trial,
)
from services.local.seal_keys import seal_keys
from services.local.waiting import first_of


@dataclass(frozen=True, kw_only=True)
class Repartition:
    """What is to change."""

    split: str  # layers of all stages, "0:14,14:30"
    # Running sequences move to the new processes at once, and are computed again there as far as
    # need be; else they end where they are.
    moves: bool = False


def choose_split(record: MeshRecord, *, split: str | None, num_stages: int | None) -> str:
    """The cut that is asked for, or the best one of so many stages; raises InvalidInput,
    PlanImpossible."""
    if (split is None) == (num_stages is None):
        raise InvalidInput("split", split, "layers of the stages, or else a number of stages")
    path = Path(record.model_path)
    keys = seal_keys(path, Path(record.seal_keys))
    model = read_model(path, dtype=record.number_format, keys=keys)
    plan = plan_stages(
        model.config,
        number_format=model.number_format,
        num_stages=num_stages or 0,
        split=split,
    )
    return plan.split


async def repartition(
    change: Repartition,
    *,
    record: MeshRecord,
    socket_path: Path,
    key: str | None,
    say: Callable[[str], None],
) -> None:
    """Returns when the mesh has the new cut alone; `say` is told each step.

    `key` is an API key for the gateway, where it asks for one: with the scope "tokenize".

    Raises InvalidInput (no other cut of the model), PlanImpossible (both cuts do not fit at once,
    a stage would have weights of several models, or the wire's codec allows no other cut),
    Exhausted (another one is under way), Unavailable (a new process ended, did not fit or answered
    otherwise than the old ones; the mesh cannot be reached). Up to the line that new sequences take
    the new cut, all is then as it was.
    """
    async with running_mesh(record, socket_path=socket_path, key=key, say=say) as mesh:
        await Mover(change, mesh).run()


class Mover:
    """One repartition; see the module."""

    def __init__(self, change: Repartition, mesh: RunningMesh) -> None:
        self._change = change
        self._mesh = mesh
        self._leaving: Sequence[str] = ()  # addresses of the old processes, once they may leave

    async def run(self) -> None:
        prompt = await self._mesh.probe_prompt()
        request = local_pb2.TryCutRequest(split=self._change.split)
        trial = self._mesh.supervisor.TryCut(request)
        new: list[local_pb2.TryCutResponse] = []
        try:
            try:
                await self._read_started(trial, new)
                await first_of(self._try(new, prompt), watch_trial(trial))
            except BaseException:
                await self._roll_back(new)
                raise
        finally:
            trial.cancel()
        await self._choose(new)
        await self._let_old_leave()

    async def _read_started(self, trial: Any, new: list[local_pb2.TryCutResponse]) -> None:
        """Notes the new processes as they are started."""
        while not new or len(new) < new[0].num_processes:
            started = await trial.read()
            if started is grpc.aio.EOF:
                raise Unavailable("the supervisor ended the trial")
            new.append(started)
            self._mesh.say(f"  {started.name} loads its layers")

    async def _try(self, new: Sequence[local_pb2.TryCutResponse], prompt: Sequence[int]) -> None:
        """From processes that load to the mesh's own."""
        mesh, split = self._mesh, self._change.split
        for replica in self._replicas(new):
            await mesh.add(replica)
        await mesh.until_ready([one.address for one in new])
        old = next(one for one in (await mesh.describe()).stages if not one.passed_over)
        expected = await mesh.probe(old.address, prompt)
        answer = await mesh.probe(new[0].address, prompt, split=split)
        if answer != expected:
            raise Unavailable("the new stages do not answer as the old ones do")
        mesh.say(f"  their probe of {len(answer.token_ids)} tokens is what the old ones answer")
        kept = await mesh.supervisor.KeepCut(
            local_pb2.KeepCutRequest(split=split), timeout=CALL_TIMEOUT_S
        )
        self._leaving = kept.leaving

    async def _roll_back(self, new: Sequence[local_pb2.TryCutResponse]) -> None:
        """Lets the coordinator forget the new replicas, which nobody but the probe has taken."""
        try:
            for one in new:
                await self._mesh.drain(one.address)
            self._mesh.say("  all goes on as it was")
        except PenstockError as error:
            self._mesh.say(f"  it could not be rolled back: {error}")

    async def _choose(self, new: Sequence[local_pb2.TryCutResponse]) -> None:
        """Has new sequences take the new cut."""
        request = pb.ChooseCutRequest(split=self._change.split)
        await self._mesh.choose(
            lambda coordinator: coordinator.ChooseCut(request, timeout=CALL_TIMEOUT_S),
            new=self._replicas(new),
        )
        self._mesh.say(f"  new sequences take {self._change.split}")

    def _replicas(self, new: Sequence[local_pb2.TryCutResponse]) -> list[pb.AddReplicaRequest]:
        return [
            pb.AddReplicaRequest(
                stage_index=one.stage_index,
                address=one.address,
                spare=one.spare,
                split=self._change.split,
            )
            for one in new
        ]

    async def _let_old_leave(self) -> None:
        """Ends the processes whose layers are no stage any more."""
        moves = self._change.moves
        await asyncio.gather(*(self._mesh.retire(one, moves=moves) for one in self._leaving))
        self._mesh.say(f"  {len(self._leaving)} old processes have ended")
