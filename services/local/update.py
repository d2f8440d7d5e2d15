"""Gives one stage of a running mesh other weights, while it serves.

One replica after the other: a new process loads the weights, is tried, and takes the place of an
old one, which leaves once the sequences that it holds have ended. What has begun with the old
weights ends with them. When anything fails before new sequences take the new ones, all is as it
was.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
from penstock.v1 import coordinator_pb2 as pb
from penstock.v1 import generation_pb2, local_pb2
from penstock.v1.coordinator_pb2_grpc import CoordinatorServiceStub
from penstock.v1.generation_pb2_grpc import GenerationServiceStub
from penstock.v1.local_pb2_grpc import SupervisorServiceStub

from core.errors import InvalidInput, Unavailable
from core.weights.sealed.opening import is_sealed
from services.common.channels import open_channel
from services.common.identity import COORDINATOR, GATEWAY, OPERATOR, SUPERVISOR
from services.common.keys import as_metadata
from services.common.statuses import error_from_rpc
from services.local.identities import credentials_for
from services.local.prepare import read_model
from services.local.run_folder import MeshRecord
from services.local.seal_keys import seal_keys
from services.local.waiting import first_of

CALL_TIMEOUT_S = 10.0
OPEN_TIMEOUT_S = 600.0
PROBE_TIMEOUT_S = 60.0
PROBE_PROMPT = "The days of the week are Monday, Tuesday,"
PROBE_TOKENS = 16
_POLL_S = 0.1
# Of a replica's problems: waiting does not mend these.
_HOPELESS = ("does not fit",)

State = pb.StageState


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

    Raises InvalidInput (another model's weights, no such stage), Unavailable (a new process ended,
    did not fit or failed its probe; the mesh cannot be reached). Then the mesh is as it was, but
    for replicas that have changed already.
    """
    check_shapes(update.model_path, record)
    credentials = credentials_for(record.certs, OPERATOR)
    async with AsyncExitStack() as stack:

        async def channel(address: str, role: str) -> grpc.aio.Channel:
            opened = open_channel(address, credentials=credentials, role=role)
            return await stack.enter_async_context(opened)

        updater = Updater(
            update,
            coordinator=CoordinatorServiceStub(await channel(record.coordinator, COORDINATOR)),
            supervisor=SupervisorServiceStub(await channel(f"unix:{socket_path}", SUPERVISOR)),
            gateway=GenerationServiceStub(await channel(record.gateway, GATEWAY)),
            key=key,
            say=say,
        )
        try:
            await updater.run()
        except grpc.aio.AioRpcError as error:
            raise error_from_rpc(error) from error


def check_shapes(model_path: Path, record: MeshRecord) -> None:
    """Raises InvalidInput unless both models have the same sizes, and are sealed or not."""
    old, new = (
        read_model(path, dtype=record.number_format, keys=seal_keys(path, Path(record.keys)))
        for path in (Path(record.model_path), model_path)
    )
    if bool(record.keys) != is_sealed(model_path):
        raise InvalidInput("model", str(model_path), "sealed if the mesh's model is, and only then")
    if new.config != old.config:
        allowed = f"weights of the same shapes as {record.model_path}"
        raise InvalidInput("model", str(model_path), allowed)


