"""An OpenAI-style server as the load generator sees it: completions of token ids, streamed."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Sequence

import httpx2

from tests.benchmarks.load import REQUEST_TIMEOUT_S, Answers, Encode, Request, RequestFailed

EVENT = b"data: "
LAST_EVENT = b"[DONE]"


def encode_openai(model: str) -> Encode:
    """Greedy, to its full length, with the ids in the answer so that they can be counted."""

    def encode(prompt: Sequence[int], num_new_tokens: int) -> bytes:
        body = {
            "model": model,
            "prompt": list(prompt),
            "max_tokens": num_new_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "return_token_ids": True,
        }
        return json.dumps(body).encode()

    return encode


def openai_answers(client: httpx2.AsyncClient) -> Answers:
    """Those of the server that `client` has for its base."""

    async def answers(request: Request) -> AsyncIterator[int]:
        headers = {"content-type": "application/json"}
        try:
            async with client.stream(
                "POST", "/v1/completions", content=request.message, headers=headers
            ) as response:
                if response.status_code != 200:
                    text = (await response.aread()).decode(errors="replace")
                    raise RequestFailed(f"HTTP {response.status_code}: {text[:200]}")
                async for event in _events(response.aiter_bytes()):
                    yield count_tokens(event)
        except httpx2.HTTPError as error:
            raise RequestFailed(f"{type(error).__name__}: {error}") from error

    return answers


def count_tokens(event: bytes) -> int:
    """New tokens in one event of the stream. Raises RequestFailed where it is an error."""
    content = json.loads(event)
    if "error" in content:
        raise RequestFailed(str(content["error"]))
    return sum(len(choice.get("token_ids") or ()) for choice in content.get("choices", ()))


async def _events(parts: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """The data of each server-sent event, but not the mark of the end."""
    rest = b""
    async for part in parts:
        *whole, rest = (rest + part).split(b"\n\n")
        for event in whole:
            data = event.strip().removeprefix(EVENT)
            if data and data != LAST_EVENT:
                yield data


def open_client(address: str) -> httpx2.AsyncClient:
    """A client without a limit of connections: the load decides how many there are."""
    limits = httpx2.Limits(max_connections=None, max_keepalive_connections=None)
    return httpx2.AsyncClient(
        base_url=f"http://{address}", timeout=REQUEST_TIMEOUT_S, limits=limits, trust_env=False
    )
