"""What commands ask of a mesh that runs: try replicas, probe them, let them leave."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
from penstock.v1 import coordinator_pb2 as pb
from penstock.v1 import generation_pb2, local_pb2
from penstock.v1.generation_pb2_grpc import GenerationServiceStub
from penstock.v1.local_pb2_grpc import SupervisorServiceStub

from core.errors import DeadlineExceeded, NotFound, PenstockError, Unavailable
from services.common.channels import open_channel
from services.common.identity import GATEWAY, OPERATOR, SUPERVISOR
from services.common.keys import as_metadata
from services.common.statuses import error_from_rpc
from services.local.coordinators import Coordinators, open_coordinators
from services.local.identities import credentials_for
from services.local.run_folder import MeshRecord

CALL_TIMEOUT_S = 10.0
OPEN_TIMEOUT_S = 600.0
PROBE_TIMEOUT_S = 60.0
PROBE_PROMPT = "The days of the week are Monday, Tuesday,"
PROBE_TOKENS = 16
POLL_S = 0.1
# A coordinator that dies is started again, or another one takes over, well within this time.
_AWAY_S = 30.0
_AWAY = (Unavailable, DeadlineExceeded)
# Of a replica's problems: waiting does not mend these.
_HOPELESS = ("does not fit",)

State = pb.StageState


class RunningMesh:
    """The services of a mesh. Calls raise what gRPC raises, unless they say otherwise."""

    def __init__(
        self,
        *,
        coordinators: Coordinators,
        supervisor: Any,
        gateway: Any,
        key: str | None,
        say: Callable[[str], None],
    ) -> None:
        """The others are stubs; `key` is for the gateway; `say` is told each step."""
        self.supervisor = supervisor
        self.say = say
        self._coordinators = coordinators
        self._gateway = gateway
        self._metadata = as_metadata(key)

    async def describe(self) -> pb.GetMeshResponse:
        """The mesh as it is now."""
        return (await self._coordinators.serving()).mesh

    async def add(self, replica: pb.AddReplicaRequest) -> None:
        """Has a replica opened."""
        coordinator = (await self._coordinators.serving()).stub
        await coordinator.AddReplica(replica, timeout=CALL_TIMEOUT_S)

    async def choose(
        self, choose: Callable[[Any], Awaitable[Any]], *, new: Sequence[pb.AddReplicaRequest]
    ) -> None:
        """Calls `choose` with the coordinator that serves, once all is there that is to be chosen.

        It is the mesh's own by now: what has died is being started again and asked again, and a
        coordinator that took over before is told of the `new` replicas. Raises Unavailable when
        they never are there.
        """
        error: PenstockError | None = None
        try:
            async with asyncio.timeout(OPEN_TIMEOUT_S):
                while True:
                    error = await self._try_to_choose(choose, new)
                    if error is None:
                        return
                    await asyncio.sleep(POLL_S)
        except TimeoutError:
            raise Unavailable(f"not chosen in {OPEN_TIMEOUT_S:.0f} s: {error}") from None

    async def _try_to_choose(
        self, choose: Callable[[Any], Awaitable[Any]], new: Sequence[pb.AddReplicaRequest]
    ) -> PenstockError | None:
        """What keeps it from being chosen, if that will pass."""
        try:
            serving = await self._coordinators.serving()
            known = {replica.address for replica in serving.mesh.stages}
            for replica in new:
                if replica.address not in known:
                    await serving.stub.AddReplica(replica, timeout=CALL_TIMEOUT_S)
            await choose(serving.stub)
        except (grpc.aio.AioRpcError, PenstockError) as failure:
            error = _translated(failure)
            if not isinstance(error, (*_AWAY, NotFound)):
                raise error from None
            return error
        return None

    async def probe_prompt(self) -> Sequence[int]:
        request = generation_pb2.TokenizeRequest(prompt=PROBE_PROMPT)
        answer = await self._gateway.Tokenize(
            request, timeout=CALL_TIMEOUT_S, metadata=self._metadata
        )
        return list(answer.token_ids)

    async def until_ready(self, addresses: Collection[str]) -> list[State]:
        """Waits until replicas are open and connected; raises Unavailable when they never are."""
        states: list[State] = []
        try:
            async with asyncio.timeout(OPEN_TIMEOUT_S):
                while len(states) < len(addresses) or not all(one.ready for one in states):
                    await asyncio.sleep(POLL_S)
                    replicas = (await self.describe()).stages
                    states = [one for one in replicas if one.address in addresses]
                    _check_hope(states, addresses)
        except TimeoutError:
            problems = "; ".join(one.problem for one in states if not one.ready)
            raise Unavailable(f"not ready in {OPEN_TIMEOUT_S:.0f} s: {problems}") from None
        return states

    async def probe(
        self, address: str, prompt: Sequence[int], *, split: str = ""
    ) -> pb.ProbeReplicaResponse:
        """Generates over a replica; raises Unavailable where not with finite log probabilities."""
        coordinator = (await self._coordinators.serving()).stub
        answer: pb.ProbeReplicaResponse = await coordinator.ProbeReplica(
            pb.ProbeReplicaRequest(
                address=address, token_ids=prompt, max_tokens=PROBE_TOKENS, split=split
            ),
            timeout=PROBE_TIMEOUT_S,
        )
        wrong = [logprob for logprob in answer.logprobs if not math.isfinite(logprob)]
        if wrong or not answer.token_ids or len(answer.logprobs) != len(answer.token_ids):
            raise Unavailable(
                f"the new weights are no good: of {len(answer.token_ids)} tokens "
                f"{len(wrong)} have no finite log probability"
            )
        return answer

    async def drain(self, address: str, *, moves: bool = False) -> None:
        """Waits until a replica has left, or is not there; no deadline, since sequences have none.

        Where the coordinator is lost meanwhile, the next one is asked.
        """
        loop = asyncio.get_running_loop()
        request = pb.DrainReplicaRequest(address=address, moves=moves)
        heard_s = loop.time()
        while True:
            try:
                coordinator = (await self._coordinators.serving()).stub
                async for progress in coordinator.DrainReplica(request):
                    heard_s = loop.time()
                    if progress.sequences:
                        self.say(f"  {progress.sequences} sequences are on {address}")
                return
            except (grpc.aio.AioRpcError, PenstockError) as failure:
                error = _translated(failure)
                if isinstance(error, NotFound):
                    return
                if not isinstance(error, _AWAY) or loop.time() - heard_s > _AWAY_S:
                    raise error from None
                await asyncio.sleep(POLL_S)

    async def retire(self, address: str, *, moves: bool = False) -> None:
        """Lets a replica leave, and ends its process."""
        await self.drain(address, moves=moves)
        await self.supervisor.StopReplica(
            local_pb2.StopReplicaRequest(address=address), timeout=2 * CALL_TIMEOUT_S
        )
        await self.drain(address)  # one that has taken over in between may know it


@asynccontextmanager
async def running_mesh(
    record: MeshRecord, *, socket_path: Path, key: str | None, say: Callable[[str], None]
) -> AsyncIterator[RunningMesh]:
    """Connects with a mesh; what gRPC raises within becomes an error of ours.

    `key` is an API key for the gateway, where it asks for one: with the scope "tokenize".
    """
    credentials = credentials_for(record.certs, OPERATOR)
    async with AsyncExitStack() as stack:

        async def channel(address: str, role: str) -> grpc.aio.Channel:
            opened = open_channel(address, credentials=credentials, role=role)
            return await stack.enter_async_context(opened)

        opened = open_coordinators(record.coordinators, credentials=credentials)
        coordinators = await stack.enter_async_context(opened)
        mesh = RunningMesh(
            coordinators=coordinators,
            supervisor=SupervisorServiceStub(await channel(f"unix:{socket_path}", SUPERVISOR)),
            gateway=GenerationServiceStub(await channel(record.gateway, GATEWAY)),
            key=key,
            say=say,
        )
        try:
            yield mesh
        except grpc.aio.AioRpcError as error:
            raise error_from_rpc(error) from error


async def watch_trial(trial: Any) -> None:
    """Raises what ends a trial."""
    while await trial.read() is not grpc.aio.EOF:
        pass
    await asyncio.Event().wait()


def _translated(error: grpc.aio.AioRpcError | PenstockError) -> PenstockError:
    return error if isinstance(error, PenstockError) else error_from_rpc(error)


def _check_hope(states: Sequence[State], addresses: Collection[str]) -> None:
    if len(states) < len(addresses):
        raise Unavailable("the coordinator does not know the new replicas any more")
    for one in states:
        if any(word in one.problem for word in _HOPELESS):
            raise Unavailable(one.problem)
