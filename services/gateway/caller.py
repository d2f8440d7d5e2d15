"""On whose behalf an RPC runs. The interceptor finds out; whoever serves the RPC asks here."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from dataclasses import dataclass, field

from core.errors import PermissionDenied
from services.common.keys import UNLIMITED, ApiKey, KeyLimits
from services.gateway.quota import Quota
from services.gateway.share import Share


async def _always() -> None:
    """Whoever needs no key cannot lose it."""


@dataclass(frozen=True, kw_only=True)
class Caller:
    """Who calls, and what they may take. By default anybody, where no keys are asked for."""

    share: Share
    key: ApiKey | None = None
    cache_salt: str = ""
    quota: Quota = field(default_factory=lambda: Quota(UNLIMITED, subject=""))
    check_key: Callable[[], Awaitable[None]] = _always
    """Raises Unauthenticated where the key has ended since the RPC began: streams are long."""

    @property
    def limits(self) -> KeyLimits:
        return UNLIMITED if self.key is None else self.key.limits

    def allows_model(self, name: str) -> bool:
        return self.key is None or self.key.allows_model(name)

    def check_model(self, name: str) -> None:
        """Raises PermissionDenied where the key is for other models."""
        if not self.allows_model(name):
            raise PermissionDenied(f"this key does not allow the model {name!r}")


_CURRENT: ContextVar[Caller] = ContextVar("caller")


def current_caller() -> Caller:
    """The caller of the RPC that runs in this task."""
    return _CURRENT.get()


def set_caller(caller: Caller) -> None:
    _CURRENT.set(caller)
