"""Whose a request is, and how urgent: said in an RPC's metadata, since it is no part of it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from core.errors import InvalidInput
from services.common.keys import MAX_PRIORITY, MAX_TENANT_CHARS

TENANT_KEY, PRIORITY_KEY = "penstock-tenant", "penstock-priority"


@dataclass(frozen=True, kw_only=True)
class Share:
    """See Submission in coordinator.proto."""

    tenant: str = ""
    priority: int = 0


def share_from(
    metadata: Iterable[tuple[str, Any]] | None,
    *,
    tenant: str | None = None,
    max_priority: int = MAX_PRIORITY,
) -> Share:
    """Reads the metadata of an RPC; raises InvalidInput.

    `tenant` is who it is, where that is known: then nothing that is claimed counts.
    """
    values = {key: value for key, value in metadata or () if key in (TENANT_KEY, PRIORITY_KEY)}
    if tenant is None:
        tenant = _claimed_tenant(values.get(TENANT_KEY, ""))
    priority = values.get(PRIORITY_KEY, str(min(0, max_priority)))
    try:
        number = int(priority)
    except ValueError:
        number = MAX_PRIORITY + 1
    if not -MAX_PRIORITY <= number <= max_priority:
        raise InvalidInput(PRIORITY_KEY, priority, f"{-MAX_PRIORITY} to {max_priority}")
    return Share(tenant=tenant, priority=number)


def _claimed_tenant(tenant: str) -> str:
    if len(tenant) > MAX_TENANT_CHARS:
        raise InvalidInput(TENANT_KEY, tenant, f"at most {MAX_TENANT_CHARS} characters")
    return tenant
