"""Calls of Activate beside a coordinator's stream, so that frames meet what was scheduled."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Any

import grpc
from google.protobuf.message import DecodeError
from penstock.v1 import stage_pb2, stage_pb2_grpc

from tests.fuzz.rpc.calls import Outcome, open_channel
from tests.fuzz.rpc.methods import RpcMethod
from tests.fuzz.rpc.stage_sequences import NUM_ROWS, opening, start_of_sequence

_PULSE_TIMEOUT_S = 30.0


class ActivateCaller:
    """Opens the last stage, and orders a micro-batch over each link that comes to stand.

    A link that carries what is wrong ends alone: a coordinator's stream that ends with it is
    judged as a fault of the stage.
    """

    def __init__(self, address: str) -> None:
        self._address = address
        self._number = 0  # of links and micro-batches

    async def __aenter__(self) -> ActivateCaller:
        self._channel = open_channel(self._address)
        stub: Any = stage_pb2_grpc.StageServiceStub(self._channel)
        self._control = stub.Control(wait_for_ready=True)
        order = opening(stage_index=1)
        self._epoch = order.open.epoch
        await self._order(order)
        await self._order(stage_pb2.ControlRequest(updates=start_of_sequence()))
        await self._await_pulse()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._control.cancel()
        await self._channel.close()

    async def call(self, method: RpcMethod, messages: Sequence[bytes]) -> Outcome:
        """Sends a sequence with the placeholders of `stage_sequences.frames` filled in."""
        self._number += 1
        sent = [self._filled_in(message) for message in messages]
        started_s = time.monotonic()
        code, details = await self._converse(method, sent)
        try:
            abandon = stage_pb2.AbandonMicroBatches(ids=[self._number])
            await self._order(stage_pb2.ControlRequest(abandon=abandon))
            await self._await_pulse()
        except (grpc.aio.AioRpcError, TimeoutError) as error:
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
                await self._order(stage_pb2.ControlRequest(micro_batch=self._batch()))
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

    async def _order(self, order: stage_pb2.ControlRequest) -> None:
        await self._control.write(order)

    async def _await_pulse(self) -> None:
        """Returns when the stage has said what it is at; raises what its stream ended with."""
        await self._order(stage_pb2.ControlRequest(report=stage_pb2.ReportRequest()))
        async with asyncio.timeout(_PULSE_TIMEOUT_S):
            while not _is_report(await self._control.read()):
                pass


def _is_report(response: Any) -> bool:
    if response is grpc.aio.EOF:
        raise TimeoutError("the stage ended its stream")
    return response.HasField("report")


def _parsed(message: bytes) -> stage_pb2.ActivateRequest | None:
    try:
        return stage_pb2.ActivateRequest.FromString(message)
    except DecodeError:
        return None
