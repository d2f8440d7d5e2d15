"""Calls of Activate beside a coordinator's stream, so that frames meet what was scheduled."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

import grpc
from google.protobuf.message import DecodeError
from penstock.v1 import stage_pb2

from tests.fuzz.rpc.calls import Outcome
from tests.fuzz.rpc.methods import RpcMethod
from tests.fuzz.rpc.stage_sequences import (
    NUM_ROWS,
    NUM_STAGES,
    next_epoch,
    start_of_sequence,
    term_of_now,
)
from tests.support.stages import ControlStream

ACTIVATE = "StageService.Activate"


class ActivateCaller:
    """Opens the last stage, and orders a micro-batch over each link that comes to stand.

    A link that carries what is wrong ends alone: a coordinator's stream that ends with it is
    judged as a fault of the stage.
    """

    def __init__(self, channel: grpc.aio.Channel, control: ControlStream) -> None:
        self._channel = channel
        self._control = control
        self._epoch = next_epoch()
        self._number = 0  # of links and micro-batches

    async def open_stage(self) -> None:
        """Takes the stage into a pipeline, with a sequence that frames are for."""
        index = NUM_STAGES - 1
        how = {"epoch": self._epoch, "term": term_of_now()}
        await self._control.open(index=index, num_stages=NUM_STAGES, **how)
        await self._control.send(updates=start_of_sequence())
        await self._control.report()

    async def call(self, method: RpcMethod, messages: Sequence[bytes]) -> Outcome:
        """Sends a sequence with the placeholders of `stage_sequences.frames` filled in."""
        self._number += 1
        sent = [self._filled_in(message) for message in messages]
        started_s = time.monotonic()
        code, details = await self._converse(method, sent)
        try:
            abandon = stage_pb2.AbandonMicroBatches(ids=[self._number])
            await self._control.send(abandon=abandon)
            await self._control.report()
        except (grpc.aio.AioRpcError, EOFError, TimeoutError) as error:
            code, details = grpc.StatusCode.UNKNOWN, f"the whole stage was left: {error!r}"
        return Outcome(code=code, details=details, seconds=time.monotonic() - started_s)

    async def _converse(
        self, method: RpcMethod, sent: Sequence[bytes]
    ) -> tuple[grpc.StatusCode, str]:
        stream = self._channel.stream_stream(method.path)(timeout=method.deadline_s)
        try:
            await stream.write(sent[0])
            if self._is_right_opening(sent[0]) and len(sent) > 1:
                await stream.read()  # the link stands
                await self._control.send(micro_batch=self._batch())
            for message in sent[1:]:
                await stream.write(message)
            await stream.done_writing()
            while await stream.read() is not grpc.aio.EOF:
                pass
            return await stream.code(), await stream.details()
        except grpc.aio.AioRpcError as error:
            return error.code(), error.details() or ""
        except asyncio.InvalidStateError:  # it ended while we wrote
            return await stream.code(), await stream.details()
        finally:
            stream.cancel()

    def _filled_in(self, message: bytes) -> bytes:
        request = _parsed(message)
        if request is None:
            return message
        if request.open.epoch == 1:
            request.open.epoch, request.open.link_id = self._epoch, self._number
        if request.HasField("frame") and request.frame.link_id == 0:
            request.frame.link_id = self._number
            if request.frame.micro_batch_id == 1:
                request.frame.micro_batch_id = self._number
        return request.SerializeToString()

    def _is_right_opening(self, message: bytes) -> bool:
        right = stage_pb2.OpenLink(epoch=self._epoch, link_id=self._number)
        return _parsed(message) == stage_pb2.ActivateRequest(open=right)

    def _batch(self) -> stage_pb2.MicroBatch:
        rewind = stage_pb2.SequenceUpdates(rewind_slots=[0], rewind_positions=[0])
        return stage_pb2.MicroBatch(
            id=self._number,
            updates=rewind,
            slots=[0],
            first_positions=[0],
            num_rows=[NUM_ROWS],
            num_samples=[1],
            upstream_link=self._number,
        )


def _parsed(message: bytes) -> stage_pb2.ActivateRequest | None:
    try:
        return stage_pb2.ActivateRequest.FromString(message)
    except DecodeError:
        return None
