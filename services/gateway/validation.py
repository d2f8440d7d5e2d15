"""Checks requests and fills in what they leave open; every refusal names field, value, allowed."""

from __future__ import annotations

import secrets
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from functools import partial

from penstock.v1 import generation_pb2

from core.errors import InvalidInput
from core.tokens.chat_template import ChatMessage
from core.tokens.tokenizer import Tokenizer
from services.common.keys import KeyLimits
from services.gateway.encoding_threads import EncodingThreads

DEFAULT_MAX_TOKENS = 256
MAX_STOPS, MAX_STOP_BYTES = 16, 256
MAX_STOP_TOKEN_IDS = 64
MAX_LOGPROBS = 20
_TEXT_OR_IDS = "exactly one of prompt, messages and token_ids"

_RANGES: dict[str, tuple[float, float, str]] = {
    # lowest and highest allowed; a range whose text begins with "(" excludes the lowest.
    "temperature": (0.0, 100.0, "[0, 100]"),
    "top_p": (0.0, 1.0, "(0, 1]"),
    "min_p": (0.0, 1.0, "[0, 1]"),
    "repetition_penalty": (0.0, 100.0, "(0, 100]"),
    "presence_penalty": (-100.0, 100.0, "[-100, 100]"),
    "frequency_penalty": (-100.0, 100.0, "[-100, 100]"),
}
_DEFAULTS = generation_pb2.SamplingParameters(
    temperature=1.0,
    top_k=0,
    top_p=1.0,
    min_p=0.0,
    repetition_penalty=1.0,
    presence_penalty=0.0,
    frequency_penalty=0.0,
    ignore_eos=False,
)


@dataclass(frozen=True, kw_only=True)
class PreparedRequest:
    """A request that can be submitted.

    `sampling` has every field set except `stop`, which is `stops` here. `continues_text`:
    the completion goes on from a raw prompt, so that a first space is shown.
    """

    model: generation_pb2.Model
    token_ids: list[int]
    sampling: generation_pb2.SamplingParameters
    stops: tuple[str, ...]
    continues_text: bool


async def prepare(
    request: generation_pb2.GenerateRequest,
    model: generation_pb2.Model,
    tokenizer: Tokenizer,
    *,
    threads: EncodingThreads,
    limits: KeyLimits,
) -> PreparedRequest:
    """Checks and tokenises a request for `model`; raises InvalidInput.

    Where a request asks for more than its key's `limits`, too; a default follows them.
    """
    check_sampling(request.sampling, vocab_size=model.vocab_size)
    field = _only_input(request)
    limit = model.context_length  # of the prompt and one token
    if limits.max_prompt_tokens is not None:
        limit = min(limit, limits.max_prompt_tokens + 1)
    if field == "token_ids":
        token_ids = list(request.token_ids)
        check_token_ids(token_ids, vocab_size=model.vocab_size)
    else:
        token_ids = await tokenise(
            request.prompt, request.messages, tokenizer, threads=threads, context_length=limit
        )
    if not 1 <= len(token_ids) < limit:
        raise InvalidInput(field, f"{len(token_ids)} tokens", f"1 to {limit - 1} tokens")
    num_free = model.context_length - len(token_ids)
    return PreparedRequest(
        model=model,
        token_ids=token_ids,
        sampling=_resolved(request.sampling, num_free=num_free, limits=limits),
        stops=tuple(request.sampling.stop),
        continues_text=field == "prompt",
    )


def _only_input(request: generation_pb2.GenerateRequest) -> str:
    given = [name for name in ("prompt", "messages", "token_ids") if getattr(request, name)]
    if len(given) != 1:
        raise InvalidInput(given[0] if given else "prompt", set_fields(given), _TEXT_OR_IDS)
    return given[0]


def set_fields(given: list[str]) -> str:
    """Says, for a refusal, how many of the fields that exclude each other were set."""
    return f"set together with {' and '.join(given[1:])}" if given else "not set"


