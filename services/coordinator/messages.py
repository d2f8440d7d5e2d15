"""Between messages of the contract and the scheduler's events and actions."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from itertools import pairwise

from penstock.v1 import coordinator_pb2, generation_pb2, stage_pb2

from core.errors import Exhausted, InvalidInput, PenstockError, Unavailable
from core.pipeline.actions import (
    AbandonMicroBatches,
    EmitTokens,
    FinishReason,
    Refuse,
    RunMicroBatch,
    Usage,
)
from core.pipeline.batch import PositionLogprobs, SequenceStart, SequenceUpdates
from core.pipeline.cut import Cut, Part
from core.pipeline.events import StageReported, TokensSampled
from core.sampling.parameters import SamplingParameters
from services.common.durations import duration
from services.common.statuses import status_from_error

_FINISH_REASONS = {
    FinishReason.STOP: generation_pb2.FINISH_REASON_STOP,
    FinishReason.LENGTH: generation_pb2.FINISH_REASON_LENGTH,
    FinishReason.CANCELLED: generation_pb2.FINISH_REASON_CANCELLED,
}
_NOTHING = SequenceUpdates()


# --- to stages


def micro_batch_requests(
    action: RunMicroBatch, link_id: Callable[[int, int], int]
) -> Iterator[stage_pb2.ControlRequest]:
    """One order for each replica of the path, made one by one: the first stage waits for its own.

    `link_id` tells the link between two of them.
    """
    common = stage_pb2.MicroBatch(
        id=action.micro_batch_id,
        slots=action.slots_R,
        first_positions=action.first_positions_R,
        num_rows=action.num_rows_R,
        num_samples=action.num_samples_R,
        sent_unix_ns=time.time_ns(),
        is_alone=action.is_alone,
    )
    upstream_link = 0
    last = len(action.path) - 1
    for number, updates in enumerate(action.updates_P):
        request = stage_pb2.ControlRequest(micro_batch=common)
        batch = request.micro_batch
        if number == 0 and action.replays:
            batch.replays = True
        elif number == 0 and action.first_stage == 0:
            batch.token_ids.extend(action.token_ids_T)
        if upstream_link:
            batch.upstream_link = upstream_link
        if number < last:
            upstream_link = link_id(action.path[number], action.path[number + 1])
            batch.downstream_link = upstream_link
        if updates is not _NOTHING and updates != _NOTHING:
            _write_updates(batch.updates, updates)
        yield request


def updates_request(updates: SequenceUpdates) -> stage_pb2.ControlRequest:
    request = stage_pb2.ControlRequest()
    request.updates.SetInParent()
    _write_updates(request.updates, updates)
    return request


def abandon_request(action: AbandonMicroBatches) -> stage_pb2.ControlRequest:
    abandon = stage_pb2.AbandonMicroBatches(ids=action.micro_batch_ids)
    return stage_pb2.ControlRequest(abandon=abandon)


def _write_updates(message: stage_pb2.SequenceUpdates, updates: SequenceUpdates) -> None:
    message.ended_slots.extend(updates.ended_slots)
    message.starts.extend(_start_message(start) for start in updates.starts)
    message.block_slots.extend(updates.block_slots)
    message.block_ids.extend(updates.block_ids)
    message.rewind_slots.extend(updates.rewind_slots)
    message.rewind_positions.extend(updates.rewind_positions)


def _start_message(start: SequenceStart) -> stage_pb2.SequenceStart:
    message = stage_pb2.SequenceStart(
        slot=start.slot,
        request_id=start.request_id,
        num_cached_positions=start.num_cached_positions,
        known_token_ids=start.known_token_ids,
        num_prompt_tokens=start.num_prompt_tokens,
        traceparent=start.traceparent,
    )
    if start.sampling is not None:
        message.sampling.CopyFrom(_sampling_message(start.sampling))
    return message


def _sampling_message(sampling: SamplingParameters) -> generation_pb2.SamplingParameters:
    return generation_pb2.SamplingParameters(
        max_tokens=sampling.max_tokens,
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        min_p=sampling.min_p,
        repetition_penalty=sampling.repetition_penalty,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        seed=sampling.seed,
        stop_token_ids=sampling.stop_token_ids,
        ignore_eos=sampling.ignore_eos,
        logprobs=sampling.logprobs,
    )


# --- from stages


def tokens_sampled(message: stage_pb2.SampledTokens) -> TokensSampled:
    return TokensSampled(
        micro_batch_id=message.micro_batch_id,
        token_ids=list(message.token_ids),
        logprobs=[_logprobs(entry) for entry in message.logprobs],
    )


def _logprobs(message: generation_pb2.PositionLogprobs) -> PositionLogprobs | None:
    if not message.HasField("chosen"):
        return None
    return PositionLogprobs(
        token_id=message.chosen.token_id,
        logprob=message.chosen.logprob,
        top_token_ids=tuple(entry.token_id for entry in message.top),
        top_logprobs=tuple(entry.logprob for entry in message.top),
    )


def stage_reported(replica_id: int, message: stage_pb2.StageReport) -> StageReported:
    return StageReported(
        replica_id=replica_id,
        batch_rows=list(message.batch_rows),
        batch_seconds=[us * 1e-6 for us in message.batch_compute_us],
        performed_id=message.performed_id,
    )


# --- from and to gateways


def sampling_parameters(message: generation_pb2.SamplingParameters) -> SamplingParameters:
    """Raises InvalidInput when the gateway left a default open."""
    if not message.HasField("max_tokens"):
        raise InvalidInput("sampling.max_tokens", None, "every default filled in by the gateway")
    return SamplingParameters(
        max_tokens=message.max_tokens,
        temperature=message.temperature if message.HasField("temperature") else 1.0,
        top_k=message.top_k,
        top_p=message.top_p if message.HasField("top_p") else 1.0,
        min_p=message.min_p,
        repetition_penalty=(
            message.repetition_penalty if message.HasField("repetition_penalty") else 1.0
        ),
        presence_penalty=message.presence_penalty,
        frequency_penalty=message.frequency_penalty,
        seed=message.seed,
        stop_token_ids=tuple(message.stop_token_ids),
        ignore_eos=message.ignore_eos,
        logprobs=message.logprobs if message.HasField("logprobs") else None,
    )


def write_news(update: coordinator_pb2.RequestUpdate, action: EmitTokens) -> None:
    """Fills an update in."""
    update.token_ids.extend(action.token_ids)
    if action.began_on is not None:
        write_beginning(update, action.began_on)
    if action.logprobs:
        update.logprobs.extend(_logprobs_message(entry) for entry in action.logprobs)
    if action.finish_reason is not None:
        update.finish_reason = _FINISH_REASONS[action.finish_reason]
        if action.usage is not None:
            _write_usage(update.usage, action.usage)


def write_beginning(update: coordinator_pb2.RequestUpdate, cut: Cut) -> None:
    """Says what computes a request."""
    update.began_on.CopyFrom(_cut_message(cut))


@functools.lru_cache(maxsize=16)
def _cut_message(cut: Cut) -> coordinator_pb2.Cut:
    return coordinator_pb2.Cut(
        end_layers=[part.end_layer for part in cut.parts],
        layer_digests=[digest for part in cut.parts for digest in part.weights],
    )


def cut_from(message: coordinator_pb2.Cut) -> Cut | None:
    """None where it says nothing; raises InvalidInput where it is no cut of a model."""
    ends, digests = list(message.end_layers), tuple(message.layer_digests)
    if not digests and not ends:
        return None
    edges = [0, *ends]
    if sorted(set(edges)) != edges or edges[-1] != len(digests):
        raise InvalidInput("began_on", ends, f"ends of stages, up to {len(digests)} layers")
    return Cut(tuple(Part(first, digests[first:end]) for first, end in pairwise(edges)))


def write_refusal(update: coordinator_pb2.RequestUpdate, action: Refuse) -> None:
    update.finish_reason = generation_pb2.FINISH_REASON_ERROR
    write_error(update.refusal, action.error)
    if action.usage is not None:
        _write_usage(update.usage, action.usage)


def write_error(refusal: coordinator_pb2.Refusal, error: PenstockError) -> None:
    refusal.code = status_from_error(error).code.value[0]
    refusal.message = str(error)
    if isinstance(error, Exhausted | Unavailable) and error.retry_after_s is not None:
        refusal.retry_delay.CopyFrom(duration(error.retry_after_s))


def _write_usage(message: generation_pb2.Usage, usage: Usage) -> None:
    message.prompt_tokens = usage.prompt_tokens
    message.completion_tokens = usage.completion_tokens
    message.cached_tokens = usage.cached_tokens
    message.queue_duration.CopyFrom(duration(usage.queue_s))
    message.prefill_duration.CopyFrom(duration(usage.prefill_s))
    message.decode_duration.CopyFrom(duration(usage.decode_s))


def _logprobs_message(logprobs: PositionLogprobs) -> generation_pb2.PositionLogprobs:
    return generation_pb2.PositionLogprobs(
        chosen=generation_pb2.TokenLogprob(token_id=logprobs.token_id, logprob=logprobs.logprob),
        top=[
            generation_pb2.TokenLogprob(token_id=token_id, logprob=logprob)
            for token_id, logprob in zip(logprobs.top_token_ids, logprobs.top_logprobs, strict=True)
        ],
    )
