"""Gives one stage of a running mesh other weights, while it serves.

One replica after the other: a new process loads the weights, is tried, and takes the place of an
old one, which leaves once the sequences that it holds have ended. What has begun with the old
weights ends with them. When anything fails before new sequences take the new ones, all is as it
was.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import grpc
from penstock.v1 import coordinator_pb2 as pb
from penstock.v1 import local_pb2

from core.errors import InvalidInput
from core.weights.sealed.opening import is_sealed
from services.common.statuses import error_from_rpc
from services.local.prepare import read_model
from services.local.run_folder import MeshRecord
from services.local.running_mesh import (
    CALL_TIMEOUT_S,
    RunningMesh,
    State,
    running_mesh,
    watch_trial,
)
from services.local.seal_keys import seal_keys
from services.local.waiting import first_of


@dataclass(frozen=True, kw_only=True)
class Update:
    """What is to change."""

    stage_index: int
    model_path: Path


async def update_stage(
    update: Update,
    *,
    record: MeshRecord,
    socket_path: Path,
    key: str | None,
    say: Callable[[str], None],
) -> None:
    """Returns when all replicas of the stage have the new weights; `say` is told each step.

    `key` is an API key for the gateway, where it asks for one: with the scope "tokenize".

    Raises InvalidInput (another model's weights, no such stage), PlanImpossible (no room for a
    further process), Unavailable (a new process ended, did not fit or failed its probe; the mesh
    cannot be reached). Then the mesh is as it was, but for replicas that have changed already.
    """
    check_shapes(update.model_path, record)
    async with running_mesh(record, socket_path=socket_path, key=key, say=say) as mesh:
        await Updater(update, mesh).run()


def check_shapes(model_path: Path, record: MeshRecord) -> None:
    """Raises InvalidInput unless both models have the same sizes, and are sealed or not."""
    old, new = (
        read_model(path, dtype=record.number_format, keys=seal_keys(path, Path(record.seal_keys)))
        for path in (Path(record.model_path), model_path)
    )
    if bool(record.seal_keys) != is_sealed(model_path):
        raise InvalidInput("model", str(model_path), "sealed if the mesh's model is, and only then")
    if new.config != old.config:
        allowed = f"weights of the same shapes as {record.model_path}"
        raise InvalidInput("model", str(model_path), allowed)


class Updater:
    """One update; see the module."""

    def __init__(self, update: Update, mesh: RunningMesh) -> None:
        self._update = update
        self._mesh = mesh

    async def run(self) -> None:
        old = [one for one in await self._replicas() if not one.draining]
        if not old:
            raise InvalidInput("stage", self._update.stage_index, "a stage of the mesh")
        prompt = await self._mesh.probe_prompt()
        # Spares last: they wait for others of the same weights.
        for number, one in enumerate(sorted(old, key=lambda state: state.spare), start=1):
            self._mesh.say(f"replica {number} of {len(old)}, at {one.address}")
            await self._replace(one, prompt)

    async def _replace(self, old: State, prompt: Sequence[int]) -> None:
        """Lets a new replica take the place of an old one."""
        mesh = self._mesh
        trial = mesh.supervisor.TryReplica(
            local_pb2.TryReplicaRequest(
                stage_index=self._update.stage_index,
                model_path=str(self._update.model_path),
                spare=old.spare,
            )
        )
        try:
            started = await trial.read()
            mesh.say(f"  {started.name} loads the new weights")
            try:
                await first_of(self._settle(started.address, old, prompt), watch_trial(trial))
            except BaseException:
                await self._roll_back(started.address, old)
                raise
        finally:
            trial.cancel()
        await mesh.retire(old.address)
        mesh.say("  the old process has ended")

    async def _settle(self, address: str, old: State, prompt: Sequence[int]) -> None:
        """From a process that loads to one that new sequences take."""
        mesh = self._mesh
        await mesh.coordinator.AddReplica(
            pb.AddReplicaRequest(
                stage_index=self._update.stage_index, address=address, spare=old.spare
            ),
            timeout=CALL_TIMEOUT_S,
        )
        (new,) = await mesh.until_ready([address])
        answer = await mesh.probe(address, prompt)
        mesh.say(f"  its probe of {len(answer.token_ids)} tokens is sound")
        await self._choose(new.weights_digest)
        await mesh.supervisor.KeepReplica(
            local_pb2.KeepReplicaRequest(address=address), timeout=CALL_TIMEOUT_S
        )
        mesh.say("  new sequences take the new weights")

    async def _roll_back(self, new_address: str, old: State) -> None:
        """Lets new sequences take the old weights, and the new replica leave."""
        try:
            await self._choose(old.weights_digest)
            await self._mesh.drain(new_address)
            self._mesh.say("  all goes on as it was")
        except grpc.aio.AioRpcError as error:
            self._mesh.say(f"  it could not be rolled back: {error_from_rpc(error)}")

    async def _choose(self, weights_digest: str) -> None:
        await self._mesh.coordinator.ChooseWeights(
            pb.ChooseWeightsRequest(
                stage_index=self._update.stage_index, weights_digest=weights_digest
            ),
            timeout=CALL_TIMEOUT_S,
        )

    async def _replicas(self) -> list[State]:
        """Of the stage."""
        mesh = await self._mesh.describe()
        return [one for one in mesh.stages if one.index == self._update.stage_index]
