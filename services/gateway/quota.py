"""What the requests of one key take at this gateway, and how much more they may."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from core.errors import Exhausted, InvalidInput, Unavailable
from services.common.keys import KeyLimits

# Nobody knows when a stream will end.
_STREAM_RETRY_S = 1.0


class Quota:
    """Streams and tokens of one key.

    Tokens come from a bucket that holds a minute's worth and fills steadily. A request reserves
    all that it may generate, and gives back what it did not: so no minute has more than twice
    the limit, and no answer is cut off by it.
    """

    def __init__(
        self, limits: KeyLimits, *, subject: str, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._limits = limits
        self._subject = subject
        self._clock = clock
        self._num_streams = 0
        self._tokens = float(limits.tokens_per_minute or 0)
        self._filled_at = clock()

    @contextmanager
    def request(self) -> Iterator[RequestQuota]:
        """Counts a request that is answered; raises Exhausted where there are enough."""
        most = self._limits.max_streams
        if most is not None and self._num_streams >= most:
            message = f"{self._num_streams} requests are answered with this key; allowed: {most}"
            raise Exhausted(message, retry_after_s=_STREAM_RETRY_S, subject=self._subject)
        self._num_streams += 1
        taken = RequestQuota(self)
        try:
            yield taken
            taken.settle()
        except BaseException as error:
            taken.settle(error)
            raise
        finally:
            self._num_streams -= 1

    def reserve(self, prompt_tokens: int, *, max_tokens: int) -> None:
        """Takes tokens; raises Exhausted, saying when there will be enough, and InvalidInput where
        there never will."""
        per_minute = self._limits.tokens_per_minute
        if per_minute is None:
            return
        wanted = prompt_tokens + max_tokens
        if wanted > per_minute:
            allowed = f"with the prompt at most {per_minute}, what this key allows in a minute"
            seen = f"{max_tokens}, with the prompt {wanted}"
            raise InvalidInput("sampling.max_tokens", seen, allowed)
        self._fill(per_minute)
        if wanted > self._tokens:
            raise Exhausted(
                f"{wanted} tokens wanted, {int(self._tokens)} left of {per_minute} a minute",
                retry_after_s=(wanted - self._tokens) * 60.0 / per_minute,
                subject=self._subject,
            )
        self._tokens -= wanted

    def give_back(self, tokens: int) -> None:
        """Returns what was reserved and not used."""
        self._tokens += tokens

    def _fill(self, per_minute: int) -> None:
        now = self._clock()
        gained = (now - self._filled_at) * per_minute / 60.0
        self._tokens = min(float(per_minute), self._tokens + gained)
        self._filled_at = now


class RequestQuota:
    """What one request has taken."""

    def __init__(self, quota: Quota) -> None:
        self.num_output_tokens = 0  # so far; to be set by whoever counts
        self._quota = quota
        self._prompt_tokens = self._max_tokens = 0

    def reserve(self, prompt_tokens: int, *, max_tokens: int) -> None:
        """See `Quota.reserve`; to be called once."""
        self._quota.reserve(prompt_tokens, max_tokens=max_tokens)
        self._prompt_tokens, self._max_tokens = prompt_tokens, max_tokens

    def settle(self, error: BaseException | None = None) -> None:
        """Gives back what was not used; the prompt, too, where the mesh refused it."""
        unused = self._max_tokens - self.num_output_tokens
        if isinstance(error, Exhausted | Unavailable) and not self.num_output_tokens:
            unused += self._prompt_tokens
        self._quota.give_back(unused)
