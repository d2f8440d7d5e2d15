"""What a link or a replica loses is restored from the log: real models, equal to the bit."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from penstock.v1 import stage_pb2

from services.stage.model import load_model
from services.stage.settings import StageSettings
from tests.support.models import TINY_MODELS, write_hugging_face
from tests.support.stages import (
    HandDrivenCoordinator,
    StageServer,
    both_ways,
    micro_batch,
    stage_server,
    start,
)

LAYERS = ["0:1", "1:3", "3:4"]
FORMATS = [
    *(("fp32", "f32"), ("bf16", "f32"), ("bf16", "bf16"), ("int8", "f32"), ("int8", "bf16")),
    ("int8", "int8"),
]
PROMPTS = [list(range(30, 85)), [*range(30, 46), 7, 7, 9]]  # they share a block
NUM_STEPS = 6
formats = pytest.mark.parametrize(("number_format", "wire"), FORMATS)


@dataclass(frozen=True, kw_only=True)
class Kind:
    """What replicas are made of."""

    folder: Path
    number_format: str
    wire: str
    offers_shortcuts: bool

    @asynccontextmanager
    async def replica(self, place: int) -> AsyncIterator[StageServer]:
        first, end = LAYERS[place].split(":")
        settings = StageSettings(
            model=self.folder,
            name="tiny",
            first_layer=int(first),
            end_layer=int(end),
            listen="",
            number_format=self.number_format,
            wire=self.wire,
            num_kv_blocks=16,
            max_rows=100,
            max_sequences=4,
        )
        options = {"offers_shortcuts": self.offers_shortcuts}
        async with stage_server(lambda: load_model(settings), **options) as server:
            yield server


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_hugging_face(tmp_path_factory.mktemp("restoring"), TINY_MODELS["mistral"])


class Generation:
    """Two sequences that generate over a path, one greedy and one drawn, with log probabilities.

    `answers` are all that the last stage said, to the bit.
    """

    def __init__(self, coordinator: HandDrivenCoordinator, path: Sequence[int]) -> None:
        self.coordinator = coordinator
        self.path = path
        self.answers: list[bytes] = []
        self.known = [list(prompt) for prompt in PROMPTS]
        self.landed = [0, 0]
        self._last_id = 0

    async def step(self) -> None:
        """Computes what is not computed yet, and takes its tokens."""
        await self.order()
        await self.land()

    async def order(self) -> None:
        """Orders what is not computed yet."""
        batch = self._batch({slot: ids[self.landed[slot] :] for slot, ids in enumerate(self.known)})
        if self.landed == [0, 0]:
            batch.updates.CopyFrom(starting(shares=True))
            del batch.token_ids[len(PROMPTS[0]) : len(PROMPTS[0]) + 16]
            batch.first_positions[1] = 16
            batch.num_rows[1] -= 16
        await self.coordinator.run(batch, path=self.path)

    async def land(self) -> None:
        """Takes the tokens of the micro-batch in flight."""
        sampled = await self.coordinator.controls[self.path[-1]].next("sampled")
        assert sampled.micro_batch_id == self._last_id
        sampled.micro_batch_id = sampled.sent_unix_ns = 0
        self.answers.append(sampled.SerializeToString(deterministic=True))
        self.landed = [len(ids) for ids in self.known]
        for ids, token in zip(self.known, sampled.token_ids, strict=True):
            ids.append(token)

    async def lose(self, *indices: int) -> None:
        """Has replicas give up the micro-batch in flight, and forget what has not landed."""
        for index in indices:
            await self.coordinator.abandon(index, self._last_id)
            rewinds = stage_pb2.SequenceUpdates(rewind_slots=[0, 1], rewind_positions=self.landed)
            await self.coordinator.controls[index].send(updates=rewinds)

    async def restore(self, upstream: int, downstream: int) -> None:
        """Has one replica compute again what has landed, from the other one's log."""
        await self.coordinator.controls[downstream].send(updates=starting(shares=False))
        batch = self._batch({slot: ids[: self.landed[slot]] for slot, ids in enumerate(self.known)})
        batch.first_positions[:] = [0, 0]
        batch.num_samples[:] = [0, 0]
        await self.coordinator.run(batch, path=[upstream, downstream], replays=True)

    def _batch(self, rows: dict[int, list[int]]) -> stage_pb2.MicroBatch:
        self._last_id += 1
        batch = micro_batch(self._last_id, rows)
        batch.first_positions[:] = self.landed
        return batch


