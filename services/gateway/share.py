"""Whose a request is, and how urgent: said in an RPC's metadata, since it is no part of it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from core.errors import InvalidInput

TENANT_KEY, PRIORITY_KEY = "penstock-tenant", "penstock-priority"
MAX_TENANT_CHARS = 128
MAX_PRIORITY = 100


@dataclass(frozen=True, kw_only=True)
class Share:
    """See Submission in coordinator.proto."""

    tenant: str = ""
    priority: int = 0


def share_from(metadata: Iterable[tuple[str, Any]] | None) -> Share:
    """Reads the metadata of an RPC; raises InvalidInput."""
    values = {key: value for key, value in metadata or () if key in (TENANT_KEY, PRIORITY_KEY)}
    tenant, priority = values.get(TENANT_KEY, ""), values.get(PRIORITY_KEY, "0")
    if len(tenant) > MAX_TENANT_CHARS:
        raise InvalidInput(TENANT_KEY, tenant, f"at most {MAX_TENANT_CHARS} characters")
    try:
        number = int(priority)
    except ValueError:
        number = MAX_PRIORITY + 1
    if abs(number) > MAX_PRIORITY:
        raise InvalidInput(PRIORITY_KEY, priority, f"{-MAX_PRIORITY} to {MAX_PRIORITY}")
    return Share(tenant=tenant, priority=number)