async def tokenise(
    prompt: str,
    messages: Iterable[generation_pb2.ChatMessage],
    tokenizer: Tokenizer,
    *,
    threads: EncodingThreads,
    context_length: int,
) -> list[int]:
    """Token ids of a prompt, or of messages where there is no prompt; raises InvalidInput.

    Texts that cannot fit `context_length` tokens are refused before they cost anything.
    """
    chat = [ChatMessage(message.role, message.content) for message in messages]
    field = "messages" if chat else "prompt"
    size = len(prompt) + sum(len(message.content) for message in chat)
    longest = max(1, context_length * tokenizer.longest_token_bytes)
    if size > longest:
        raise InvalidInput(field, f"{size} characters", f"at most {context_length - 1} tokens")
    if chat:
        now = datetime.now().astimezone()
        return await threads.run(field, partial(tokenizer.encode_chat, chat, now=now))
    return await threads.run(field, partial(tokenizer.encode, prompt))


def check_token_ids(token_ids: list[int], *, vocab_size: int, field: str = "token_ids") -> None:
    """Raises InvalidInput unless every id is below `vocab_size`."""
    if token_ids and max(token_ids) >= vocab_size:
        index = next(i for i, token_id in enumerate(token_ids) if token_id >= vocab_size)
        raise InvalidInput(f"{field}[{index}]", token_ids[index], f"0 to {vocab_size - 1}")


def check_sampling(sampling: generation_pb2.SamplingParameters, *, vocab_size: int) -> None:
    """Raises InvalidInput for the first field out of its range; max_tokens' upper end is left."""
    for name, (lowest, highest, allowed) in _RANGES.items():
        if not sampling.HasField(name):
            continue
        value = getattr(sampling, name)
        # Written so that NaN fails.
        inside = lowest < value <= highest if allowed[0] == "(" else lowest <= value <= highest
        if not inside:
            raise InvalidInput(f"sampling.{name}", value, allowed)
    if sampling.HasField("max_tokens") and sampling.max_tokens == 0:
        raise InvalidInput("sampling.max_tokens", 0, "at least 1")
    if sampling.logprobs > MAX_LOGPROBS:
        raise InvalidInput("sampling.logprobs", sampling.logprobs, f"0 to {MAX_LOGPROBS}")
    _check_stops(sampling, vocab_size=vocab_size)


def _check_stops(sampling: generation_pb2.SamplingParameters, *, vocab_size: int) -> None:
    if len(sampling.stop) > MAX_STOPS:
        given = f"{len(sampling.stop)} strings"
        raise InvalidInput("sampling.stop", given, f"at most {MAX_STOPS}")
    for index, stop in enumerate(sampling.stop):
        if not 1 <= len(stop.encode(errors="replace")) <= MAX_STOP_BYTES:
            raise InvalidInput(f"sampling.stop[{index}]", stop, f"1 to {MAX_STOP_BYTES} bytes")
    if len(sampling.stop_token_ids) > MAX_STOP_TOKEN_IDS:
        given = f"{len(sampling.stop_token_ids)} ids"
        raise InvalidInput("sampling.stop_token_ids", given, f"at most {MAX_STOP_TOKEN_IDS}")
    ids = list(sampling.stop_token_ids)
    check_token_ids(ids, vocab_size=vocab_size, field="sampling.stop_token_ids")


def _resolved(
    sampling: generation_pb2.SamplingParameters, *, num_free: int, limits: KeyLimits
) -> generation_pb2.SamplingParameters:
    most = num_free
    if limits.max_output_tokens is not None:
        most = min(most, limits.max_output_tokens)
    if most < num_free and sampling.max_tokens > most:
        allowed = f"1 to {most}, the most that this key allows"
        raise InvalidInput("sampling.max_tokens", sampling.max_tokens, allowed)
    if sampling.max_tokens > num_free:
        allowed = f"1 to {num_free}, the room that the prompt leaves in the context"
        raise InvalidInput("sampling.max_tokens", sampling.max_tokens, allowed)
    resolved = generation_pb2.SamplingParameters()
    resolved.CopyFrom(_DEFAULTS)
    resolved.max_tokens = min(DEFAULT_MAX_TOKENS, most)
    resolved.seed = secrets.randbits(64)
    resolved.MergeFrom(sampling)
    resolved.ClearField("stop")
    return resolved
