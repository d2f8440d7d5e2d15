"""What an operator may do to a running mesh: add, try, choose and drain replicas."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from penstock.v1 import coordinator_pb2, generation_pb2

from core.errors import InvalidInput, Unavailable
from core.pipeline.cut import Cut, Part
from core.wire.codecs import codec_numbered
from services.coordinator.conductor import Conductor
from services.coordinator.fit import part_of
from services.coordinator.gateway_stream import GatewayStream

_POLL_S = 0.05
_PROBE_TOKENS = 16


class Administration:
    """The operator's side of a conductor."""

    def __init__(self, conductor: Conductor) -> None:
        self._conductor = conductor
        self._replicas = conductor.replicas
        self._trail = conductor.trail

    def add(self, request: coordinator_pb2.AddReplicaRequest, *, actor: str) -> None:
        """Takes a replica in; raises InvalidInput, Exhausted, Unavailable,
        PlanImpossible."""
        stage, address, split = request.stage_index, request.address, request.split
        if split:
            self._check_cut(split)
        self._replicas.add(stage, address, is_spare=request.spare, split=split)
        self._trail.record("replica added", actor, stage=stage, address=address)

    def _check_cut(self, split: str) -> None:
        """Raises PlanImpossible for another cut, where the wire's codec allows none."""
        known, manifest = self._replicas.known_cut(), self._replicas.manifest
        if manifest is not None and known.at(split) != known:
            codec_numbered(manifest.codec).refuse_other_cuts()

    def choose_weights(self, request: coordinator_pb2.ChooseWeightsRequest, *, actor: str) -> None:
        """Has new sequences take other weights of a stage; raises NotFound, Unavailable."""
        stage, digest = request.stage_index, request.weights_digest
        part = self._replicas.part_with(stage, digest)
        self._replicas.choose(_with_part(self._replicas.known_cut(), part))
        self._trail.record("weights chosen", actor, stage=stage, weights_digest=digest)

    def choose_cut(self, request: coordinator_pb2.ChooseCutRequest, *, actor: str) -> None:
        """Has new sequences take the same weights in other parts; raises InvalidInput, NotFound,
        Unavailable."""
        cut = self._replicas.known_cut().at(request.split)
        self._replicas.choose(cut)
        self._trail.record("cut chosen", actor, split=cut.split)

    async def drain(
        self, request: coordinator_pb2.DrainReplicaRequest, *, actor: str
    ) -> AsyncIterator[int]:
        """How many sequences a replica still holds, whenever that changes, until it has left;
        raises NotFound."""
        link = self._replicas.by_address(request.address)
        self._replicas.drain(link, moves=request.moves)
        stage, address = link.place.stage_index, request.address
        self._trail.record("replica drained", actor, stage=stage, address=address)
        told = -1
        while link in self._replicas.links:
            held = self._conductor.num_sequences(link)
            if held != told:
                yield held
                told = held
            await asyncio.sleep(_POLL_S)

    async def probe(
        self, request: coordinator_pb2.ProbeReplicaRequest
    ) -> coordinator_pb2.ProbeReplicaResponse:
        """Generates over a path of the cut with the replica's part; raises NotFound, InvalidInput,
        Unavailable."""
        link = self._replicas.by_address(request.address)
        if link.incarnation is None:
            raise Unavailable(link.problem)
        cut, part = self._replicas.known_cut(), part_of(link.incarnation.ready)
        probed = cut.at(request.split) if request.split else _with_part(cut, part)
        if part not in probed.parts:
            raise Unavailable(f"{link.place.name} has other weights than new sequences take")
        requests = self._conductor.requests
        stream = self._conductor.connect()
        submission = coordinator_pb2.Submission(
            request_id=1,
            token_ids=request.token_ids,
            sampling=generation_pb2.SamplingParameters(
                max_tokens=request.max_tokens or _PROBE_TOKENS, logprobs=0, ignore_eos=True
            ),
        )
        try:
            requests.submit(stream, submission, probed=probed)
            return await _answer(stream)
        finally:
            requests.disconnect(stream)


def _with_part(cut: Cut, part: Part) -> Cut:
    changed = cut.with_part(part)
    if changed is None:
        layers = "{}:{}".format(*part.layers)
        raise InvalidInput("split", "", f"a cut with layers {layers}, which are no stage now")
    return changed


async def _answer(stream: GatewayStream) -> coordinator_pb2.ProbeReplicaResponse:
    """What the stream's one request brings; raises Unavailable when it was refused."""
    answer = coordinator_pb2.ProbeReplicaResponse()
    has_ended = False
    while not has_ended:
        message = await stream.next_message()
        if message is None:
            raise Unavailable("the coordinator is stopping")
        answer.token_ids.extend(message.token_ids)
        for update in message.updates:
            if update.HasField("refusal"):
                raise Unavailable(update.refusal.message)
            answer.token_ids.extend(update.token_ids)
            answer.logprobs.extend(entry.chosen.logprob for entry in update.logprobs)
            has_ended = bool(update.finish_reason)
    return answer