def starting(*, shares: bool) -> stage_pb2.SequenceUpdates:
    """Both sequences begin; where it `shares`, the second one has the first block of the first."""
    starts = [start(slot) for slot in (0, 1)]
    for begin in starts:
        begin.sampling.logprobs = 5
    starts[1].sampling.temperature = 1.2
    starts[1].sampling.seed = 7
    if shares:
        starts[1].num_cached_positions = 16
    tables = [[0, 1, 2, 3], [0, 5, 6, 7]] if shares else [[15, 14, 13, 12], [8, 10, 9, 11]]
    return stage_pb2.SequenceUpdates(
        starts=starts,
        block_slots=[slot for slot, table in enumerate(tables) for _ in table],
        block_ids=[block for table in tables for block in table],
    )


async def undisturbed(kind: Kind) -> list[bytes]:
    """The answers of a chain that nothing happens to."""
    async with AsyncExitStack() as stack:
        stages = [await stack.enter_async_context(kind.replica(place)) for place in range(3)]
        coordinator = await stack.enter_async_context(HandDrivenCoordinator(stages))
        await coordinator.open()
        generation = Generation(coordinator, [0, 1, 2])
        for _ in range(NUM_STEPS):
            await generation.step()
    return generation.answers


class Cutter:
    """Passes so many bytes on to an address, and then ends the connection."""

    def __init__(self, target: str, *, after: int) -> None:
        self._host, _, port = target.rpartition(":")
        self._port = int(port)
        self._left = after

    @asynccontextmanager
    async def listening(self) -> AsyncIterator[str]:
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        async with server:
            yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection(self._host, self._port)
        backwards = asyncio.create_task(self._pass_on(there, writer))
        while self._left > 0 and (data := await reader.read(min(self._left, 65536))):
            self._left -= len(data)
            back.write(data)
            await back.drain()
        backwards.cancel()
        for one in (back, writer):
            one.close()

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            writer.write(data)


@formats
async def test_a_link_that_is_cut_within_a_frame_changes_nothing(
    number_format: str, wire: str, folder: Path
) -> None:
    kind = Kind(folder=folder, number_format=number_format, wire=wire, offers_shortcuts=False)
    expected = await undisturbed(kind)
    async with AsyncExitStack() as stack:
        stages = [await stack.enter_async_context(kind.replica(place)) for place in range(3)]
        coordinator = await stack.enter_async_context(HandDrivenCoordinator(stages))
        await coordinator.open()
        # Less than the rows of the prompts, more than it takes to open the link.
        cutter = Cutter(stages[2].address, after=2500)
        address = await stack.enter_async_context(cutter.listening())
        assert (await coordinator.connect(1, 2, address=address)).stands
        generation = Generation(coordinator, [0, 1, 2])
        await generation.order()
        state = await coordinator.controls[1].next("link")
        assert (state.link_id, state.stands) == (coordinator.links[1, 2], False)
        await coordinator.abandon(2, 1)
        assert (await coordinator.connect(1, 2)).stands
        again = generation._batch({0: PROMPTS[0], 1: PROMPTS[1][16:]})
        again.first_positions[:] = [0, 16]
        await coordinator.run(again, path=[1, 2], replays=True)
        await generation.land()
        for _ in range(NUM_STEPS - 1):
            await generation.step()
    assert generation.answers == expected


@both_ways
@formats
async def test_a_spare_takes_over_from_a_replica_that_has_gone_and_nothing_changes(
    number_format: str, wire: str, folder: Path, offers_shortcuts: bool
) -> None:
    kind = Kind(
        folder=folder,
        number_format=number_format,
        wire=wire,
        offers_shortcuts=offers_shortcuts,
    )
    expected = await undisturbed(kind)
    async with AsyncExitStack() as stack:
        first, spare, last = [
            await stack.enter_async_context(kind.replica(place)) for place in range(3)
        ]
        async with kind.replica(1) as dying:
            coordinator = await stack.enter_async_context(
                HandDrivenCoordinator([first, dying, last, spare], places=[0, 1, 2, 1])
            )
            await coordinator.open()
            generation = Generation(coordinator, [0, 1, 2])
            for _ in range(3):
                await generation.step()
        state = await coordinator.controls[0].next("link")
        assert (state.link_id, state.stands) == (coordinator.links[0, 1], False)
        # In flight when it died: the first computes it for nobody, the last never hears of it.
        coordinator.lost.add(1)
        await generation.order()
        await generation.lose(0, 2)
        await generation.restore(0, 3)
        generation.path = [0, 3, 2]
        await generation.order()  # right behind what restores
        await generation.land()
        while len(generation.answers) < NUM_STEPS:
            await generation.step()
        answer = await coordinator.controls[3].next("sampled")
        assert list(answer.token_ids) == []
    assert generation.answers == expected
