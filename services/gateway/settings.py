"""Settings of a gateway."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from core.errors import InvalidInput
from services.common.addresses import is_loopback


@dataclass(frozen=True, kw_only=True)
class GatewaySettings:
    """What one gateway is started with."""

    coordinators: tuple[str, ...]
    """host:port of the pipeline's coordinator, and of those that stand by."""
    model: Path
    """Weight file or folder: the tokenizer is read from it, or from beside it."""
    sealer: Path | None = None
    """Public key of who has sealed the model; None: it is not sealed."""
    listen: str = "127.0.0.1:8001"
    """host:port to serve on; port 0 takes a free one."""
    metrics_port: int | None = None
    """Port of /metrics on the loopback interface; None: no metrics."""
    max_message_bytes: int = 16 * 1024 * 1024
    """Bigger requests get RESOURCE_EXHAUSTED."""
    drain_s: float = 10.0
    """How long open requests may go on after a signal to stop."""
    resume_limit_s: float = 30.0
    """How long requests wait for the next coordinator when one was lost; then they fail."""
    certs: Path | None = None
    """Folder of its identity; None: everything in the clear. Clients need none of their own."""
    insecure: bool = False
    """Listens beyond loopback even so."""
    require_keys: bool | None = None
    """Whether each RPC needs an API key; None: if anybody beyond this machine can call."""
    data_folder: Path = Path("data")
    """Where the store of the keys and the audit log are; used where keys are required."""
    exit_with_parent: bool = False
    """Stop when standard input ends: whoever started this process has gone."""

    @property
    def requires_keys(self) -> bool:
        if self.require_keys is None:
            return not is_loopback(self.listen)
        return self.require_keys

    def __post_init__(self) -> None:
        if not self.coordinators or not all(self.coordinators):
            raise InvalidInput("coordinator", ",".join(self.coordinators), "host:port, with commas")
        if not self.resume_limit_s > 0:
            raise InvalidInput("resume_limit_s", self.resume_limit_s, "above 0")
        if self.max_message_bytes < 1024:
            raise InvalidInput("max_message_bytes", self.max_message_bytes, "at least 1024")
        if not 0 <= self.drain_s <= 3600:
            raise InvalidInput("drain_s", self.drain_s, "0 to 3600")
