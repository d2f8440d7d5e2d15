"""Streams whose answers are known to the bit, and what became of each."""

from __future__ import annotations

import random
import struct
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import grpc
from penstock.v1 import generation_pb2 as pb
from penstock.v1.generation_pb2_grpc import GenerationServiceStub

STREAM_TIMEOUT_S = 90.0
# A longer pause between messages is an interruption.
INTERRUPTION_S = 0.5
_SHARED_PROMPT = 40


@dataclass(kw_only=True)
class Outcome:
    """One stream from its start to its end."""

    sent_s: float
    token_ids: list[int] = field(default_factory=list)
    # Of every log probability, in order: as good as a hash of the logits.
    logprob_bits: list[int] = field(default_factory=list)
    arrivals_s: list[float] = field(default_factory=list)  # of messages, by time.monotonic()
    finish_reason: int = 0
    usage: tuple[int, int] = (0, 0)  # prompt, completion
    error: grpc.StatusCode | None = None

    def agrees_with(self, usual: Outcome) -> bool:
        """Whether this is the usual answer to the bit, or where it failed, the beginning of it."""
        if self.error is None:
            return self._answer == usual._answer
        tokens, bits = self.token_ids, self.logprob_bits
        return tokens == usual.token_ids[: len(tokens)] and bits == usual.logprob_bits[: len(bits)]

    @property
    def _answer(self) -> tuple[object, ...]:
        return (self.token_ids, self.logprob_bits, self.finish_reason, self.usage)

    def longest_pause_s(self, since_s: float) -> float | None:
        """The longest time without a message, of those that ended after `since_s`."""
        times = [self.sent_s, *self.arrivals_s]
        pauses = [b - a for a, b in pairwise(times) if b > since_s]
        return max(pauses, default=None)

    def resumed_s(self, since_s: float) -> float:
        """When it went on after the last interruption that ended after `since_s`; 0: none did."""
        times = [self.sent_s, *self.arrivals_s]
        ends = [b for a, b in pairwise(times) if b > since_s and b - a > INTERRUPTION_S]
        return max(ends, default=0.0)


def make_streams(seed: int, *, count: int, vocab_size: int) -> list[pb.GenerateRequest]:
    """Requests of all kinds: greedy and sampled, with and without log probabilities, some whose
    prompts begin alike."""
    rng = random.Random(seed)
    shared = [rng.randrange(vocab_size) for _ in range(_SHARED_PROMPT)]
    return [_make_stream(rng, shared, index, vocab_size) for index in range(count)]


def _make_stream(
    rng: random.Random, shared: Sequence[int], index: int, vocab_size: int
) -> pb.GenerateRequest:
    own = [rng.randrange(vocab_size) for _ in range(rng.randint(4, 60))]
    request = pb.GenerateRequest(token_ids=[*shared, *own] if index % 4 == 0 else own)
    sampling = request.sampling
    sampling.max_tokens = rng.randint(24, 64)
    sampling.ignore_eos = True
    sampling.seed = rng.getrandbits(63)
    sampling.temperature = 0.0 if index % 2 else 0.9
    if index % 8 == 4:
        sampling.repetition_penalty, sampling.presence_penalty = 1.1, 0.2
    if index % 8 != 7:
        sampling.logprobs = 3
    return request


async def follow(
    channel: grpc.aio.Channel,
    request: pb.GenerateRequest,
    *,
    on_tokens: Callable[[int], None] = lambda _: None,
    timeout_s: float = STREAM_TIMEOUT_S,
) -> Outcome:
    """Sends a request and follows its answer to the end, whatever that is."""
    outcome = Outcome(sent_s=time.monotonic())
    try:
        async for response in GenerationServiceStub(channel).Generate(request, timeout=timeout_s):
            outcome.arrivals_s.append(time.monotonic())
            outcome.token_ids += response.token_ids
            for entry in response.logprobs:
                logprobs = [entry.chosen.logprob, *(one.logprob for one in entry.top)]
                outcome.logprob_bits += struct.unpack(
                    f"{len(logprobs)}I", struct.pack(f"{len(logprobs)}f", *logprobs)
                )
            outcome.finish_reason = response.finish_reason
            if response.finish_reason:
                usage = response.usage
                outcome.usage = (usage.prompt_tokens, usage.completion_tokens)
            on_tokens(len(response.token_ids))
    except grpc.aio.AioRpcError as error:
        outcome.error = error.code()
    return outcome
