"""StageService: streams to and from the session."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, TypeVar

from penstock.v1 import stage_pb2, stage_pb2_grpc

from core.errors import MalformedMessage
from services.stage.session import Session
from services.stage.stage import Stage
from services.stage.upstream_link import UpstreamLink

# A peer that connects says what it wants at once.
FIRST_MESSAGE_TIMEOUT_S = 30.0
Request = TypeVar("Request")


class StageServicer(stage_pb2_grpc.StageServiceServicer):
    """Takes orders and activations in; sends results and credits out."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage

    async def Control(
        self, requests: AsyncIterator[stage_pb2.ControlRequest], context: Any
    ) -> AsyncIterator[stage_pb2.ControlResponse]:
        first = await _first(requests)
        if not first.HasField("open"):
            raise MalformedMessage("the first order of a stream opens the pipeline")
        session = await self._stage.open(first.open)
        try:
            async with _reading(
                partial(_take_orders, requests, session, self._stage), session.close
            ):
                async for response in session.responses:
                    yield response
        finally:
            self._stage.leave(session)

    async def Activate(
        self, requests: AsyncIterator[stage_pb2.ActivateRequest], context: Any
    ) -> AsyncIterator[stage_pb2.ActivateResponse]:
        first = await _first(requests)
        if not first.HasField("open") or first.HasField("frame"):
            raise MalformedMessage("the first message of a stream opens the link")
        session = await self._stage.session_of(first.open.epoch)
        link_id = first.open.link_id
        link = session.links.open_upstream(link_id)
        try:
            async with _reading(partial(_take_frames, requests, link), link.close):
                async for response in link.responses:
                    yield response
        finally:
            session.links.end_upstream(link_id)


async def _take_orders(
    requests: AsyncIterator[stage_pb2.ControlRequest], session: Session, stage: Stage
) -> None:
    await stage.begin(session)
    async for request in requests:
        session.take_order(request)


async def _take_frames(
    requests: AsyncIterator[stage_pb2.ActivateRequest], link: UpstreamLink
) -> None:
    async for request in requests:
        if not request.HasField("frame") or request.HasField("open"):
            raise MalformedMessage("all messages but the first carry one frame")
        link.take(request.frame)


async def _first(requests: AsyncIterator[Request]) -> Request:
    try:
        async with asyncio.timeout(FIRST_MESSAGE_TIMEOUT_S):
            return await anext(requests)
    except (TimeoutError, StopAsyncIteration) as error:
        raise MalformedMessage("a stream without a first message") from error


@asynccontextmanager
async def _reading(reader: Any, close: Callable[[Exception | None], None]) -> AsyncIterator[None]:
    """Runs `reader` beside the block; when it ends or fails, `close` hears of it."""

    async def read() -> None:
        try:
            await reader()
        except Exception as error:  # raised again by the outbox, in the stream's own task
            close(error)
        else:
            close(None)

    task = asyncio.create_task(read())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
