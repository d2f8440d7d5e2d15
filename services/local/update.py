"""Gives one stage of a running mesh other weights, while it serves.

One replica after the other: a new process loads the weights, is tried, and takes the place of an
old one, which leaves once the sequences that it holds have ended. What has begun with the old
weights ends with them. When anything fails before the new process is the mesh's own, all is as it
was. From there on a coordinator that takes over or is started again comes with the new weights,
and one that serves is told of them until it knows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from penstock.v1 import coordinator_pb2 as pb
from penstock.v1 import local_pb2

from core.errors import InvalidInput, PenstockError
from core.weights.sealed.opening import is_sealed
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
        self._weights_digest = ""  # of the new ones, once they are loaded

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
            new = pb.AddReplicaRequest(
                stage_index=self._update.stage_index, address=started.address, spare=old.spare
            )
            try:
                await first_of(self._try(new, prompt), watch_trial(trial))
            except BaseException:
                await self._roll_back(new)
                raise
        finally:
            trial.cancel()
        await self._choose(new)
        await mesh.retire(old.address)
        mesh.say("  the old process has ended")

    async def _try(self, new: pb.AddReplicaRequest, prompt: Sequence[int]) -> None:
        """From a process that loads to one of the mesh's own."""
        mesh = self._mesh
        await mesh.add(new)
        (state,) = await mesh.until_ready([new.address])
        answer = await mesh.probe(new.address, prompt)
        mesh.say(f"  its probe of {len(answer.token_ids)} tokens is sound")
        await mesh.supervisor.KeepReplica(
            local_pb2.KeepReplicaRequest(address=new.address), timeout=CALL_TIMEOUT_S
        )
        self._weights_digest = state.weights_digest

    async def _roll_back(self, new: pb.AddReplicaRequest) -> None:
        """Lets the new replica leave, which nobody but the probe has taken."""
        try:
            await self._mesh.drain(new.address)
            self._mesh.say("  all goes on as it was")
        except PenstockError as error:
            self._mesh.say(f"  it could not be rolled back: {error}")

    async def _choose(self, new: pb.AddReplicaRequest) -> None:
        """Has new sequences take the new weights."""
        request = pb.ChooseWeightsRequest(
            stage_index=self._update.stage_index, weights_digest=self._weights_digest
        )
        await self._mesh.choose(
            lambda coordinator: coordinator.ChooseWeights(request, timeout=CALL_TIMEOUT_S),
            new=[new],
        )
        self._mesh.say("  new sequences take the new weights")

    async def _replicas(self) -> list[State]:
        """Of the stage."""
        mesh = await self._mesh.describe()
        return [one for one in mesh.stages if one.index == self._update.stage_index]
