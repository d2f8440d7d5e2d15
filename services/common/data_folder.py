"""Where a deployment keeps what must outlive its processes: the store and the audit log."""

from __future__ import annotations

import os
from pathlib import Path

STORE_NAME = "store.db"
AUDIT_NAME = "audit.jsonl"


def default_data_folder() -> Path:
    """$PENSTOCK_DATA, or else penstock in $XDG_DATA_HOME or ~/.local/share."""
    if chosen := os.environ.get("PENSTOCK_DATA"):
        return Path(chosen)
    home = os.environ.get("XDG_DATA_HOME")
    return (Path(home) if home else Path.home() / ".local" / "share") / "penstock"


def open_private(path: Path, flags: int) -> int:
    """Opens a file that only its owner can read, in a folder that only they can enter."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    return os.open(path, flags | os.O_CREAT | os.O_CLOEXEC, 0o600)
