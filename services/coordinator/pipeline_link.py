"""Keeps the Control streams to all stages of the pipeline open.

One incarnation of the pipeline lasts from opening every stage until the first stream
breaks; the next one has a higher epoch.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from functools import partial
from typing import Protocol

import grpc
from penstock.v1 import stage_pb2

from core.errors import PenstockError, ProtocolViolation, Unavailable
from services.common.cancellation import in_own_task
from services.common.channels import open_channel
from services.coordinator.fit import check_fit
from services.coordinator.settings import CoordinatorSettings
from services.coordinator.stage_stream import StageLost, StageStream

_LOG = logging.getLogger(__name__)
_FIRST_BACKOFF_S = 0.1
_MOST_BACKOFF_S = 2.0


class PipelineListener(Protocol):
    """Who is told what happens to the pipeline."""

    def on_stage_ready(self, stage_index: int, ready: stage_pb2.StageReady) -> None:
        """A stage has loaded its weights; the others may not have."""

    def on_pipeline_ready(self, stages: Sequence[stage_pb2.StageReady]) -> None:
        """All stages are open and fit."""

    def on_sampled(self, message: stage_pb2.SampledTokens) -> None:
        """A micro-batch has left the last stage."""

    def on_report(self, stage_index: int, report: stage_pb2.StageReport) -> None:
        """A stage has reported its times."""

    def on_pipeline_lost(self, stage_index: int | None, reason: str) -> None:
        """The incarnation has ended, or did not come about; another one will be tried.
        `stage_index` is the stage to blame, where one is."""


class PipelineLink:
    """Dials, opens and watches the stages; see `run`."""

    def __init__(
        self,
        settings: CoordinatorSettings,
        listener: PipelineListener,
        *,
        dial: Callable[[str], grpc.aio.Channel] = open_channel,
    ) -> None:
        self._settings = settings
        self._listener = listener
        self._dial = dial
        self._streams: list[StageStream] = []
        self._dropped: asyncio.Future[str] | None = None
        self._was_ready = False
        self.epoch = 0

    def send(self, stage_index: int, request: stage_pb2.ControlRequest) -> None:
        """Sends an order to a stage; orders to a pipeline that is gone are dropped."""
        if not self._streams:
            return
        try:
            self._streams[stage_index].send(request)
        except Unavailable as error:
            self.drop(str(error))

    def drop(self, reason: str) -> None:
        """Ends the incarnation because it makes no progress."""
        if self._dropped is not None and not self._dropped.done():
            self._dropped.set_result(reason)

    async def run(self) -> None:
        """Opens the pipeline again and again until cancelled."""
        backoff_s = _FIRST_BACKOFF_S
        async with AsyncExitStack() as stack:
            channels = [
                await stack.enter_async_context(self._dial(address))
                for address in self._settings.stages
            ]
            while True:
                stage_index, reason = await in_own_task(self._run_once(channels))
                if self._was_ready:
                    backoff_s = _FIRST_BACKOFF_S
                _LOG.warning("pipeline lost", extra={"epoch": self.epoch, "reason": reason})
                self._listener.on_pipeline_lost(stage_index, reason)
                await asyncio.sleep(backoff_s)
                backoff_s = min(2 * backoff_s, _MOST_BACKOFF_S)

    async def _run_once(self, channels: Sequence[grpc.aio.Channel]) -> tuple[int | None, str]:
        """One incarnation; returns which stage ended it, where known, and why."""
        # A restarted coordinator must exceed the epochs of the one before it.
        self.epoch = max(self.epoch + 1, time.time_ns() // 1_000_000)
        self._was_ready = False
        self._dropped = asyncio.get_running_loop().create_future()
        addresses = self._settings.stages
        streams = [
            StageStream(index, address, channel)
            for index, (address, channel) in enumerate(zip(addresses, channels, strict=True))
        ]
        outcome: tuple[int | None, str] | None = None
        try:
            async with asyncio.TaskGroup() as group:
                for stream in streams:
                    group.create_task(stream.run(self._order(stream), self._on_message))
                group.create_task(self._watch_dropped(self._dropped))
                await self._become_ready(streams)
        except* StageLost as lost:
            first = lost.exceptions[0]
            assert isinstance(first, StageLost)
            outcome = (first.stage_index, str(first))
        except* PenstockError as errors:
            outcome = outcome or (None, str(errors.exceptions[0]))
        finally:
            self._streams = []
        assert outcome is not None, "streams end by raising"
        return outcome

    def _order(self, stream: StageStream) -> stage_pb2.OpenPipeline:
        addresses = self._settings.stages
        index = stream.stage_index
        return stage_pb2.OpenPipeline(
            epoch=self.epoch,
            stage_index=index,
            num_stages=len(addresses),
            downstream_address=addresses[index + 1] if index + 1 < len(addresses) else "",
            num_slots=self._settings.max_sequences,
        )

    async def _become_ready(self, streams: list[StageStream]) -> None:
        timeout_s = self._settings.open_timeout_s
        for stream in streams:
            stream.ready.add_done_callback(partial(self._on_stage_ready, stream))
        try:
            async with asyncio.timeout(timeout_s):
                stages = [await stream.ready for stream in streams]
        except TimeoutError:
            late = [s.address for s in streams if not s.ready.done()]
            raise Unavailable(f"not ready within {timeout_s:.0f} s: {', '.join(late)}") from None
        check_fit(stages)
        self._streams = streams
        self._was_ready = True
        _LOG.info("pipeline ready", extra={"epoch": self.epoch, "stages": len(streams)})
        self._listener.on_pipeline_ready(stages)

    def _on_stage_ready(
        self, stream: StageStream, future: asyncio.Future[stage_pb2.StageReady]
    ) -> None:
        if not future.cancelled():
            self._listener.on_stage_ready(stream.stage_index, future.result())

    async def _watch_dropped(self, dropped: asyncio.Future[str]) -> None:
        raise Unavailable(await dropped)

    def _on_message(self, stage_index: int, response: stage_pb2.ControlResponse) -> None:
        match response.WhichOneof("event"):
            case "sampled":
                if stage_index != len(self._settings.stages) - 1:
                    raise ProtocolViolation(f"stage {stage_index} is not the last and sampled")
                self._listener.on_sampled(response.sampled)
            case "report":
                self._listener.on_report(stage_index, response.report)
            case other:
                raise ProtocolViolation(f"stage {stage_index} sent a message of kind {other}")