class Updater:
    """One update; see the module."""

    def __init__(
        self,
        update: Update,
        *,
        coordinator: Any,
        supervisor: Any,
        gateway: Any,
        key: str | None,
        say: Callable[[str], None],
    ) -> None:
        """The services are stubs."""
        self._update = update
        self._coordinator = coordinator
        self._supervisor = supervisor
        self._gateway = gateway
        self._metadata = as_metadata(key)
        self._say = say

    async def run(self) -> None:
        old = [one for one in await self._replicas() if not one.draining]
        if not old:
            raise InvalidInput("stage", self._update.stage_index, "a stage of the mesh")
        prompt = await self._prompt()
        # Spares last: they wait for others of the same weights.
        for number, one in enumerate(sorted(old, key=lambda state: state.spare), start=1):
            self._say(f"replica {number} of {len(old)}, at {one.address}")
            await self._replace(one, prompt)

    async def _replace(self, old: State, prompt: Sequence[int]) -> None:
        """Lets a new replica take the place of an old one."""
        trial = self._supervisor.TryReplica(
            local_pb2.TryReplicaRequest(
                stage_index=self._update.stage_index,
                model_path=str(self._update.model_path),
                spare=old.spare,
            )
        )
        try:
            started = await trial.read()
            self._say(f"  {started.name} loads the new weights")
            try:
                await first_of(self._settle(started.address, old, prompt), _watch(trial))
            except BaseException:
                await self._roll_back(started.address, old)
                raise
        finally:
            trial.cancel()
        await self._retire(old)

    async def _settle(self, address: str, old: State, prompt: Sequence[int]) -> None:
        """From a process that loads to one that new sequences take."""
        await self._coordinator.AddReplica(
            pb.AddReplicaRequest(
                stage_index=self._update.stage_index, address=address, spare=old.spare
            ),
            timeout=CALL_TIMEOUT_S,
        )
        new = await self._until_healthy(address)
        await self._probe(address, prompt)
        await self._choose(new.weights_digest)
        await self._supervisor.KeepReplica(
            local_pb2.KeepReplicaRequest(address=address), timeout=CALL_TIMEOUT_S
        )
        self._say("  new sequences take the new weights")

    async def _until_healthy(self, address: str) -> State:
        """Waits until the replica is open and connected; raises Unavailable when it never is."""
        state = pb.StageState()
        try:
            async with asyncio.timeout(OPEN_TIMEOUT_S):
                while not state.ready:
                    await asyncio.sleep(_POLL_S)
                    (state,) = [one for one in await self._replicas() if one.address == address]
                    if any(word in state.problem for word in _HOPELESS):
                        raise Unavailable(state.problem)
        except TimeoutError:
            raise Unavailable(f"not ready in {OPEN_TIMEOUT_S:.0f} s: {state.problem}") from None
        return state

    async def _probe(self, address: str, prompt: Sequence[int]) -> None:
        """Raises Unavailable unless the replica generates, and with finite log probabilities."""
        answer = await self._coordinator.ProbeReplica(
            pb.ProbeReplicaRequest(address=address, token_ids=prompt, max_tokens=PROBE_TOKENS),
            timeout=PROBE_TIMEOUT_S,
        )
        wrong = [logprob for logprob in answer.logprobs if not math.isfinite(logprob)]
        if wrong or not answer.token_ids or len(answer.logprobs) != len(answer.token_ids):
            raise Unavailable(
                f"the new weights are no good: of {len(answer.token_ids)} tokens "
                f"{len(wrong)} have no finite log probability"
            )
        self._say(f"  its probe of {len(answer.token_ids)} tokens is sound")

    async def _roll_back(self, new_address: str, old: State) -> None:
        """Lets new sequences take the old weights, and the new replica leave."""
        try:
            await self._choose(old.weights_digest)
            if any(one.address == new_address for one in await self._replicas()):
                await self._drain(new_address)
            self._say("  all goes on as it was")
        except grpc.aio.AioRpcError as error:
            self._say(f"  it could not be rolled back: {error_from_rpc(error)}")

    async def _retire(self, old: State) -> None:
        await self._drain(old.address)
        await self._supervisor.StopReplica(
            local_pb2.StopReplicaRequest(address=old.address), timeout=2 * CALL_TIMEOUT_S
        )
        self._say("  the old process has ended")

    async def _choose(self, weights_digest: str) -> None:
        await self._coordinator.ChooseWeights(
            pb.ChooseWeightsRequest(
                stage_index=self._update.stage_index, weights_digest=weights_digest
            ),
            timeout=CALL_TIMEOUT_S,
        )

    async def _drain(self, address: str) -> None:
        """Waits for the sequences of a replica to end; no deadline, since they have none."""
        request = pb.DrainReplicaRequest(address=address)
        async for progress in self._coordinator.DrainReplica(request):
            if progress.sequences:
                self._say(f"  {progress.sequences} sequences end on {address}")

    async def _replicas(self) -> list[State]:
        """Of the stage."""
        mesh = await self._coordinator.GetMesh(pb.GetMeshRequest(), timeout=CALL_TIMEOUT_S)
        return [one for one in mesh.stages if one.index == self._update.stage_index]

    async def _prompt(self) -> Sequence[int]:
        request = generation_pb2.TokenizeRequest(prompt=PROBE_PROMPT)
        answer = await self._gateway.Tokenize(
            request, timeout=CALL_TIMEOUT_S, metadata=self._metadata
        )
        return list(answer.token_ids)


async def _watch(trial: Any) -> None:
    """Raises what ends a trial."""
    while await trial.read() is not grpc.aio.EOF:
        pass
    await asyncio.Event().wait()
