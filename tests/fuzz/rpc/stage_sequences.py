"""Right conversations with a stage, to be made wrong."""

from __future__ import annotations

import itertools
import time
from random import Random

import numpy as np
import xxhash
from google.protobuf.message import Message
from penstock.v1 import generation_pb2, stage_pb2, tensor_pb2

HIDDEN_SIZE = 64
NUM_STAGES = 2
# Of a micro-batch that comes over a link.
NUM_ROWS = 2
# As the coordinator counts them: milliseconds of Unix time, each greater than the one before.
_epochs = itertools.count(time.time_ns() // 1_000_000)


def next_epoch() -> int:
    return next(_epochs)


def term_of_now() -> int:
    """As of a coordinator that has just taken over: what was spoiled is mostly earlier."""
    return time.time_ns() // 1_000_000


def opening(*, stage_index: int) -> stage_pb2.ControlRequest:
    """Takes the stage into a pipeline, with an epoch of its own."""
    return stage_pb2.ControlRequest(
        open=stage_pb2.OpenPipeline(
            epoch=next_epoch(),
            stage_index=stage_index,
            num_stages=NUM_STAGES,
            num_slots=64,
            term=term_of_now(),
        )
    )


def orders(random: Random) -> list[Message]:
    """Sequences that start, grow and end on the first stage, and what else may be ordered."""
    messages: list[Message] = [opening(stage_index=0)]
    link_id = 1
    if random.random() < 0.3:
        dial = stage_pb2.OpenDownstream(link_id=link_id, address="127.0.0.1:1", epoch=1)
        messages.append(stage_pb2.ControlRequest(open_downstream=dial))
    position = 0
    for id in range(1, random.randint(2, 5)):
        num_rows = random.choice((1, 3, 16))
        batch = _micro_batch(id, position=position, num_rows=num_rows, starts=position == 0)
        position += num_rows
        messages.append(stage_pb2.ControlRequest(micro_batch=batch))
    other = random.randrange(4)
    if other == 0:
        messages.append(stage_pb2.ControlRequest(report=stage_pb2.ReportRequest()))
    elif other == 1:
        abandon = stage_pb2.AbandonMicroBatches(ids=[1, 2])
        messages.append(stage_pb2.ControlRequest(abandon=abandon))
    elif other == 2:
        rewind = stage_pb2.SequenceUpdates(rewind_slots=[0], rewind_positions=[0])
        messages.append(stage_pb2.ControlRequest(updates=rewind))
    ended = stage_pb2.SequenceUpdates(ended_slots=[0])
    messages.append(stage_pb2.ControlRequest(updates=ended))
    return messages


def start_of_sequence(*, num_blocks: int = 4) -> stage_pb2.SequenceUpdates:
    """One begins in slot 0, with room for 64 positions."""
    sampling = generation_pb2.SamplingParameters(
        max_tokens=10, temperature=0, top_p=1, repetition_penalty=1
    )
    return stage_pb2.SequenceUpdates(
        starts=[stage_pb2.SequenceStart(slot=0, request_id=1, sampling=sampling)],
        block_slots=[0] * num_blocks,
        block_ids=range(num_blocks),
    )


def _micro_batch(id: int, *, position: int, num_rows: int, starts: bool) -> stage_pb2.MicroBatch:
    return stage_pb2.MicroBatch(
        id=id,
        updates=start_of_sequence() if starts else None,
        slots=[0],
        first_positions=[position],
        num_rows=[num_rows],
        num_samples=[0],
        token_ids=[7] * num_rows,
    )


def frames(random: Random) -> list[Message]:
    """A link and a micro-batch's frames; epoch and ids are put right when they are sent."""
    messages: list[Message] = [stage_pb2.ActivateRequest(open=stage_pb2.OpenLink(epoch=1))]
    row = 0
    for number, num_rows in enumerate(random.choice(((NUM_ROWS,), (1,) * NUM_ROWS))):
        data = np.ones((num_rows, HIDDEN_SIZE), "<f4").tobytes()
        frame = tensor_pb2.ActivationFrame(
            micro_batch_id=1,
            sequence_number=number,
            codec=tensor_pb2.CODEC_F32,
            first_row=row,
            num_rows=num_rows,
            hidden_size=HIDDEN_SIZE,
            data=data,
            checksum=xxhash.xxh3_64_intdigest(data),
        )
        row += num_rows
        messages.append(stage_pb2.ActivateRequest(frame=frame))
    return messages
