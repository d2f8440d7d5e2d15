"""One completion: tokens from the coordinator become messages to the client."""

from __future__ import annotations

import time
from collections.abc import Sequence

from penstock.v1 import coordinator_pb2, generation_pb2

from core.tokens.stop_strings import StopStrings
from core.tokens.tokenizer import Tokenizer
from services.common.durations import duration
from services.gateway.open_request import News
from services.gateway.validation import PreparedRequest

_STOP = generation_pb2.FINISH_REASON_STOP


class Completion:
    """Turns updates into responses: text, stop strings, counts. Knows no streams.

    Tokens after the one that completes a stop string are neither shown nor counted.
    """

    def __init__(self, request: PreparedRequest, tokenizer: Tokenizer) -> None:
        self._detokenizer = tokenizer.detokenizer(
            skip_special_tokens=True, continues_text=request.continues_text
        )
        self._stops = StopStrings(request.stops) if request.stops else None
        self._silent_ids = {*request.sampling.stop_token_ids, *tokenizer.eos_token_ids}
        self._num_prompt_tokens = len(request.token_ids)
        # Noted only where there are stop strings, which alone may end it here.
        self._first_token_at = self._last_token_at = 0.0
        self.num_tokens = 0
        self.stopped = False  # a stop string was completed; the request shall be cancelled
        self.usage: generation_pb2.Usage | None = None  # the coordinator's, at the end

    def take(self, news: News) -> generation_pb2.GenerateResponse:
        """Takes news and returns what to send; its `finish_reason` is set when that is the last.

        Where a stop string was completed, `stopped` is set, the reason is STOP, and `usage`
        is missing unless the news had it; `finish` adds it.
        """
        response = generation_pb2.GenerateResponse()
        if news.token_ids:
            self._take_tokens(news.token_ids, response)
        for update in news.updates:
            if update.token_ids and not self.stopped:
                self._take_tokens(update.token_ids, response, update)
            if update.finish_reason:
                self.usage = update.usage
                if not self.stopped:
                    response.text += self._rest()
                    response.finish_reason = update.finish_reason
        if self.stopped:
            response.finish_reason = _STOP
        return response

    def finish(self, response: generation_pb2.GenerateResponse) -> None:
        """Adds usage to the last response: the coordinator's durations, our counts."""
        if self.usage is not None:
            response.usage.CopyFrom(self.usage)
        response.usage.prompt_tokens = self._num_prompt_tokens
        response.usage.completion_tokens = self.num_tokens
        if self.stopped:  # the coordinator may have gone on for a few tokens
            elapsed_s = self._last_token_at - self._first_token_at
            response.usage.decode_duration.CopyFrom(duration(elapsed_s))

    def _take_tokens(
        self,
        token_ids: Sequence[int],
        response: generation_pb2.GenerateResponse,
        update: coordinator_pb2.RequestUpdate | None = None,
    ) -> None:
        """Adds tokens to the response; `update` is what came with them, if anything did."""
        ends = update is not None and update.finish_reason == _STOP
        ends_silently = ends and token_ids[-1] in self._silent_ids
        spoken = token_ids[:-1] if ends_silently else token_ids
        if self._stops is None:
            num_taken = len(token_ids)
            response.text += self._detokenizer.push(spoken)
        else:
            text, num_taken = self._push_until_stop(self._stops, spoken)
            response.text += text
            if ends_silently and not self.stopped:
                num_taken += 1
        response.token_ids.extend(token_ids[:num_taken])
        if update is not None and update.logprobs:
            response.logprobs.extend(update.logprobs[:num_taken])
        self.num_tokens += num_taken

    def _push_until_stop(self, stops: StopStrings, token_ids: Sequence[int]) -> tuple[str, int]:
        """Text to show, and how many tokens were taken for it."""
        self._last_token_at = time.monotonic()
        if not self.num_tokens:
            self._first_token_at = self._last_token_at
        pieces = []
        for count, token_id in enumerate(token_ids, start=1):
            result = stops.push(self._detokenizer.push((token_id,)))
            pieces.append(result.text)
            if result.stopped:
                self.stopped = True
                return "".join(pieces), count
        return "".join(pieces), len(token_ids)

    def _rest(self) -> str:
        text = self._detokenizer.flush()
        if self._stops is None:
            return text
        result = self._stops.push(text)
        return result.text if result.stopped else result.text + self._stops.flush()
