"""What the operator may set on a coordinator."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from core.errors import InvalidInput
from services.coordinator.roster import Roster

_LONGEST_ADDRESS = 256


@dataclass(frozen=True, kw_only=True)
class CoordinatorSettings:
    """Settings of one coordinator process; addresses are `host:port`."""

    listen: str
    roster: Roster
    # Has the roster of now: read anew when the stages are taken over. None: it never changes.
    stages_file: Path | None = None
    metrics_port: int | None = None  # None: no metrics
    max_sequences: int = 256  # running at a time
    max_waiting: int = 1024  # waiting for admission; one more is refused
    speculation: int = 16  # most guesses of a sequence in a micro-batch; 0: none
    micro_batch_timeout_s: float = 10.0  # a replica that returns nothing for so long has hung
    pulse_timeout_s: float = 2.0  # a replica that says nothing for so long is lost
    lost_limit_s: float = 30.0  # how long requests wait where a stage has no replica
    # How long gateways may take to bring the requests that they hold, once they can be served.
    resume_grace_s: float = 3.0
    prefix_cache: bool = True  # prompts that begin alike are computed once
    # Shares of tenants in what is admitted; 1 for those that are not named.
    tenant_weights: Mapping[str, float] = field(default_factory=dict)
    offers_shortcuts: bool = True  # sockets beside the streams, for gateways on the same host
    open_timeout_s: float = 600.0  # for a stage to load its weights and open
    log_level: str = "INFO"
    audit: Path | None = None  # file of the audit log; None: none
    exit_with_parent: bool = False  # stop when standard input ends
    certs: Path | None = None  # folder of its identity; None: everything in the clear
    insecure: bool = False  # listens beyond loopback even so

    def __post_init__(self) -> None:
        if self.max_sequences < 1:
            raise InvalidInput("max_sequences", self.max_sequences, "at least 1")
        if self.max_waiting < 1:
            raise InvalidInput("max_waiting", self.max_waiting, "at least 1")
        if self.speculation < 0:
            raise InvalidInput("speculation", self.speculation, "0 or more")
        if not self.lost_limit_s >= 0:
            raise InvalidInput("lost_limit_s", self.lost_limit_s, "0 or more")
        for name in ("micro_batch_timeout_s", "pulse_timeout_s", "open_timeout_s"):
            if not getattr(self, name) > 0:
                raise InvalidInput(name, getattr(self, name), "above 0")


def parse_tenant_weights(text: str) -> dict[str, float]:
    """Reads `gold=4,free=0.5`; raises InvalidInput."""
    weights = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        tenant, _, number = part.partition("=")
        try:
            weights[tenant.strip()] = float(number)
        except ValueError:
            allowed = "tenants and numbers such as gold=4,free=0.5"
            raise InvalidInput("tenant_weights", part, allowed) from None
    return weights


def check_address(address: str) -> None:
    """Raises InvalidInput for what gRPC would take for something else than host:port."""
    host, _, port = address.rpartition(":")
    is_port = port.isascii() and port.isdecimal() and len(port) <= 5 and 0 < int(port) <= 65535
    if not (is_port and host and host.isprintable() and len(address) <= _LONGEST_ADDRESS):
        raise InvalidInput("address", address, "host:port")
