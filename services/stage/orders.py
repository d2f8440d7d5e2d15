"""Orders of the coordinator: protobuf to core types, checked; and results back.

A message that could not be right in any state raises MalformedMessage, or
InvalidInput where a sampling parameter is out of range. Whether an order fits the
live sequences and their blocks is for the engine to say.

Letters: R runs, T rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from penstock.v1 import generation_pb2, stage_pb2

from core.errors import MalformedMessage
from core.pipeline.batch import MicroBatch, SampledTokens, SequenceStart, SequenceUpdates
from core.sampling.parameters import SamplingParameters
from core.sampling.validation import validate_parameters


@dataclass(frozen=True, kw_only=True)
class OrderLimits:
    """What the loaded model and the stage's place in the pipeline allow."""

    max_rows: int
    vocab_size: int
    context_length: int
    is_first: bool
    is_last: bool


def decode_micro_batch(message: stage_pb2.MicroBatch, limits: OrderLimits) -> MicroBatch:
    """Returns the micro-batch that `message` orders."""
    runs = (message.slots, message.first_positions, message.num_rows, message.num_samples)
    if len({len(values) for values in runs}) != 1 or not message.slots:
        raise MalformedMessage(
            f"micro-batch {message.id} has no runs, or runs of unequal descriptions"
        )
    batch = MicroBatch(
        id=message.id,
        slots_R=_array(message.slots),
        first_positions_R=_array(message.first_positions),
        num_rows_R=_array(message.num_rows),
        num_samples_R=_array(message.num_samples),
        token_ids_T=_array(message.token_ids),
        updates=decode_updates(message.updates, limits),
        replays=message.replays,
        is_alone=message.is_alone,
    )
    _check_links(message, limits)
    _check_rows(batch, limits)
    _check_tokens(batch, limits)
    return batch


def decode_updates(message: stage_pb2.SequenceUpdates, limits: OrderLimits) -> SequenceUpdates:
    """Returns the changes to sequences that `message` orders."""
    if len(message.block_slots) != len(message.block_ids):
        raise MalformedMessage(
            f"{len(message.block_slots)} block slots for {len(message.block_ids)} block ids"
        )
    if len(message.rewind_slots) != len(message.rewind_positions):
        raise MalformedMessage(
            f"{len(message.rewind_slots)} slots to rewind to "
            f"{len(message.rewind_positions)} positions"
        )
    return SequenceUpdates(
        ended_slots=tuple(message.ended_slots),
        starts=tuple(_decode_start(start, limits) for start in message.starts),
        block_slots=tuple(message.block_slots),
        block_ids=tuple(message.block_ids),
        rewind_slots=tuple(message.rewind_slots),
        rewind_positions=tuple(message.rewind_positions),
    )


def encode_sampled(sampled: SampledTokens) -> stage_pb2.SampledTokens:
    """Returns the message that carries sampled tokens to the coordinator."""
    message = stage_pb2.SampledTokens(
        micro_batch_id=sampled.micro_batch_id, token_ids=sampled.token_ids
    )
    for entry in sampled.logprobs:
        position = message.logprobs.add()
        if entry is None:
            continue
        position.chosen.token_id = entry.token_id
        position.chosen.logprob = entry.logprob
        for token_id, logprob in zip(entry.top_token_ids, entry.top_logprobs, strict=True):
            position.top.add(token_id=token_id, logprob=logprob)
    return message


def _decode_start(message: stage_pb2.SequenceStart, limits: OrderLimits) -> SequenceStart:
    known = tuple(message.known_token_ids)
    if (
        len(known) > limits.context_length
        or message.num_prompt_tokens > len(known)
        or any(id >= limits.vocab_size for id in known)
    ):
        raise MalformedMessage(f"slot {message.slot} starts with known tokens that cannot be")
    return SequenceStart(
        slot=message.slot,
        request_id=message.request_id,
        num_cached_positions=message.num_cached_positions,
        sampling=_decode_sampling(message, limits),
        known_token_ids=known,
        num_prompt_tokens=message.num_prompt_tokens,
        traceparent=message.traceparent,
    )


def _decode_sampling(
    start: stage_pb2.SequenceStart, limits: OrderLimits
) -> SamplingParameters | None:
    if not limits.is_last:
        return None
    if not start.HasField("sampling"):
        raise MalformedMessage(f"slot {start.slot} starts without sampling on the last stage")
    parameters = _sampling(start.sampling)
    validate_parameters(parameters, vocab_size=limits.vocab_size)
    return parameters


def _sampling(message: generation_pb2.SamplingParameters) -> SamplingParameters:
    return SamplingParameters(
        max_tokens=message.max_tokens,
        temperature=message.temperature,
        top_k=message.top_k,
        top_p=message.top_p,
        min_p=message.min_p,
        repetition_penalty=message.repetition_penalty,
        presence_penalty=message.presence_penalty,
        frequency_penalty=message.frequency_penalty,
        seed=message.seed,
        stop_token_ids=tuple(message.stop_token_ids),
        ignore_eos=message.ignore_eos,
        logprobs=message.logprobs if message.HasField("logprobs") else None,
    )


def _check_links(message: stage_pb2.MicroBatch, limits: OrderLimits) -> None:
    comes_over_link = not (limits.is_first or message.replays)
    if bool(message.upstream_link) != comes_over_link:
        where = "over a link" if comes_over_link else "from here"
        raise MalformedMessage(f"the rows of micro-batch {message.id} come {where}")
    if message.downstream_link and limits.is_last:
        raise MalformedMessage("no link leads on from the last stage")


def _check_rows(batch: MicroBatch, limits: OrderLimits) -> None:
    num_rows = int(batch.num_rows_R.sum(dtype=np.int64))
    if (batch.num_rows_R < 1).any() or num_rows > limits.max_rows:
        raise MalformedMessage(
            f"micro-batch {batch.id} has an empty run or {num_rows} rows in all; "
            f"at most {limits.max_rows} are allowed"
        )
    if (batch.num_samples_R < 0).any() or (batch.num_samples_R > batch.num_rows_R).any():
        raise MalformedMessage(f"micro-batch {batch.id} has a run that samples more than its rows")


def _check_tokens(batch: MicroBatch, limits: OrderLimits) -> None:
    if batch.replays:  # its rows are in the log, whatever they were
        return
    wanted = batch.num_rows if limits.is_first else 0
    if batch.token_ids_T.size != wanted:
        raise MalformedMessage(
            f"micro-batch {batch.id} has {batch.token_ids_T.size} token ids; wanted are {wanted}"
        )
    if (batch.token_ids_T >= limits.vocab_size).any():
        raise MalformedMessage(
            f"micro-batch {batch.id} has a token id beyond the vocabulary of {limits.vocab_size}"
        )


def _array(values: Sequence[int]) -> npt.NDArray[np.int32]:
    try:
        return np.array(values, np.int32)
    except OverflowError as error:
        raise MalformedMessage("a number of a micro-batch does not fit 31 bits") from error
