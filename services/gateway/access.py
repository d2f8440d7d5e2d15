"""The one check in front of every public RPC: whose key is it, and is it good for this?

Health and reflection are open to all. A method that stands in no table is refused: one that is
added later cannot be forgotten here.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, Protocol

from core.errors import PermissionDenied, Unauthenticated
from services.common.keys import (
    AUTHORIZATION,
    GENERATE,
    MODELS,
    STATUS,
    TOKENIZE,
    ApiKey,
    holds,
    read_key,
    tenant_salt,
)
from services.gateway.caller import Caller
from services.gateway.key_ring import KeyRing
from services.gateway.quota import Quota
from services.gateway.share import share_from

Metadata = Iterable[tuple[str, Any]] | None

OPEN_TO_ALL = ("/grpc.health.v1.Health/", "/grpc.reflection.v1alpha.ServerReflection/")
_GENERATION, _INFERENCE = "/penstock.v1.GenerationService/", "/inference.GRPCInferenceService/"
SCOPE_OF = {
    _GENERATION + "Generate": GENERATE,
    _GENERATION + "GenerateMany": GENERATE,
    _GENERATION + "ListModels": MODELS,
    _GENERATION + "Tokenize": TOKENIZE,
    _GENERATION + "Detokenize": TOKENIZE,
    _INFERENCE + "ServerLive": STATUS,
    _INFERENCE + "ServerReady": STATUS,
    _INFERENCE + "ServerMetadata": STATUS,
    _INFERENCE + "ModelReady": MODELS,
    _INFERENCE + "ModelMetadata": MODELS,
    _INFERENCE + "ModelInfer": GENERATE,
    _INFERENCE + "ModelStreamInfer": GENERATE,
}


class Access(Protocol):
    """Finds out who calls."""

    async def authorise(self, method: str, metadata: Metadata) -> Caller:
        """Who calls `method`; raises Unauthenticated, PermissionDenied, InvalidInput (a share
        that cannot be had), and Unavailable where nobody can tell."""
        ...


class OpenAccess:
    """Asks for no keys: a mesh of one's own, on loopback."""

    async def authorise(self, method: str, metadata: Metadata) -> Caller:
        return Caller(share=share_from(metadata))


class KeyAccess:
    """Asks for a key with each RPC."""

    def __init__(
        self, ring: KeyRing, *, salt_secret: bytes, clock: Callable[[], float] = time.time
    ) -> None:
        self._ring = ring
        self._salt_secret = salt_secret
        self._clock = clock
        self._quotas: dict[str, Quota] = {}  # of keys that were used; as many as there are keys

    async def authorise(self, method: str, metadata: Metadata) -> Caller:
        metadata = tuple(metadata or ())
        key = await self._key_of(metadata)
        scope = SCOPE_OF.get(method)
        if scope not in key.scopes:
            allowed = ", ".join(sorted(key.scopes))
            raise PermissionDenied(f"this key is for {allowed}, and not for {method}")
        return Caller(
            key=key,
            share=share_from(metadata, tenant=key.tenant, max_priority=key.limits.max_priority),
            cache_salt=tenant_salt(key.tenant, secret=self._salt_secret),
            quota=self._quota_of(key),
            check_key=partial(self._check_still_valid, key.key_id),
        )

    async def _key_of(self, metadata: Iterable[tuple[str, Any]]) -> ApiKey:
        given = [value for name, value in metadata if name == AUTHORIZATION]
        if len(given) != 1:
            raise Unauthenticated("send one API key, as metadata `authorization: Bearer KEY`")
        scheme, _, text = str(given[0]).partition(" ")
        shown = read_key(text) if scheme.lower() == "bearer" else None
        if shown is None:
            raise Unauthenticated("the API key does not read `Bearer penstock_ID_SECRET`")
        key = (await self._ring.current()).get(shown.key_id)
        if not holds(key, shown.secret) or key is None:
            raise Unauthenticated("the API key is unknown")
        self._refuse_ended(key)
        return key

    async def _check_still_valid(self, key_id: str) -> None:
        key = (await self._ring.current()).get(key_id)
        if key is None:
            raise Unauthenticated("the API key is unknown")
        self._refuse_ended(key)

    def _refuse_ended(self, key: ApiKey) -> None:
        state = key.state(self._clock())
        if state != "valid":
            raise Unauthenticated(f"the API key {key.key_id} is {state}")

    def _quota_of(self, key: ApiKey) -> Quota:
        quota = self._quotas.get(key.key_id)
        if quota is None:
            quota = Quota(key.limits, subject=f"key {key.key_id}")
            self._quotas[key.key_id] = quota
        return quota
